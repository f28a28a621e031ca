"""The speed of generation, ours and others with the same weights in turns."""

import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    StoppingCriteria,
    set_seed,
)

from ..analysis.info import load_config
from ..checkpoint.folder import load_model
from ..convert import export_checkpoint, find_native_twin
from ..errors import UserError
from ..generation import compiled_decoding
from ..modeling_nanogpt import NanoGPTForCausalLM
from ..presets import PRESETS, load_preset
from ..quantization import multiplies_exactly, quantize_model
from .contestants import PlainGPT
from .report import check_counts, describe_machine, summarize

OURS, COMPILED, PLAIN = "ours", "ours, compiled", "nanoGPT's way, no cache"
INT8, INT8_COMPILED = "ours, int8", "ours, int8, compiled"
# About 10 M parameters in the shape of GPT-2.
SIZES = {"n_layer": 6, "n_embd": 384, "n_head": 6, "block_size": 1024, "vocab_size": 2048}
Generate = Callable[[torch.Tensor, int], tuple[torch.Tensor, list[float]]]


def benchmark_generation(
    model: str | None = None,
    *,
    batch_size: int = 1,
    rounds: int = 5,
    tokens: int = 16,
    compile: bool = False,
    num_threads: int | None = None,
    show_progress: bool = False,
    **sizes: int,
) -> dict[str, Any]:
    """Time greedy `generate()` of ours, of its native twin in transformers, and without a cache.

    All of them continue the same random prompts in turns, so that a change of the machine's load
    meets them all; float32 on the CPU, and ours with int8 weights besides.

    Args:
        model: a checkpoint folder or a Hub id, or a preset, whose weights are then random; by
            default a GPT-2 of `SIZES`.
        batch_size: prompts at a time.
        rounds: how often each has its turn at each length.
        tokens: tokens timed in a turn, the last of the text; their median counts.
        compile: ours by torch.compile with a static cache too; each length takes minutes more.
        num_threads: CPU threads for torch from now on; by default as many as cores.
        sizes: those of a preset, replaced; of a checkpoint they cannot be.

    Returns:
        The report, ready for JSON. A row of its `rows` has the seconds per token by text length and
        round, `tokens_per_second` by length (medians, all rows of the batch together),
        `speed_to_ours` (least, median and largest of the rounds), `bandwidth_share` (bytes of
        weights and cache read for a token over what these threads can read, by length) and
        `same_tokens`, the share of ours in float32.

    Raises:
        UserError: a number is out of range, or there is no `model`.
    """
    settings = {"batch_size": batch_size, "rounds": rounds, "tokens": tokens}
    check_counts(settings, num_threads)
    set_seed(0)
    ours = _load(model, sizes)
    limit = ours.config.max_position_embeddings
    lengths = [n for n in (64, 128, 256, 512, 1024) if tokens + 2 <= n <= limit] or [limit]
    if lengths[0] < tokens + 2:
        raise UserError(
            f"tokens={tokens} do not fit: the model's context is {limit}, and a prompt and a first "
            f"token come before them; give {max(limit - 2, 1)} or fewer."
        )
    machine, contestants = describe_machine(), _make_contestants(ours, compile=compile)
    prompts = {n: torch.randint(ours.config.vocab_size, (batch_size, n)) for n in lengths}
    with torch.inference_mode():
        seconds, texts, warm_up = _take_turns(
            {name: generate for name, (generate, _) in contestants.items()},
            {n: prompt[:, : n - tokens - 1] for n, prompt in prompts.items()},
            tokens=tokens,
            rounds=rounds,
            show_progress=show_progress,
        )
    read = measure_bandwidth(sum(p.numel() for p in ours.parameters()))
    rows = [
        {
            "name": name,
            "tokens_per_second": {n: batch_size / median(s) for n, s in seconds[name].items()},
            "speed_to_ours": summarize(_compare(seconds[OURS], seconds[name])),
            "bandwidth_share": None
            if weights is None
            else {
                n: (weights + batch_size * n * _count_cache_bytes(ours)) / median(s) / read
                for n, s in seconds[name].items()
            },
            "same_tokens": None if name == PLAIN else _agree(texts[OURS], texts[name]),
            "warm_up_seconds": warm_up[name],
            "seconds_per_token": seconds[name],
        }
        for name, (_, weights) in contestants.items()
    ]
    return {
        "benchmark": "generate",
        "machine": machine,
        "model": model or "a GPT-2 with random weights",
        "parameters": ours.num_parameters(),
        "settings": settings | sizes,
        "bytes_per_second": read,
        "rows": rows,
    }


