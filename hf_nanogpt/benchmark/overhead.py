"""What Trainer and the data loader add to the training step."""

import tempfile
from statistics import median
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, get_scheduler

from ..configuration_nanogpt import NanoGPTConfig
from ..data.packing import PackedBlocks, PackedCollator
from ..data.tokenization import train_tokenizer
from ..modeling_nanogpt import NanoGPTForCausalLM
from ..presets import load_preset
from ..training.arguments import NanoGPTTrainingArguments
from ..training.optim import build_optimizer
from ..training.trainer import NanoGPTTrainer
from .turns import Clock


def measure_trainer_overhead(*, rounds: int = 5, steps: int = 100) -> list[float]:
    """Return the milliseconds that `NanoGPTTrainer` adds to each step of a plain loop, by round.

    The model is so small that the difference shows; the loop is that of examples/plain_loop.py.
    """
    tokenizer = train_tokenizer([], kind="byte")
    eos = tokenizer.eos_token_id
    ids = {"vocab_size": 257, "bos_token_id": eos, "eos_token_id": eos, "pad_token_id": eos}
    config = load_preset("nano", n_layer=1, n_embd=32, n_head=1, block_size=32, **ids)
    blocks = _random_blocks(8 * steps, 32)
    added = []
    for _ in range(rounds):
        plain = _run_plain_loop(config, blocks, tokenizer, steps)
        added.append(1000 * (_run_trainer(config, blocks, tokenizer, steps) - plain))
    return added


def measure_batches(batch_size: int, context_length: int, *, rounds: int = 5) -> list[float]:
    """Return the milliseconds to fetch and collate a batch, by round."""
    batches = 20
    loader = _make_loader(_random_blocks(batches * batch_size, context_length), batch_size, 0)
    clock = Clock()
    for _ in range(rounds):
        for _batch in loader:
            pass
        clock()
    return [1000 * seconds / batches for seconds in clock.seconds()]


def _random_blocks(count: int, length: int) -> PackedBlocks:
    size = count * (length - 1) + 1
    ids = np.random.default_rng(0).integers(257, size=size, dtype=np.uint16)
    return PackedBlocks(lambda: [ids], context_length=length)


def _make_loader(blocks: PackedBlocks, batch_size: int, eos_token_id: int) -> DataLoader:
    collate = PackedCollator(eos_token_id)
    return DataLoader(blocks, batch_size=batch_size, shuffle=True, collate_fn=collate)


def _run_trainer(
    config: NanoGPTConfig, blocks: PackedBlocks, tokenizer: PreTrainedTokenizerBase, steps: int
) -> float:
    """Return the seconds of a step."""
    clock, model = Clock(), NanoGPTForCausalLM(config)
    settings: dict[str, Any] = {"max_steps": steps, "optim_recipe": "adamw", "max_grad_norm": 0.0}
    settings |= {"eval_strategy": "no", "save_strategy": "no", "logging_steps": 10}
    data: dict[str, Any] = {"train_dataset": blocks, "processing_class": tokenizer}
    with tempfile.TemporaryDirectory() as folder:
        args = NanoGPTTrainingArguments(output_dir=folder, disable_tqdm=True, **settings)
        NanoGPTTrainer(model, args, callbacks=[clock], **data).train()
    return _find_step_seconds(clock)


def _run_plain_loop(
    config: NanoGPTConfig, blocks: PackedBlocks, tokenizer: PreTrainedTokenizerBase, steps: int
) -> float:
    model = NanoGPTForCausalLM(config).train()
    optimizer = build_optimizer(model, recipe="adamw")
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=steps)
    accelerator = Accelerator()
    loader = _make_loader(blocks, 8, tokenizer.eos_token_id)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    clock = Clock()
    for batch in loader:
        accelerator.backward(model(**batch, use_cache=False).loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        clock()
    return _find_step_seconds(clock)


def _find_step_seconds(clock: Clock) -> float:
    """Return the seconds of a step: the median of tens, as Trainer logs once in ten steps."""
    return float(median(np.diff(clock.marks[10::10]))) / 10
