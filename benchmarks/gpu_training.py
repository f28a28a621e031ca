"""The training contestants of gpu.py, in turns.

Ours and those of transformers train by their Trainers, with their own way to compile and to use
bfloat16. nanoGPT's model trains in a loop of the form of its own train.py.
"""

import importlib.util
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_workers import Turns, device, synchronize, use_gpu
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_nanogpt import (
    NanoGPTForCausalLM,
    NanoGPTTrainer,
    NanoGPTTrainingArguments,
    build_optimizer,
    load_preset,
)
from hf_nanogpt.convert.native import make_native_config
from hf_nanogpt.data.packing import PackedBlocks, PackedCollator
from hf_nanogpt.flops import count_flops
from hf_nanogpt.training import trainer as trainer_module


@dataclass(frozen=True)
class Sizes:
    """How much is done: on the card, and in a rehearsal."""

    model: dict[str, int]  # of a preset
    rows: int = 16  # of `block_size` tokens at a time
    accumulation: int = 4
    warm_up: int = 2
    steps: int = 5  # in a turn, after one that does not count
    rounds: int = 3
    document: int = 500  # mean tokens of a packed document
    backend: str | None = "inductor"  # of torch.compile


CARD = Sizes({"n_layer": 12, "n_embd": 768, "n_head": 12, "block_size": 1024, "vocab_size": 50304})
TOY = Sizes(
    {"n_layer": 1, "n_embd": 32, "n_head": 2, "block_size": 32, "vocab_size": 256},
    rows=2,
    accumulation=2,
    warm_up=1,
    steps=2,
    rounds=2,
    document=10,
    backend=None,
)

# Name: the model and its optimizer; which mask the packed documents get, and by which attention.
# "causal" is the kernel's own mask without any question asked: the limit of what can be had.
NANOGPT = "nanoGPT, its own loop, AdamW"
CONTESTANTS: dict[str, dict[str, str]] = {
    "ours, nano, Muon, causal": {"model": "nano", "optim": "muon", "mask": "causal"},
    "ours, nano, Muon, documents, flex_attention": {
        "model": "nano",
        "optim": "muon",
        "mask": "documents",
        "attention": "flex_attention",
    },
    "LlamaForCausalLM, Trainer, AdamW": {"model": "llama"},
    "ours, GPT-2 shape, AdamW, causal": {"model": "gpt2", "optim": "adamw", "mask": "causal"},
    "ours, GPT-2 shape, AdamW, causal, loss from all logits": {
        "model": "gpt2",
        "optim": "adamw",
        "mask": "causal",
        "loss": "logits",
    },
    # The same step, without the gaps between four passes of a quarter of its rows.
    "ours, GPT-2 shape, AdamW, causal, all rows at once": {
        "model": "gpt2",
        "optim": "adamw",
        "mask": "causal",
        "batch": "whole",
    },
    NANOGPT: {"model": "nanogpt"},
    "GPT2LMHeadModel, Trainer, AdamW": {"model": "hf-gpt2"},
}
PROFILED = [NANOGPT, "ours, GPT-2 shape, AdamW, causal"]  # one step of them is
BASE = "ours, nano, Muon, causal"  # speeds are relative to it


def make_config(model: str, sizes: dict[str, int]) -> Any:
    """Return the configuration of a contestant."""
    settings: dict[str, Any] = {**sizes, "dropout": 0.0, "bos_token_id": None, "eos_token_id": None}
    if model in ("nano", "gpt2"):
        return load_preset(model, **settings)
    if model == "llama":  # nano without the norm of queries and keys
        return make_native_config(load_preset("nano", **settings, qk_norm=False), "llama")[1]
    if model == "qwen3":
        return make_native_config(load_preset("nano", **settings), "qwen3")[1]
    return make_native_config(load_preset("gpt2", **settings), "gpt2")[1]


def count_training_flops(model: str, sizes: dict[str, int]) -> int:
    """Return the FLOPs of training on one token, by one formula for all models of a shape."""
    shape = "nano" if model in ("nano", "llama") else "gpt2"
    with torch.device("meta"):
        return 3 * count_flops(NanoGPTForCausalLM(make_config(shape, sizes)))


