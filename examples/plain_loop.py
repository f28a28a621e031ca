"""The training loop in plain PyTorch and Accelerate, with nothing hidden.

`NanoGPTTrainer` gives the same losses, step by step. It adds checkpoints, resuming, evaluation and
all the flags of Trainer. Run: python examples/plain_loop.py [TEXT_FILE]
"""

import sys
from collections.abc import Iterator

from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase, get_scheduler

from hf_nanogpt import (
    NanoGPTConfig,
    NanoGPTForCausalLM,
    PackedCollator,
    build_optimizer,
    load_preset,
    load_text,
    pack_documents,
    train_tokenizer,
)


def train(
    config: NanoGPTConfig,
    blocks: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    steps: int,
    batch_size: int = 16,
    seed: int = 42,
) -> Iterator[float]:
    """Train a model on packed blocks and yield the loss of each step."""
    set_seed(seed)
    model = NanoGPTForCausalLM(config).train()
    optimizer = build_optimizer(model)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=steps)
    collate = PackedCollator(tokenizer.eos_token_id)
    loader: DataLoader = DataLoader(blocks, batch_size=batch_size, shuffle=True, collate_fn=collate)
    seeded = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(dataloader_config=seeded)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    step = 0
    while True:  # epochs
        for batch in loader:
            if step == steps:
                return
            loss = model(**batch, use_cache=False).loss
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            yield loss.item()


if __name__ == "__main__":
    documents = load_text(sys.argv[1] if len(sys.argv) > 1 else "python-stdlib")
    tokenizer = train_tokenizer((row["text"] for row in documents), vocab_size=1024)
    config = load_preset("nano", n_layer=4, n_embd=128, n_head=4, block_size=128, vocab_size=1024)
    blocks = pack_documents(documents, tokenizer, context_length=128)
    for step, loss in enumerate(train(config, blocks, tokenizer, steps=100), start=1):
        print(f"step {step:>3}  loss {loss:.4f}", flush=True)
