"""Train a reward model, which scores an answer with one number, with TRL's RewardTrainer.

The model is a `NanoGPTForSequenceClassification` with the weights of a chat checkpoint. A row of
the data has two whole conversations, `chosen` and `rejected`.

Run: python examples/trl/reward.py CHECKPOINT OUTPUT_DIR [PREFERENCES.jsonl]
"""

import sys
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

import hf_nanogpt  # noqa: F401 (registers the model with the Auto classes)

CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Peru": "Lima"}


def load_preferences(path: str | None = None) -> Dataset:
    """Return the rows of a table, or examples that prefer an answer to none."""
    if path:
        return load_dataset("json", data_files=path, split="train")

    def chat(country: str, answer: str) -> list[dict]:
        question = {"role": "user", "content": f"What is the capital of {country}?"}
        return [question, {"role": "assistant", "content": answer}]

    rows = [
        {"chosen": chat(country, f"It is {city}."), "rejected": chat(country, "No idea.")}
        for country, city in CAPITALS.items()
    ]
    return Dataset.from_list(rows)


def main(
    checkpoint: str, output_dir: str, data: str | None = None, **settings: Any
) -> RewardTrainer:
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    args = RewardConfig(
        output_dir,
        max_length=model.config.max_position_embeddings,
        **{
            "learning_rate": 3e-4,
            "num_train_epochs": 10,
            "logging_steps": 1,
            "bf16": torch.cuda.is_available(),
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "report_to": "none",
            **settings,
        },
    )
    trainer = RewardTrainer(
        model, args=args, train_dataset=load_preferences(data), processing_class=tokenizer
    )
    trainer.train()
    trainer.model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