def _load(model: str | None, sizes: dict[str, int]) -> PreTrainedModel:
    if model is None or model in PRESETS:
        # The Muon initialisation has a head of zeros: all would write token 0 and look the same.
        fields = {"bos_token_id": None, "eos_token_id": None, "initializer_range": 0.02}
        fields |= ({} if model else SIZES) | sizes
        return NanoGPTForCausalLM(load_preset(model or "gpt2", **fields)).eval()
    if sizes:
        raise UserError(f"{next(iter(sizes))} is for presets: {model} has its own sizes.")
    load_config(model)  # says what is wrong, and which presets there are
    return load_model(model).float()


def _make_contestants(
    ours: PreTrainedModel, *, compile: bool
) -> dict[str, tuple[Generate, int | None]]:
    """Return by name a way to generate, and the bytes of weights that a token has to read."""
    weights = sum(p.numel() for p in ours.parameters())
    tables = [ours.model.embed_tokens, ours.model.embed_positions]
    weights -= sum(t.weight.numel() for t in tables if t is not None)
    if ours.config.tie_word_embeddings:
        weights += ours.lm_head.weight.numel()
    contestants: dict[str, tuple[Generate, int | None]] = {OURS: (_by_generate(ours), 4 * weights)}
    if compile:
        contestants[COMPILED] = (_by_generate(ours, **compiled_decoding()), 4 * weights)
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(Path(folder, "ours"))
        if find_native_twin(ours.config) is not None:
            export_checkpoint(Path(folder, "ours"), Path(folder, "twin"))
            twin = load_model(Path(folder, "twin"))
            contestants[type(twin).__name__] = (_by_generate(twin), 4 * weights)
        rounded = load_model(Path(folder, "ours"))
    if multiplies_exactly():  # else int8 weights are refused on this processor
        contestants[INT8] = (_by_generate(quantize_model(rounded)), weights)
    if compile and multiplies_exactly():
        contestants[INT8_COMPILED] = (_by_generate(rounded, **compiled_decoding()), weights)
    contestants[PLAIN] = (_without_cache(PlainGPT(ours.config).eval()), None)
    return contestants


