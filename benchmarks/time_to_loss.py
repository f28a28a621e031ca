"""Tokens and time to reach a loss: our Shakespeare recipe compared with nanoGPT's.

Each run is a whole process of `hf-nanogpt train`, from start to the written checkpoint with its
one evaluation, on the tinyshakespeare text with nanoGPT's split. Rows alternate, once for each
seed. Both recipes run in our trainer. The learning rates of both were chosen on the first 90 % of
the text only, with models trained on 90 % of this part and measured on its rest (`choose`).

Run: python benchmarks/time_to_loss.py {choose,race,ablate} TEXT_FILE
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results_file import write_results

SEEDS = (1, 2, 3)
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
CHOSEN = 4e-3  # the best of RATES for nanoGPT's recipe: see results/choose.json


def peer(rate: float) -> dict[str, object]:
    """Return the settings of nanoGPT's recipe at a learning rate, which decays to a tenth."""
    return {"learning_rate": rate, "lr_scheduler_kwargs": json.dumps({"min_lr": rate / 10})}


RACE = {
    "nanoGPT's recipe, AdamW 1e-3": ("nanogpt_char", {}),
    f"nanoGPT's recipe, AdamW {CHOSEN:g} (tuned)": ("nanogpt_char", peer(CHOSEN)),
    "shakespeare_char (nano, Muon)": ("shakespeare_char", {}),
    "shakespeare_char, 450 steps": ("shakespeare_char", {"max_steps": 450}),
}
ABLATIONS = {
    "shakespeare_char": {},
    "AdamW 4e-3 for all instead of Muon": {"optim_recipe": "adamw", "learning_rate": 4e-3},
    "learned positions instead of RoPE": {"position_embedding_type": "learned"},
    "GELU instead of SwiGLU": {"mlp_type": "mlp", "hidden_act": "gelu", "intermediate_size": 512},
    "no norm of queries and keys": {"qk_norm": False},
    "head tied to the embedding": {"tie_word_embeddings": True},
    "GPT-2's initialisation": {"initializer_range": 0.02},
    "LayerNorm instead of RMSNorm": {"norm_type": "layernorm"},
    "cosine instead of linear decay": {"lr_scheduler_type": "cosine"},
}


def run_training(recipe: str, text: str | Path, *, seed: int, threads: int = 2, **settings) -> dict:
    """Train in a fresh process and return its metrics, with `wall_seconds` of the whole process."""
    with tempfile.TemporaryDirectory() as folder:
        run = {"output_dir": f"{folder}/run", "seed": seed, "num_threads": threads}
        quiet = {"eval_strategy": "no", "save_strategy": "no", "sample_steps": 0}
        flags = [f"--{name}={value}" for name, value in (run | quiet | settings).items()]
        command = [sys.executable, "-m", "hf_nanogpt", "train", recipe, f"--data={text}", *flags]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - started
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
        metrics = json.loads((Path(folder) / "run" / "metrics.json").read_text())
    kept = ("eval_loss", "bits_per_byte", "num_parameters", "train_steps", "train_tokens")
    stepping = metrics["train_tokens"] / metrics["tokens_per_second"]
    times = {"step_seconds": round(stepping, 2), "wall_seconds": round(seconds, 2)}
    return {name: metrics[name] for name in kept} | times


def race(text: Path) -> dict[str, list[dict]]:
    """Run each row of `RACE` once for each seed, alternating."""
    runs: dict[str, list[dict]] = {name: [] for name in RACE}
    for seed in SEEDS:
        for name, (recipe, settings) in RACE.items():
            runs[name].append(run_training(recipe, text, seed=seed, **settings))
            _show(name, seed, runs[name][-1])
    return runs


def choose(text: Path) -> dict[str, list[dict]]:
    """Run both recipes at several learning rates on the part of the text kept for choosing."""
    rows: dict[str, tuple] = {
        f"nanogpt_char {rate:g}": ("nanogpt_char", peer(rate)) for rate in RATES
    }
    for rate in (0.02, 0.03, 0.04):
        rows[f"shakespeare_char {rate:g}"] = ("shakespeare_char", {"learning_rate": rate})
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part.txt"
        characters = text.read_text(encoding="utf-8")
        part.write_text(characters[: int(len(characters) * 0.9)], encoding="utf-8")
        return _run_rows(rows, part, seeds=SEEDS[:1])


def ablate(text: Path) -> dict[str, list[dict]]:
    """Change one part of our recipe at a time; the optimizer changes with its settings."""
    return _run_rows(
        {name: ("shakespeare_char", row) for name, row in ABLATIONS.items()}, text, seeds=SEEDS
    )


def _run_rows(rows: dict[str, tuple], text: Path, *, seeds: tuple[int, ...]) -> dict:
    runs: dict[str, list[dict]] = {name: [] for name in rows}
    for name, (recipe, settings) in rows.items():
        for seed in seeds:
            runs[name].append(run_training(recipe, text, seed=seed, threads=1, **settings))
            _show(name, seed, runs[name][-1])
    return runs


def _show(name: str, seed: int, run: dict) -> None:
    print(
        f"{name:<42} seed {seed}  loss {run['eval_loss']:.4f}  {run['train_tokens']:>9,} tokens  "
        f"{run['wall_seconds']:6.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    tasks = {"choose": choose, "race": race, "ablate": ablate}
    if len(sys.argv) != 3 or sys.argv[1] not in tasks or not os.path.isfile(sys.argv[2]):
        sys.exit(f"usage: python {sys.argv[0]} {{choose,race,ablate}} TEXT_FILE")
    write_results(sys.argv[1], {"runs": tasks[sys.argv[1]](Path(sys.argv[2]))})
