"""Part 3: build a nano-GPT and train it in seconds on a text with a known entropy.

Run: python examples/tutorial/part3_train.py [FOLDER]
"""

import math
import random
import sys
from itertools import islice

import torch
from datasets import Dataset, disable_progress_bars
from torch.utils.data import DataLoader

from hf_nanogpt import (
    NanoGPTForCausalLM,
    PackedCollator,
    build_optimizer,
    evaluate,
    load_preset,
    pack_documents,
    train_tokenizer,
)

FOLDER = "runs/tutorial"
ANIMALS = ["owl", "fox", "hen", "cat"]
VERBS = ["sees", "hears", "follows", "greets"]
PLACES = ["by the river", "under the moon", "in the barn", "on the hill"]


def write_sentences(count: int, *, seed: int) -> Dataset:
    """Write sentences with four random choices among four words each: exactly 8 bits."""
    pick = random.Random(seed).choice
    rows = [
        f"the {pick(ANIMALS)} {pick(VERBS)} the {pick(ANIMALS)} {pick(PLACES)}."
        for _ in range(count)
    ]
    return Dataset.from_dict({"text": rows})


def train(model: NanoGPTForCausalLM, loader: DataLoader, *, steps: int) -> None:
    """Take `steps` optimizer steps, and print the loss now and then."""
    optimizer = build_optimizer(model)
    rates = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    model.train()
    batches = (batch for _ in range(steps) for batch in loader)  # as many epochs as it takes
    for step, batch in enumerate(islice(batches, steps), start=1):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        if step in (1, 10) or step % 25 == 0:
            print(f"  step {step:>3}  loss {loss.item():.3f} nats per token")
    model.eval()


def main(folder: str = FOLDER, steps: int = 100) -> None:
    disable_progress_bars()
    torch.manual_seed(0)
    # The data, and a tokenizer and a model for it.
    sentences, unseen = write_sentences(2000, seed=0), write_sentences(200, seed=1)
    tokenizer = train_tokenizer(sentences["text"], vocab_size=310)
    ids = {f"{name}_token_id": tokenizer.eos_token_id for name in ("bos", "eos", "pad")}
    size = {"n_layer": 2, "n_embd": 64, "n_head": 4, "block_size": 64}
    model = NanoGPTForCausalLM(load_preset("nano", vocab_size=len(tokenizer), **size, **ids))
    print(f"{len(tokenizer)} tokens, {len(model.model.layers)} blocks, ", end="")
    print(f"{model.num_parameters():,} parameters")
    print("a document:", tokenizer.tokenize(sentences[0]["text"]))

    # Documents packed into blocks of one length, and what the model makes of a batch.
    blocks = pack_documents(sentences, tokenizer, context_length=64)
    collate = PackedCollator(tokenizer.eos_token_id)
    batch = next(iter(DataLoader(blocks, batch_size=16, collate_fn=collate)))
    print("input", tuple(batch["input_ids"].shape), "-> logits", end=" ")
    print(tuple(model(**batch, use_cache=False).logits.shape))

    # The loss on unseen sentences, before and after training.
    loss = evaluate(model, unseen, tokenizer=tokenizer).loss
    print(f"before: loss {loss:.3f}; a uniform guess scores", end=" ")
    print(f"ln {len(tokenizer)} = {math.log(len(tokenizer)):.3f}")
    train(model, DataLoader(blocks, 16, shuffle=True, collate_fn=collate), steps=steps)
    result = evaluate(model, unseen, tokenizer=tokenizer)
    floor = 8 * len(unseen) / result.num_bytes
    print(f"after: {result.bits_per_byte:.3f} bits per byte of unseen sentences;", end=" ")
    print(f"their entropy is {floor:.3f}, and no model can do better")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"saved to {folder}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
