"""The speed of a training step, ours and others of the same shape in turns."""

import copy
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from ..analysis.info import load_config
from ..configuration_nanogpt import NanoGPTConfig
from ..flops import count_flops, find_peak
from .contestants import GPT2, NANO, make_contestants
from .overhead import measure_batches, measure_trainer_overhead
from .report import check_counts, describe_machine, summarize

# Those of the recipe quickstart.
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

    All of them take the same batch in the same process, in turns, so that a change of the machine's
    load meets them all; without dropout, by eager PyTorch with its SDPA kernels.

    Args:
        model: a preset, a checkpoint folder or a Hub id whose sizes to take; by default `SIZES`.
        rounds: how often each has its turn of `steps` steps.
        compile: each again by `torch.compile`, whose start takes minutes.
        bf16: compute in bfloat16 by autocast.
        num_threads: CPU threads for torch from now on; by default as many as cores.
        sizes: any of `SIZES`, which win over those of `model`.

    Returns:
        The report, ready for JSON. Its `rows` have `tokens_per_second` (median of the rounds),
        `mfu` (see `find_peak`) and `speed_to_ours`: least, median and largest of the rounds' ratios
        to ours of the same shape. Milliseconds beside them are least, median and largest too.

    Raises:
        UserError: a number is out of range, the sizes do not fit together, or there is no `model`.
    """
    settings = {"batch_size": batch_size, "rounds": rounds, "steps": steps}
    check_counts(settings, num_threads)
    sizes = SIZES | ({} if model is None else _read_sizes(model)) | sizes
    machine, models = describe_machine(), make_contestants(sizes)
    flops = {name: 3 * count_flops(models[name]) for name in (NANO, GPT2)}
    if compile:
        models |= {f"{name}, compiled": _compile(module) for name, module in models.items()}
    device, dtype = Accelerator().device, torch.bfloat16 if bf16 else torch.float32
    tokens = torch.randint(sizes["vocab_size"], (batch_size, sizes["block_size"]), device=device)
    seconds, peak = _take_turns(
        {name: _make_step(module, tokens, bf16=bf16) for name, module in models.items()},
        rounds=rounds,
        steps=steps,
        measure_peak=lambda: find_peak(device, dtype),
        show_progress=show_progress,
    )
    rows = [
        _make_row(name, seconds, tokens=tokens.numel(), flops=flops, peak=peak) for name in seconds
    ]
    return {
        "benchmark": "train",
        "machine": machine,
        "settings": sizes | settings | {"bf16": bf16},
        "flops_per_token": flops,
        "peak_flops": peak,
        "rows": rows,
        "trainer_overhead_ms": summarize(measure_trainer_overhead(rounds=rounds)),
        "batch_ms": summarize(measure_batches(batch_size, sizes["block_size"], rounds=rounds)),
    }


def _make_row(
    name: str,
    seconds: dict[str, list[float]],
    *,
    tokens: int,
    flops: dict[str, int],
    peak: float | None,
) -> dict[str, Any]:
    shape = NANO if name.startswith((NANO, "Llama")) else GPT2
    speed = tokens / median(seconds[name])
    ratios = [ours / own for ours, own in zip(seconds[shape], seconds[name], strict=True)]
    return {
        "name": name,
        "compared_with": shape,
        "tokens_per_second": speed,
        "mfu": peak and speed * flops[shape] / peak,
        "speed_to_ours": summarize(ratios),
        "seconds_per_step": seconds[name],
    }


def _read_sizes(model: str) -> dict[str, int]:
    config = load_config(model)
    return {name: getattr(config, NanoGPTConfig.attribute_map.get(name, name)) for name in SIZES}


def _compile(module: nn.Module) -> nn.Module:
    compiled = copy.deepcopy(module)
    compiled.compile()
    return compiled


def _take_turns(
    step_of: dict[str, Callable[[], None]],
    *,
    rounds: int,
    steps: int,
    measure_peak: Callable[[], float | None],
    show_progress: bool,
) -> tuple[dict[str, list[float]], float | None]:
    """Return the seconds of a step by name and round, and the median of the peaks between."""
    seconds: dict[str, list[float]] = {name: [] for name in step_of}
    peaks = []
    with tqdm(total=(rounds + 1) * len(step_of), desc="Steps", disable=not show_progress) as bar:
        for step in step_of.values():  # warm up: allocate, and compile
            _time(step, 2)
            bar.update()
        for _ in range(rounds):
            peaks.append(measure_peak())
            for name, step in step_of.items():
                seconds[name].append(_time(step, steps))
                bar.update()
    known = [peak for peak in peaks if peak is not None]
    return seconds, median(known) if known else None


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
    """Return the seconds of one of `steps` steps."""
    _wait()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    _wait()
    return (time.perf_counter() - start) / steps


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
