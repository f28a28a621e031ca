"""The speed of a training step: ours and others of the same shape, in turns."""

import copy
from collections.abc import Callable
from statistics import median
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from ..analysis.info import load_config
from ..configuration_nanogpt import NanoGPTConfig
from ..flops import count_flops, find_peak
from .contestants import GPT2, NANO, make_contestants
from .overhead import measure_batches, measure_trainer_overhead
from .report import describe_machine
from .turns import Clock, check_counts, compare_speeds, summarize, take_turns

# The sizes of the recipe quickstart.
SIZES = {"n_layer": 4, "n_embd": 192, "n_head": 3, "block_size": 256, "vocab_size": 2048}


def benchmark_training(
    model: str | None = None,
    *,
    batch_size: int = 8,
    rounds: int = 5,
    steps: int = 4,
    compile: bool = False,
    bf16: bool = False,
    num_threads: int | None = None,
    show_progress: bool = False,
    **sizes: int,
) -> dict[str, Any]:
    """Time training steps (forward, backward, fused AdamW) of ours and others of the same shape.

    All of them take the same batch in the same process, in turns, so that a change in the machine's
    load affects all of them; without dropout, in eager PyTorch with its SDPA kernels.

    Args:
        model: use the sizes of this preset, checkpoint folder or Hub id; by default `SIZES`.
        rounds: how many turns of `steps` steps each has.
        compile: also run each with `torch.compile`, which takes minutes to start.
        bf16: compute in bfloat16 with autocast.
        num_threads: CPU threads for torch from now on; by default one for each core.
        sizes: replace any of `SIZES` or of the sizes of `model`.

    Returns:
        The report, ready for JSON. Its `rows` have `tokens_per_second` (median of the rounds),
        `mfu` (see `find_peak`) and `speed_to_ours`: minimum, median and maximum of each round's
        ratio to ours of the same shape. Milliseconds are minimum, median and maximum, too.

    Raises:
        UserError: a number is out of range, the sizes do not fit together, or `model` does not
            exist.
    """
    settings = {"batch_size": batch_size, "rounds": rounds, "steps": steps}
    check_counts(settings, num_threads)
    sizes = SIZES | ({} if model is None else _read_sizes(model)) | sizes
    machine, models = describe_machine(), make_contestants(sizes)
    flops = {name: 3 * count_flops(cast(PreTrainedModel, models[name])) for name in (NANO, GPT2)}
    if compile:
        for name, module in list(models.items()):
            models[f"{name}, compiled"] = compiled = copy.deepcopy(module)
            compiled.compile()
    device, dtype = Accelerator().device, torch.bfloat16 if bf16 else torch.float32
    tokens = torch.randint(sizes["vocab_size"], (batch_size, sizes["block_size"]), device=device)
    step_of = {name: _make_step(module, tokens, bf16=bf16) for name, module in models.items()}

    seconds: dict[str, list[float]] = {name: [] for name in step_of}
    peaks: list[float] = []
    turns = take_turns(step_of, rounds, description="Steps", show_progress=show_progress)
    for turn, name in turns:
        if turn == 0:  # allocate memory, and compile
            _time(step_of[name], 2)
            continue
        if name == NANO and (peak := find_peak(device, dtype)):  # once in each round
            peaks.append(peak)
        seconds[name].append(_time(step_of[name], steps))

    middle_peak = median(peaks) if peaks else None
    return {
        "benchmark": "train",
        "machine": machine,
        "settings": sizes | settings | {"bf16": bf16},
        "flops_per_token": flops,
        "peak_flops": middle_peak,
        "rows": [_make_row(name, seconds, tokens.numel(), flops, middle_peak) for name in seconds],
        "trainer_overhead_ms": summarize(measure_trainer_overhead(rounds=rounds)),
        "batch_ms": summarize(measure_batches(batch_size, sizes["block_size"], rounds=rounds)),
    }


def _read_sizes(model: str) -> dict[str, int]:
    config = load_config(model)
    return {name: getattr(config, NanoGPTConfig.attribute_map.get(name, name)) for name in SIZES}


def _make_step(model: nn.Module, tokens: torch.Tensor, *, bf16: bool) -> Callable[[], None]:
    model.to(tokens.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _time(step: Callable[[], None], steps: int) -> float:
    """Return the mean seconds of a step."""
    clock = Clock()
    for _ in range(steps):
        step()
    if torch.accelerator.is_available():  # it works asynchronously: wait until it has finished
        torch.accelerator.synchronize()
    clock()
    return sum(clock.seconds()) / steps


def _make_row(
    name: str,
    seconds: dict[str, list[float]],
    tokens: int,
    flops: dict[str, int],
    peak: float | None,
) -> dict[str, Any]:
    shape = NANO if name.startswith((NANO, "Llama")) else GPT2
    speed = tokens / median(seconds[name])
    return {
        "name": name,
        "compared_with": shape,
        "tokens_per_second": speed,
        "mfu": peak and speed * flops[shape] / peak,
        "speed_to_ours": compare_speeds(seconds[shape], seconds[name]),
        "seconds_per_step": seconds[name],
    }
