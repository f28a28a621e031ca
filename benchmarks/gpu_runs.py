"""Single runs of gpu.py: Muon against AdamW on a text; what Trainer and the data loader cost."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from gpu_training import CARD, TOY
from gpu_workers import Turns, use_gpu
from torch.utils.data import DataLoader
from transformers import set_seed

from hf_nanogpt import NanoGPTForCausalLM, NanoGPTTrainer, NanoGPTTrainingArguments, load_preset
from hf_nanogpt.benchmark.overhead import measure_trainer_overhead
from hf_nanogpt.data.documents import DataArguments, load_documents
from hf_nanogpt.data.packing import PackedBlocks, PackedCollator, pack_documents
from hf_nanogpt.data.tokenization import train_tokenizer

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "Muon, default rate": {"optim_recipe": "muon"},
    **{
        f"AdamW {rate:g}": {
            "optim_recipe": "adamw",
            "learning_rate": rate,
            "warmup_steps": 0.1,
            "lr_scheduler_type": "cosine",
        }
        for rate in (2.4e-3, 1.2e-3)
    },
}


def compare_optimizers(turns: Turns, *, rehearse: bool) -> None:
    """Train the same model by each of `OPTIMIZERS`, and report the losses against the tokens."""
    sizes = TOY.model if rehearse else CARD.model
    length, steps, rows = (64, 6, 4) if rehearse else (1024, 300, 16)
    documents, held_out = load_documents(
        DataArguments(data="python-stdlib", validation_fraction=0.02)
    )
    if rehearse:
        documents, held_out = (
            Dataset.from_dict({"text": [row["text"][:1000] for row in part.select(range(4))]})
            for part in (documents, held_out)
        )
    kind, vocabulary = ("byte", 257) if rehearse else ("bpe", 4096)
    texts = documents["text"]
    tokenizer = train_tokenizer(texts, kind=kind, vocab_size=vocabulary)
    train, test = (
        pack_documents(part, tokenizer, context_length=length) for part in (documents, held_out)
    )
    settings: dict[str, Any] = {
        "per_device_train_batch_size": rows,
        "per_device_eval_batch_size": rows,
        "max_steps": steps,
        "eval_steps": 2 if rehearse else 25,
        "logging_steps": 5,
        "bf16": use_gpu(),
        "use_cpu": not use_gpu(),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    config = load_preset(
        "nano", **{**sizes, "block_size": length, "vocab_size": len(tokenizer)}, dropout=0.0
    )
    for name, chosen in OPTIMIZERS.items():
        set_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            args = NanoGPTTrainingArguments(output_dir=folder, **settings, **chosen)
            data = {"train_dataset": train, "eval_dataset": test, "processing_class": tokenizer}
            trainer = NanoGPTTrainer(NanoGPTForCausalLM(config), args, **data)
            trainer.train()
        rows_logged = [row for row in trainer.state.log_history if "eval_loss" in row]
        turns.report(
            name=name,
            tokens=[row["step"] * rows * length for row in rows_logged],
            loss=[row["eval_loss"] for row in rows_logged],
            train_loss=[row["loss"] for row in trainer.state.log_history if "loss" in row],
        )
        del trainer


def time_trainer(turns: Turns, *, rehearse: bool) -> None:
    """Report the milliseconds that our Trainer adds to a step of a plain loop, by round."""
    rounds, steps = (2, 40) if rehearse else (3, 200)
    turns.ready()
    turns.wait()
    turns.report(added_ms=measure_trainer_overhead(rounds=rounds, steps=steps))


def time_loader(turns: Turns, *, rehearse: bool) -> None:
    """Report the tokens per second of the data loader over a file that is mapped into memory."""
    batches, rows, length = (20, 4, 64) if rehearse else (200, 32, 1024)
    speeds = {}
    turns.ready()
    turns.wait()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.bin")
        size = batches * rows * (length - 1) + 1
        np.random.default_rng(0).integers(50257, size=size, dtype=np.uint16).tofile(path)
        blocks = PackedBlocks(_Mapped(path), context_length=length)
        for workers in (0, 2) if rehearse else (0, 4):
            loader: DataLoader = DataLoader(
                blocks,
                batch_size=rows,
                shuffle=True,
                collate_fn=PackedCollator(50256),
                pin_memory=use_gpu(),
                num_workers=workers,
                multiprocessing_context="fork" if workers else None,
            )
            start = time.perf_counter()
            tokens = sum(batch["input_ids"].numel() for batch in loader)
            speeds[workers] = tokens / (time.perf_counter() - start)
    turns.report(tokens_per_second=speeds)


@dataclass(frozen=True)
class _Mapped:
    """Opens a file of token ids; the workers of a loader open it again."""

    path: Path

    def __call__(self) -> list[np.ndarray]:
        return [np.memmap(self.path, dtype=np.uint16, mode="r")]
