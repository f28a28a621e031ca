"""Teach a chat checkpoint which of two answers is preferred, with TRL's DPOTrainer.

A row has a `prompt` (messages), and the answers `chosen` and `rejected`. The log-probabilities of
the reference model are computed at the start, so that no second model stays in memory.

Run: python examples/trl/dpo.py CHECKPOINT OUTPUT_DIR [PREFERENCES.jsonl]
"""

import sys
from typing import Any

import torch
from datasets import Dataset, load_dataset
from trl import DPOConfig, DPOTrainer

from hf_nanogpt import load_checkpoint

CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Peru": "Lima"}


def load_preferences(path: str | None = None) -> Dataset:
    """Return the rows of a table, or examples that prefer a short answer to a long one."""
    if path:
        return load_dataset("json", data_files=path, split="train")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is the capital of {country}?"}],
            "chosen": [{"role": "assistant", "content": f"{city}."}],
            "rejected": [{"role": "assistant", "content": f"The capital is called {city}."}],
        }
        for country, city in CAPITALS.items()
    ]
    return Dataset.from_list(rows)


def main(checkpoint: str, output_dir: str, data: str | None = None, **settings: Any) -> DPOTrainer:
    model, tokenizer = load_checkpoint(checkpoint)
    args = DPOConfig(
        output_dir,
        max_length=model.config.max_position_embeddings,
        **{
            "precompute_ref_log_probs": True,
            "learning_rate": 1e-4,
            "num_train_epochs": 10,
            "logging_steps": 1,
            "bf16": torch.cuda.is_available(),
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "report_to": "none",
            **settings,
        },
    )
    trainer = DPOTrainer(
        model, args=args, train_dataset=load_preferences(data), processing_class=tokenizer
    )
    trainer.train()
    trainer.model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
