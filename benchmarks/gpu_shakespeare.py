"""Whole processes to nanoGPT's loss on the characters of Shakespeare: ours and its own train.py.

Both read the same text and hold out the same last tenth. Ours reports the loss on all of it,
nanoGPT the mean of 200 random batches of it, every 250 iterations.
"""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from gpu_workers import Turns, say, use_gpu

ROOT = Path(__file__).parents[1]
RECIPE = "shakespeare_char_gpu"
TARGET = 1.4697  # of nanoGPT's README
_TOY: dict[str, Any] = {
    "n_layer": 1,
    "n_embd": 32,
    "n_head": 2,
    "block_size": 64,
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "sample_steps": 0,
    "torch_compile": False,
}


def clean_environment() -> dict[str, str]:
    """Return the environment that a user's own process would have."""
    ours = "TORCHINDUCTOR_COMPILE_THREADS"
    kept = {name: value for name, value in os.environ.items() if name != ours}
    return kept | {"PYTHONPATH": str(ROOT)}


def train_ours(text: Path, folder: Path, *, rehearse: bool, **settings: Any) -> dict[str, Any]:
    """Train by the recipe in a process of its own, and return its loss and wall-clock time."""
    settings = (_TOY | {"bf16": False, "use_cpu": True} if rehearse else {}) | settings
    if rehearse:
        settings["max_steps"] = _TOY["max_steps"]
    flags = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "hf_nanogpt", "train", RECIPE, f"--data={text}", *flags]
    command += [f"--output_dir={folder}"]
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-1500:]}")
    metrics = json.loads((folder / "metrics.json").read_text())
    shutil.rmtree(folder)
    return {
        "seconds": seconds,
        "loss": metrics["eval_loss"],
        "bits_per_byte": metrics["bits_per_byte"],
        "steps": metrics["train_steps"],
        "tokens": metrics["train_tokens"],
        "training_seconds": metrics["train_tokens"] / metrics["tokens_per_second"],
        "settings": settings,
    }


def time_ours(turns: Turns, *, text: str, folder: str, rehearse: bool) -> None:
    """Report a run of the recipe with nothing else at work, for each order of other settings."""
    turns.ready()
    while True:
        settings = turns.wait()
        turns.report(**train_ours(Path(text), Path(folder), rehearse=rehearse, **settings))


def prepare_nanogpt(peers: Path, text: Path, folder: Path) -> Path:
    """Copy nanoGPT, and write the files that its prepare.py makes of the text."""
    shutil.copytree(peers, folder, dirs_exist_ok=True)
    place = folder / "data" / "shakespeare_char"
    place.mkdir(parents=True, exist_ok=True)
    characters = text.read_text(encoding="utf-8")
    alphabet = sorted(set(characters))
    numbers = {character: number for number, character in enumerate(alphabet)}
    ids = np.array([numbers[character] for character in characters], dtype=np.uint16)
    cut = int(len(ids) * 0.9)
    ids[:cut].tofile(place / "train.bin")
    ids[cut:].tofile(place / "val.bin")
    meta = {"vocab_size": len(alphabet), "stoi": numbers, "itos": dict(enumerate(alphabet))}
    (place / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


def time_nanogpt(turns: Turns, *, peers: str, text: str, folder: str, rehearse: bool) -> None:
    """Run nanoGPT's train.py until it reports the target, or for the seconds of its order."""
    turns.ready()
    limit = turns.wait()
    place = prepare_nanogpt(Path(peers), Path(text), Path(folder))
    flags = [] if use_gpu() else ["--device=cpu", "--compile=False"]
    if rehearse:
        flags += ["--max_iters=4", "--eval_interval=2", "--eval_iters=2", "--log_interval=1"]
        flags += ["--n_layer=1", "--n_embd=32", "--n_head=2", "--block_size=64", "--batch_size=4"]
    command = [sys.executable, "-u", "train.py", "config/train_shakespeare_char.py", *flags]
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=place,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    timer = threading.Timer(limit, process.kill)
    timer.start()
    losses, iterations, lines = [], [], []
    reached = None
    for line in process.stdout or ():
        lines.append(line)
        seconds = time.perf_counter() - start
        if found := re.match(r"step (\d+): .*val loss ([\d.]+)", line):
            losses.append({"step": int(found[1]), "loss": float(found[2]), "seconds": seconds})
            say(f"nanoGPT: {line.strip()}, {seconds:.0f} s after its start")
            if float(found[2]) <= TARGET and not rehearse:
                reached = seconds
                process.kill()
        elif found := re.match(r"iter (\d+): .*time ([\d.]+)ms", line):
            iterations.append(float(found[2]))
    process.wait()
    timer.cancel()
    if not losses or (process.returncode > 0):
        raise RuntimeError("".join(lines)[-1500:])
    # The first iterations compile, and those after an evaluation have its time too.
    milliseconds = median(iterations) if iterations else None
    turns.report(
        seconds=reached,
        reached=reached is not None,
        loss=min(row["loss"] for row in losses),
        losses=losses,
        iteration_ms=milliseconds,
        stopped_after=time.perf_counter() - start,
        steps=losses[-1]["step"],
        tokens=losses[-1]["step"] * 64 * 256,
    )