class _Clock(StoppingCriteria):
    """Notes the time after each token, and never stops."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.marks.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def _by_generate(model: PreTrainedModel, **given: Any) -> Generate:
    def generate(prompt: torch.Tensor, tokens: int) -> tuple[torch.Tensor, list[float]]:
        clock = _Clock()
        greedy = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        mask = torch.ones_like(prompt)
        text = model.generate(
            prompt,
            attention_mask=mask,
            max_new_tokens=tokens,
            stopping_criteria=[clock],
            **greedy,
            **given,
        )
        return text, clock.marks

    return generate


def _without_cache(model: PlainGPT) -> Generate:
    def generate(prompt: torch.Tensor, tokens: int) -> tuple[torch.Tensor, list[float]]:
        text, marks = prompt, []
        for _ in range(tokens):
            next_token = model.predict_next(text).argmax(dim=-1, keepdim=True)
            text = torch.cat((text, next_token), dim=1)
            marks.append(time.perf_counter())
        return text, marks

    return generate


def _take_turns(
    generate_of: dict[str, Generate],
    prompts: dict[int, torch.Tensor],
    *,
    tokens: int,
    rounds: int,
    show_progress: bool,
) -> tuple[dict[str, dict[int, list[float]]], dict[str, list[torch.Tensor]], dict[str, float]]:
    """Return the seconds of a token by name, length and round; the texts; seconds to warm up."""
    seconds: dict[str, dict[int, list[float]]] = {
        name: {n: [] for n in prompts} for name in generate_of
    }
    texts: dict[str, list[torch.Tensor]] = {name: [] for name in generate_of}
    warm_up = dict.fromkeys(generate_of, 0.0)
    total = len(prompts) * (rounds + 1) * len(generate_of)
    with tqdm(total=total, desc="Generating", disable=not show_progress) as bar:
        for n, prompt in prompts.items():
            for turn in range(rounds + 1):
                for name, generate in generate_of.items():
                    start = time.perf_counter()
                    # Without a cache a token takes long, and each as long as the next.
                    text, marks = generate(prompt, min(tokens, 3) if name == PLAIN else tokens + 1)
                    if turn == 0:
                        warm_up[name] += time.perf_counter() - start
                        texts[name].append(text[:, prompt.shape[1] :])
                    else:
                        # The first token waits for the prompt; without a cache all of them do.
                        given = [start, *marks] if name == PLAIN else marks
                        gaps = [later - sooner for sooner, later in pairwise(given)]
                        seconds[name][n].append(median(gaps))
                    bar.update()
    return seconds, texts, warm_up


def _compare(ours: dict[int, list[float]], own: dict[int, list[float]]) -> list[float]:
    """Return, by round, how fast `own` writes the texts of all lengths, `ours` being 1."""
    a, b = ([sum(turn) for turn in zip(*s.values(), strict=True)] for s in (ours, own))
    return [x / y for x, y in zip(a, b, strict=True)]


def _agree(ours: list[torch.Tensor], own: list[torch.Tensor]) -> float:
    same = [(a == b).float().mean().item() for a, b in zip(ours, own, strict=True)]
    return sum(same) / len(same)


def _count_cache_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of keys and values that a token leaves for each later one to read."""
    config = model.config
    return 4 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def measure_bandwidth(numbers: int, *, rounds: int = 9) -> float:
    """Return the bytes a second at which a product with a vector reads so many float32 numbers."""
    width = min(1024, numbers)
    matrix, vector = torch.ones(numbers // width, width), torch.ones(width)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        torch.mv(matrix, vector)
        times.append(time.perf_counter() - start)
    return 4 * matrix.numel() / min(times)


def format_generation(report: dict[str, Any]) -> str:
    """Return the report of `benchmark_generation` as a table to print."""
    lengths = list(report["rows"][0]["tokens_per_second"])
    head = "".join(f"{n:>8}" for n in lengths)
    lines = [
        f"tokens a second, the text being so long ({report['model']}, "
        f"{report['parameters'] / 1e6:,.1f} M parameters):",
        f"{'':<25}{head}  bandwidth  same tokens   speed, ours = 1",
    ]
    for row in report["rows"]:
        speeds = "".join(f"{row['tokens_per_second'][n]:>8,.1f}" for n in lengths)
        share = row["bandwidth_share"]
        used = "" if share is None else f"{median(share.values()):.0%}"
        same = "" if row["same_tokens"] is None else f"{row['same_tokens']:.0%}"
        least, middle, largest = row["speed_to_ours"]
        ratio = "1" if row["name"] == OURS else f"{middle:.3f} ({least:.3f} to {largest:.3f})"
        lines.append(f"{row['name']:<25}{speeds}{used:>11}{same:>13}   {ratio}")
    warm_up = ", ".join(f"{r['name']} {r['warm_up_seconds']:.1f} s" for r in report["rows"])
    notes = {
        "settings": ", ".join(f"{name} {value}" for name, value in report["settings"].items()),
        "bandwidth": f"{report['bytes_per_second'] / 1e9:,.1f} GB/s in matrix-vector products",
        "warm-up": warm_up,
        "machine": ", ".join(f"{k} {v}" for k, v in report["machine"].items() if v is not None),
    }
    lines += ["", *(f"{name:<10} {note}" for name, note in notes.items())]
    if (load := report["machine"]["load_average"]) > 1:
        lines.append(f"Other programs ran too (load average {load}): repeat it when they do not.")
    return "\n".join(lines)


def plot_generation(report: dict[str, Any], path: Path) -> None:
    """Draw tokens per second against the length of the text, with the range of the rounds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(7.2, 4.2), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes, batch = figure.subplots(), report["settings"]["batch_size"]
    for row in report["rows"]:
        turns = [sorted(batch / s for s in times) for times in row["seconds_per_token"].values()]
        lengths = [int(n) for n in row["seconds_per_token"]]
        axes.plot(lengths, [median(turn) for turn in turns], marker="o", label=row["name"])
        axes.fill_between(lengths, [t[0] for t in turns], [t[-1] for t in turns], alpha=0.15)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_ylim(bottom=0)
    axes.set(xlabel="tokens of text, prompt included", ylabel="tokens per second")
    machine = report["machine"]
    axes.set_title(f"{machine['cpu']}, {machine['threads']} threads, batch {batch}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)