class StepTimer:
    """Times steps by events on the GPU, those of the optimizer too, and waits between the turns."""

    def __init__(self, turns: Turns, sizes: Sizes, optimizer: torch.optim.Optimizer):
        self.turns, self.sizes, self.count = turns, sizes, 0
        self.total = sizes.warm_up + sizes.rounds * (1 + sizes.steps)
        self._start()
        optimizer.register_step_pre_hook(lambda *_: self.before.append(_mark()))
        optimizer.register_step_post_hook(lambda *_: self.after.append(_mark()))

    def _start(self) -> None:
        self.ends: list[Any] = []
        self.before: list[Any] = []
        self.after: list[Any] = []
        if use_gpu():
            torch.cuda.reset_peak_memory_stats()

    def end_step(self) -> None:
        self.count += 1
        self.ends.append(_mark())
        if self.count > self.total:
            self._end_profile()
        elif self.count == self.sizes.warm_up:
            self.turns.ready()
        elif self.count < self.sizes.warm_up or (self.count - self.sizes.warm_up) % (
            1 + self.sizes.steps
        ):
            return
        else:
            self.turns.report(**self._read())
        if self.count < self.total:
            self.turns.wait()
            self._start()
        else:
            self.turns.wait()
            self.profiler = torch.profiler.profile()
            self.profiler.start()

    def _end_profile(self) -> None:
        """Print what took the time of the last step into the log."""
        synchronize()
        self.profiler.stop()
        place = "cuda" if use_gpu() else "cpu"
        averages = self.profiler.key_averages()
        print(averages.table(sort_by=f"self_{place}_time_total", row_limit=40))
        self.turns.report(profiled=True)

    def _read(self) -> dict[str, Any]:
        synchronize()
        pairs = zip(self.ends, self.ends[1:], strict=False)
        optimizer = list(zip(self.before, self.after, strict=True))[1:]
        return {
            "step_ms": [_between(*pair) for pair in pairs],
            "optimizer_ms": [_between(*pair) for pair in optimizer],
            "peak_bytes": torch.cuda.max_memory_allocated() if use_gpu() else None,
        }


def _mark() -> Any:
    if not use_gpu():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    """Return the milliseconds from one mark to another."""
    return start.elapsed_time(end) if use_gpu() else 1000 * (end - start)


class _TimerCallback(TrainerCallback):
    def __init__(self, turns: Turns, sizes: Sizes):
        self.turns, self.sizes = turns, sizes

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        plain = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
        self.timer = StepTimer(self.turns, self.sizes, plain)

    def on_step_end(self, args, state, control, **kwargs):
        self.timer.end_step()


def make_blocks(sizes: Sizes, *, documents: bool) -> PackedBlocks:
    """Return blocks of random tokens, in which token 0 ends the documents."""
    length, vocab_size = sizes.model["block_size"], sizes.model["vocab_size"]
    random, count = np.random.default_rng(0), 64 * sizes.rows * sizes.accumulation
    ids = random.integers(1, vocab_size, size=count * (length - 1) + 1, dtype=np.uint16)
    if documents:
        ids[random.random(len(ids)) < 1 / sizes.document] = 0
    return PackedBlocks(lambda: [ids], context_length=length)


