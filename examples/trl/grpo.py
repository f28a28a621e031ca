"""Let a chat checkpoint try answers and learn from their rewards, with TRL's GRPOTrainer.

The model answers each question several times. Answers with a higher reward than the group's mean
become more likely. The reward can be any function of the answers; here it is higher for short ones.

Run: python examples/trl/grpo.py CHECKPOINT OUTPUT_DIR [QUESTIONS.jsonl]
"""

import sys
from typing import Any

import torch
from datasets import Dataset, load_dataset
from trl import GRPOConfig, GRPOTrainer

from hf_nanogpt import load_checkpoint

QUESTIONS = [f"What is the capital of {name}?" for name in ("France", "Italy", "Japan", "Peru")]


def load_questions(path: str | None = None) -> Dataset:
    """Return the rows of a table with a column `prompt` (messages), or example questions."""
    if path:
        return load_dataset("json", data_files=path, split="train")
    return Dataset.from_list([{"prompt": [{"role": "user", "content": q}]} for q in QUESTIONS])


def reward_brevity(completions: list[list[dict]], **columns: Any) -> list[float]:
    """Return 0 for an empty answer, and -1 for every ten characters of a longer one."""
    return [-len(answer["content"]) / 10 for [answer] in completions]


def main(checkpoint: str, output_dir: str, data: str | None = None, **settings: Any) -> GRPOTrainer:
    model, tokenizer = load_checkpoint(checkpoint)
    args = GRPOConfig(
        output_dir,
        max_completion_length=model.config.max_position_embeddings // 4,
        **{
            "learning_rate": 3e-4,
            "num_train_epochs": 10,
            "per_device_train_batch_size": 16,
            "num_generations": 8,
            "logging_steps": 1,
            "bf16": torch.cuda.is_available(),
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "report_to": "none",
            **settings,
        },
    )
    trainer = GRPOTrainer(
        model,
        reward_brevity,
        args=args,
        train_dataset=load_questions(data),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
