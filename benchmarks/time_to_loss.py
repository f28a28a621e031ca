"""Time and tokens to a loss: our Shakespeare recipe beside nanoGPT's, through the same command.

Each row is a whole process of `hf-nanogpt train`, from start to the written checkpoint, on the
tinyshakespeare text with nanoGPT's split; rows alternate, once for each seed. Choices (the learning
rates of both, the number of steps of ours) were made by `--choose`, which trains on the first 80 %
of the text and measures on the next 10 %; the figures are those of the last 10 %, which nothing was
chosen on. Writes benchmarks/results/time_to_loss.json and .png.

Run: python benchmarks/time_to_loss.py TEXT_FILE
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe_machine

RESULTS = Path(__file__).parent / "results"
PEER = "nanoGPT's recipe, AdamW 1e-3"
TUNED = "nanoGPT's recipe, AdamW {rate:g} (tuned)"
OURS = "shakespeare_char (nano, Muon)"
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)


def run_training(recipe: str, text: Path, *, seed: int, threads: int, **settings) -> dict:
    """Train in a fresh process and return its metrics, with `wall_seconds` of the whole process."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {"seed": seed, "num_threads": threads, "output_dir": f"{folder}/run"} | settings
        command = [sys.executable, "-m", "hf_nanogpt", "train", recipe, "--data", str(text)]
        command += [f"--{name}={value}" for name, value in flags.items()]
        command += ["--eval_strategy=no", "--save_strategy=no", "--sample_steps=0"]
        started = time.perf_counter()
        subprocess.run(
            command, check=True, capture_output=True, env=os.environ | {"TQDM_DISABLE": "1"}
        )
        seconds = time.perf_counter() - started
        metrics = json.loads((Path(folder) / "run" / "metrics.json").read_text())
    return metrics | {"wall_seconds": round(seconds, 2), "seed": seed}


def choose_rate(text: Path, threads: int) -> dict[str, float]:
    """Return the loss of nanoGPT's recipe at each learning rate, on text set apart for choosing."""
    characters = text.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "first.txt"
        part.write_text(characters[: int(len(characters) * 0.9)], encoding="utf-8")
        losses = {}
        for rate in RATES:
            least = json.dumps({"min_lr": rate / 10})
            settings = {"learning_rate": rate, "lr_scheduler_kwargs": least}
            run = run_training("nanogpt_char", part, seed=1, threads=threads, **settings)
            losses[f"{rate:g}"] = run["eval_loss"]
            print(f"AdamW {rate:g}: {run['eval_loss']:.4f}", flush=True)
    return losses


def compare(text: Path, *, rate: float, seeds: list[int], threads: int) -> dict[str, list[dict]]:
    """Run all rows once for each seed, alternating."""
    least = json.dumps({"min_lr": rate / 10})
    rows = {
        PEER: ("nanogpt_char", {}),
        TUNED.format(rate=rate): (
            "nanogpt_char",
            {"learning_rate": rate, "lr_scheduler_kwargs": least},
        ),
        OURS: ("shakespeare_char", {}),
    }
    runs: dict[str, list[dict]] = {name: [] for name in rows}
    for seed in seeds:
        for name, (recipe, settings) in rows.items():
            run = run_training(recipe, text, seed=seed, threads=threads, **settings)
            runs[name].append(run)
            print(f"{name:<40} seed {seed}  loss {run['eval_loss']:.4f}", end="  ")
            print(f"{run['train_tokens']:>9,} tokens  {run['wall_seconds']:6.1f} s", flush=True)
    return runs