def collate_plain(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Make a batch of what every causal model takes, as most data collators do."""
    ids = torch.from_numpy(np.stack([row["input_ids"] for row in rows]).astype(np.int64))
    return {"input_ids": ids, "labels": ids}


def collate_causal(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The same, with a mask that is made already: None, the kernel's own."""
    return {**collate_plain(rows), "attention_mask": {"full_attention": None}}


def train_contestant(turns: Turns, *, sizes: Sizes, spec: dict[str, str], peers: str) -> None:
    """Train one of `CONTESTANTS` in turns; it ends when all rounds are done."""
    set_seed(0)
    if spec["model"] == "nanogpt":
        return train_nanogpt(turns, sizes=sizes, folder=Path(peers))
    config = make_config(spec["model"], sizes.model)
    if spec.get("batch") == "whole":
        sizes = replace(sizes, rows=sizes.rows * sizes.accumulation, accumulation=1)
    ours, mask = spec["model"] in ("nano", "gpt2"), spec.get("mask")
    if ours:
        compile_optimizer(config, spec["optim"])
    turns.hold_after_compiling()
    model: Any = NanoGPTForCausalLM(config) if ours else AutoModelForCausalLM.from_config(config)
    model.set_attn_implementation(spec.get("attention", "sdpa"))
    if spec.get("loss") == "logits":
        trainer_module.LOGITS_AT_ONCE = 2**62  # more than there are; earlier releases have none
    settings: dict[str, Any] = {
        "per_device_train_batch_size": sizes.rows,
        "gradient_accumulation_steps": sizes.accumulation,
        "max_steps": sizes.warm_up + sizes.rounds * (1 + sizes.steps) + 1,
        "bf16": use_gpu(),
        "torch_compile_backend": sizes.backend,
        "use_cpu": not use_gpu(),
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_steps": 10_000,
        "report_to": "none",
        "disable_tqdm": True,
    }
    collate: Callable = {"documents": PackedCollator(0), "causal": collate_causal}.get(
        mask or "", collate_plain
    )
    if mask == "off":
        known = {field.name for field in fields(NanoGPTTrainingArguments)}
        if "document_mask" in known:
            settings["document_mask"], collate = False, make_collator(0, document_mask=False)
    data: dict[str, Any] = {
        "train_dataset": make_blocks(sizes, documents=mask in ("documents", "off")),
        "data_collator": collate,
        "callbacks": [_TimerCallback(turns, sizes)],
    }
    with tempfile.TemporaryDirectory() as folder:
        if ours:
            settings |= {"optim_recipe": spec["optim"], "output_dir": folder}
            NanoGPTTrainer(model, NanoGPTTrainingArguments(**settings), **data).train()
        else:
            settings |= {"optim": "adamw_torch_fused", "output_dir": folder}
            Trainer(model, TrainingArguments(**settings), **data).train()


def compile_optimizer(config: Any, recipe: Any) -> None:
    """Take a step of the optimizer, so that its code is compiled before others have to wait."""
    model = NanoGPTForCausalLM(config).to(device())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    build_optimizer(model, recipe=recipe).step()


def make_collator(eos_token_id: int, *, document_mask: bool) -> PackedCollator:
    """Return our collator; releases that know `document_mask` take it as an argument."""
    names = {field.name for field in fields(PackedCollator)}
    settings = {"document_mask": document_mask} if "document_mask" in names else {}
    return PackedCollator(eos_token_id, **settings)


def train_nanogpt(turns: Turns, *, sizes: Sizes, folder: Path) -> None:
    """Train nanoGPT's model in the loop of its train.py: its batches, optimizer and clipping."""
    turns.hold_after_compiling()
    spec: Any = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    names = ("n_layer", "n_embd", "n_head", "block_size", "vocab_size")
    config = module.GPTConfig(**{name: sizes.model[name] for name in names}, bias=False)
    model = module.GPT(config).to(device())
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device().type)
    run: Any = torch.compile(model, backend=sizes.backend) if sizes.backend else model
    autocast = torch.autocast("cuda", torch.bfloat16) if use_gpu() else nullcontext()
    ids = make_blocks(sizes, documents=False).pieces[0]

    def get_batch() -> tuple[torch.Tensor, torch.Tensor]:
        starts = torch.randint(len(ids) - config.block_size, (sizes.rows,))
        pair = []
        for shift in (0, 1):
            rows = [ids[i + shift : i + shift + config.block_size] for i in starts.tolist()]
            batch = torch.stack([torch.from_numpy(row.astype(np.int64)) for row in rows])
            batch = batch.pin_memory() if use_gpu() else batch
            pair.append(batch.to(device(), non_blocking=True))
        return pair[0], pair[1]

    timer = StepTimer(turns, sizes, optimizer)
    batch = get_batch()
    for _ in range(timer.total + 1):
        for _ in range(sizes.accumulation):
            with autocast:
                _, loss = run(*batch)
                loss = loss / sizes.accumulation
            batch = get_batch()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        timer.end_step()
