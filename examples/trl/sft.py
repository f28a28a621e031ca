"""Fine-tune a checkpoint on conversations with TRL's SFTTrainer; the loss counts answers only.

Several conversations share a row (packing). Each has its own positions, so that they do not see
each other. `hf-nanogpt train finetune --data CHAT.jsonl --chat_template chatml` does the same
without TRL (add `--lora` for an adapter); this script accepts all settings of SFTConfig.

Run: python examples/trl/sft.py CHECKPOINT OUTPUT_DIR [CHAT.jsonl]
"""

import sys
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from hf_nanogpt import add_chat_template, load_checkpoint

SUMS = [(f"What is {a} plus {b}?", f"It is {a + b}.") for a in range(10) for b in range(10)]


def load_conversations(path: str | None = None) -> Dataset:
    """Return the rows of a table with a column `messages`, or questions about sums."""
    if path:
        return load_dataset("json", data_files=path, split="train")
    roles = ("user", "assistant")
    chats = [[{"role": r, "content": c} for r, c in zip(roles, s, strict=True)] for s in SUMS]
    return Dataset.from_list([{"messages": chat} for chat in chats])


def main(
    checkpoint: str,
    output_dir: str,
    data: str | None = None,
    *,
    lora: bool = False,
    **settings: Any,
) -> SFTTrainer:
    model, tokenizer = load_checkpoint(checkpoint)
    known = len(tokenizer)
    add_chat_template(tokenizer, model=model)  # keeps one that is there
    args = SFTConfig(
        output_dir,
        assistant_only_loss=True,
        packing=True,
        max_length=model.config.max_position_embeddings,
        **{
            "learning_rate": 1e-3,
            "num_train_epochs": 3,
            "bf16": torch.cuda.is_available(),
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "report_to": "none",
            **settings,
        },
    )
    # Adapters do not train the embedding, but the rows of new tokens must be trained.
    tables = ["embed_tokens", "lm_head"] if len(tokenizer) > known else None
    adapters = LoraConfig(
        target_modules="all-linear",
        modules_to_save=tables,
        ensure_weight_tying=bool(tables) and model.config.tie_word_embeddings,
    )
    trainer = SFTTrainer(
        model,
        args,
        train_dataset=load_conversations(data),
        processing_class=tokenizer,
        peft_config=adapters if lora else None,
    )
    trainer.train()
    model = trainer.model.merge_and_unload() if lora else trainer.model
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
