"""A trainer keeps no cache, which changes neither what is saved nor what is learnt."""

import json
from itertools import pairwise

import pytest
import torch
from conftest import cache_of, tiny_model
from datasets import Dataset
from transformers import AutoModelForCausalLM

from hf_nanogpt import (
    NanoGPTTrainer,
    NanoGPTTrainingArguments,
    pack_documents,
    train,
    train_tokenizer,
)

DOCUMENTS = ["a first document, of some words", "the second", "and a third one that is longer"] * 4


def run(tmp_path, *, use_cache):
    tokenizer = train_tokenizer([], kind="byte")
    blocks = pack_documents(Dataset.from_dict({"text": DOCUMENTS}), tokenizer, context_length=40)
    model = tiny_model(vocab_size=len(tokenizer)).train()
    args = NanoGPTTrainingArguments(
        output_dir=str(tmp_path / str(use_cache)),
        use_cache=use_cache,
        max_steps=3,
        per_device_train_batch_size=len(blocks),  # so that their order does not matter
        eval_strategy="no",
        logging_steps=1,
        learning_rate=0.01,
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = NanoGPTTrainer(model, args, train_dataset=blocks, processing_class=tokenizer)
    trainer.train()
    return trainer, tokenizer


def test_packed_documents_are_trained_apart_whether_or_not_a_cache_is_kept(tmp_path):
    losses = []
    for use_cache in (False, True):
        trainer, tokenizer = run(tmp_path, use_cache=use_cache)
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    # The first loss, by an oracle: each document of each row on its own.
    model = tiny_model(vocab_size=len(tokenizer))
    batch = next(iter(trainer.get_train_dataloader()))
    total, count = 0.0, 0
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        eos = (ids == tokenizer.eos_token_id).nonzero().flatten().tolist()
        for start, end in pairwise(sorted({0, *eos, len(ids)})):
            with torch.no_grad():
                logits = model(ids[None, start:end]).logits[0]
            # The last token of a document predicts the first of the next, where there is one.
            targets = labels[start + 1 : end + 1]
            kept = targets != -100
            logits = logits[: len(targets)][kept]
            total += torch.nn.functional.cross_entropy(logits, targets[kept], reduction="sum")
            count += int(kept.sum())
    assert losses[0][0] == pytest.approx(float(total) / count, rel=1e-4)


def test_a_trained_checkpoint_keeps_the_models_own_use_cache(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(DOCUMENTS * 20), encoding="utf-8")
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 32}
    folder = tmp_path / "run"
    train(
        data=str(text), output_dir=str(folder), tokenizer="byte", max_steps=2, save_steps=1, **sizes
    )
    for path in (folder, folder / "checkpoint-1"):
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        assert config.get("use_cache", True) is True, path
        model = AutoModelForCausalLM.from_pretrained(path)
        assert cache_of(model(torch.tensor([[1, 2, 3]]))).get_seq_length() == 3
