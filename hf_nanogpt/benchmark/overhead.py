"""What stands around the training step: Trainer, and the data loader."""

import tempfile
import time

import numpy as np
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import TrainerCallback, get_scheduler

from ..data.packing import PackedBlocks, PackedCollator
from ..data.tokenization import train_tokenizer
from ..modeling_nanogpt import NanoGPTForCausalLM
from ..presets import load_preset
from ..training.arguments import NanoGPTTrainingArguments
from ..training.optim import build_optimizer
from ..training.trainer import NanoGPTTrainer


def measure_trainer_overhead(*, rounds: int = 5, steps: int = 100) -> list[float]:
    """Return the milliseconds that `NanoGPTTrainer` adds to each step of a plain loop, by round.

    Measured with a model so small that they can be seen; the loop is that of
    examples/plain_loop.py.
    """
    tokenizer = train_tokenizer([], kind="byte")
    eos = tokenizer.eos_token_id
    ids = {"vocab_size": 257, "bos_token_id": eos, "eos_token_id": eos, "pad_token_id": eos}
    config = load_preset("nano", n_layer=1, n_embd=32, n_head=1, block_size=32, **ids)
    blocks = _random_blocks(8 * steps, 32, vocab_size=257)
    added = []
    for _ in range(rounds):
        plain = _run_plain_loop(config, blocks, tokenizer, steps)
        added.append(1000 * (_run_trainer(config, blocks, tokenizer, steps) - plain))
    return added


def measure_batches(batch_size: int, context_length: int, *, rounds: int = 5) -> list[float]:
    """Return the milliseconds to fetch and collate a batch, by round."""
    blocks = _random_blocks(20 * batch_size, context_length, vocab_size=257)
    loader: DataLoader = DataLoader(
        blocks, batch_size=batch_size, shuffle=True, collate_fn=PackedCollator(0)
    )
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        count = sum(1 for _ in loader)
        times.append(1000 * (time.perf_counter() - start) / count)
    return times


def _random_blocks(count: int, length: int, *, vocab_size: int) -> PackedBlocks:
    size = count * (length - 1) + 1
    ids = np.random.default_rng(0).integers(vocab_size, size=size, dtype=np.uint16)
    return PackedBlocks(lambda: [ids], context_length=length)


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.marks.append(time.perf_counter())

    def seconds(self) -> float:
        """Return the seconds of a step: the median of tens, each with one line of the log."""
        return float(np.median(np.diff(self.marks[9::10]))) / 10


def _run_trainer(config, blocks, tokenizer, steps: int) -> float:
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = NanoGPTTrainingArguments(
            output_dir=folder,
            max_steps=steps,
            optim_recipe="adamw",
            max_grad_norm=0.0,
            eval_strategy="no",
            save_strategy="no",
            logging_steps=10,
            disable_tqdm=True,
        )
        trainer = NanoGPTTrainer(
            NanoGPTForCausalLM(config),
            args,
            train_dataset=blocks,
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.train()
    return clock.seconds()


def _run_plain_loop(config, blocks, tokenizer, steps: int) -> float:
    clock = _Clock()
    model = NanoGPTForCausalLM(config).train()
    optimizer = build_optimizer(model, recipe="adamw")
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=steps)
    collate = PackedCollator(tokenizer.eos_token_id)
    loader: DataLoader = DataLoader(blocks, batch_size=8, shuffle=True, collate_fn=collate)
    accelerator = Accelerator()
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        accelerator.backward(model(**batch, use_cache=False).loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        clock.marks.append(time.perf_counter())
    return clock.seconds()
