"""The speed of generation: ours and others with the same weights, in turns."""

import copy
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any, cast

import torch
from transformers import PreTrainedModel, set_seed

from ..analysis.info import load_config
from ..checkpoint.loading import load_model
from ..configuration_nanogpt import NanoGPTConfig
from ..convert import export_checkpoint, find_native_format
from ..errors import UserError
from ..generation import compiled_decoding
from ..modeling_nanogpt import NanoGPTForCausalLM
from ..presets import PRESETS, load_preset
from ..quantization import multiplies_exactly, quantize_model
from .contestants import PlainGPT
from .report import describe_machine
from .turns import Clock, check_counts, compare_speeds, take_turns

OURS, COMPILED, PLAIN = "ours", "ours, compiled", "nanoGPT's way, no cache"
INT8, INT8_COMPILED = "ours, int8", "ours, int8, compiled"
# About 10 M parameters in the shape of GPT-2.
SIZES = {"n_layer": 6, "n_embd": 384, "n_head": 6, "block_size": 1024, "vocab_size": 2048}
_LENGTHS = (64, 128, 256, 512, 1024)
_GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@dataclass
class Contestant:
    """A model that generates text, the settings of its `generate()`, and what was measured."""

    name: str
    model: Any  # a PreTrainedModel or a PlainGPT
    weight_bytes: int | None = None  # read for each token; None without a cache
    settings: dict[str, Any] = field(default_factory=dict)
    warm_up_seconds: float = 0.0
    texts: list[torch.Tensor] = field(default_factory=list)  # of the warm-up, for each length
    seconds: dict[int, list[float]] = field(default_factory=dict)  # of a token: length -> rounds

    def time(self, prompt: torch.Tensor, tokens: int) -> tuple[torch.Tensor, float, float]:
        """Return the new tokens (B, N), the seconds for one of them, and the seconds for all.

        With a cache, the first token waits for the prompt, so it does not count. Without one, every
        token takes as long as the first, so three are enough.
        """
        cached = not isinstance(self.model, PlainGPT)
        clock = Clock()
        text = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens + 1 if cached else min(tokens, 3),
            stopping_criteria=[clock],
            **_GREEDY,
            **self.settings,
        )
        seconds = clock.seconds()
        return text[:, prompt.shape[1] :], median(seconds[1:] if cached else seconds), sum(seconds)


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
    """Time greedy `generate()` of ours, of its native equivalent, and generation without a cache.

    All of them continue the same random prompts in turns, so that a change in the machine's load
    affects all of them. They compute in float32 on the CPU; ours also runs with int8 weights.

    Args:
        model: a checkpoint folder or a Hub id, or a preset with random weights; by default a GPT-2
            with `SIZES`.
        batch_size: prompts at a time.
        rounds: how many turns each has at each length.
        tokens: how many tokens to time in a turn, the last of the text; their median counts.
        compile: also run ours with torch.compile and a static cache; this takes minutes more for
            each length.
        num_threads: CPU threads for torch from now on; by default one for each core.
        sizes: replace sizes of a preset; a checkpoint's sizes cannot be replaced.

    Returns:
        The report, ready for JSON. Each of its `rows` has the seconds per token by text length and
        round, `tokens_per_second` by length (medians, for the whole batch), `speed_to_ours`
        (minimum, median and maximum of the rounds), `bandwidth_share` by length (bytes of weights
        and cache read for a token, divided by what these threads can read) and `same_tokens`, the
        share of tokens that are the same as those of ours in float32.

    Raises:
        UserError: a number is out of range, or `model` does not exist.
    """
    settings = {"batch_size": batch_size, "rounds": rounds, "tokens": tokens}
    check_counts(settings, num_threads)
    set_seed(0)
    our_model = _load(model, sizes)
    lengths = _choose_lengths(our_model, tokens)
    machine = describe_machine()
    contestants = _make_contestants(our_model, compile=compile)
    for length in lengths:
        ids = torch.randint(our_model.config.vocab_size, (batch_size, length))
        prompt = ids[:, : length - tokens - 1]
        description = f"Texts of {length} tokens"
        turns = take_turns(
            contestants, rounds, description=description, show_progress=show_progress
        )
        for turn, contestant in turns:
            with torch.inference_mode():
                text, seconds, total = contestant.time(prompt, tokens)
            if turn == 0:
                contestant.warm_up_seconds += total
                contestant.texts.append(text)
            else:
                contestant.seconds.setdefault(length, []).append(seconds)
    bandwidth = measure_bandwidth(our_model.num_parameters())
    cache_bytes = batch_size * _count_cache_bytes(our_model)
    return {
        "benchmark": "generate",
        "machine": machine,
        "model": model or "a GPT-2 with random weights",
        "parameters": our_model.num_parameters(),
        "settings": settings | sizes,
        "bytes_per_second": bandwidth,
        "rows": [
            _make_row(contestant, contestants[0], batch_size, cache_bytes, bandwidth)
            for contestant in contestants
        ],
    }


def _load(model: str | None, sizes: dict[str, int]) -> PreTrainedModel:
    if model is None or model in PRESETS:
        # The Muon initialisation has a head of zeros, so that every model would write token 0.
        fields = {"bos_token_id": None, "eos_token_id": None, "initializer_range": 0.02}
        fields |= ({} if model else SIZES) | sizes
        return NanoGPTForCausalLM(load_preset(model or "gpt2", **fields)).eval()
    if sizes:
        raise UserError(f"{next(iter(sizes))} is for presets only: {model} has its own sizes.")
    load_config(model)  # its error lists the presets
    return load_model(model).float()


def _choose_lengths(model: PreTrainedModel, tokens: int) -> list[int]:
    """Return the text lengths that the model's context allows, at least one."""
    limit = model.config.max_position_embeddings
    lengths = [n for n in _LENGTHS if tokens + 2 <= n <= limit] or [limit]
    if lengths[0] < tokens + 2:
        raise UserError(
            f"tokens={tokens} do not fit: the model's context is {limit}, and a prompt and a first "
            f"token come before them. Use {max(limit - 2, 1)} or fewer."
        )
    return lengths


def _make_contestants(ours: PreTrainedModel, *, compile: bool) -> list[Contestant]:
    weights, config = _count_weights(ours), cast(NanoGPTConfig, ours.config)
    contestants = [Contestant(OURS, ours, 4 * weights)]
    if compile:
        contestants.append(Contestant(COMPILED, ours, 4 * weights, compiled_decoding()))
    if find_native_format(config) is not None:
        with tempfile.TemporaryDirectory() as folder:
            ours.save_pretrained(Path(folder, "ours"))
            export_checkpoint(Path(folder, "ours"), Path(folder, "native"))
            native = load_model(Path(folder, "native"))
        contestants.append(Contestant(type(native).__name__, native, 4 * weights))
    if multiplies_exactly():  # otherwise int8 weights do not work on this processor
        rounded = quantize_model(copy.deepcopy(ours))
        contestants.append(Contestant(INT8, rounded, weights))
        if compile:
            contestants.append(Contestant(INT8_COMPILED, rounded, weights, compiled_decoding()))
    return [*contestants, Contestant(PLAIN, PlainGPT(config).eval())]


def _count_weights(model: PreTrainedModel) -> int:
    """Return how many weights are read for each token: not the tables that a token looks up."""
    tables = [model.model.embed_tokens, model.model.embed_positions]
    if model.config.tie_word_embeddings:  # then this table is the head as well
        tables = tables[1:]
    return model.num_parameters() - sum(t.weight.numel() for t in tables if t is not None)


def _count_cache_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of keys and values in the cache for each token of a text."""
    config = model.config
    return 4 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def _make_row(
    contestant: Contestant, ours: Contestant, batch_size: int, cache_bytes: int, bandwidth: float
) -> dict[str, Any]:
    typical = {length: median(seconds) for length, seconds in contestant.seconds.items()}
    share = same = None
    if contestant.weight_bytes is not None:
        share = {
            length: (contestant.weight_bytes + length * cache_bytes) / seconds / bandwidth
            for length, seconds in typical.items()
        }
        pairs = zip(ours.texts, contestant.texts, strict=True)
        same = fmean((a == b).float().mean().item() for a, b in pairs)
    return {
        "name": contestant.name,
        "tokens_per_second": {n: batch_size / seconds for n, seconds in typical.items()},
        "speed_to_ours": compare_speeds(_sum_rounds(ours), _sum_rounds(contestant)),
        "bandwidth_share": share,
        "same_tokens": same,
        "warm_up_seconds": contestant.warm_up_seconds,
        "seconds_per_token": contestant.seconds,
    }


def _sum_rounds(contestant: Contestant) -> list[float]:
    """Return the seconds of each round, all lengths together."""
    return [sum(seconds) for seconds in zip(*contestant.seconds.values(), strict=True)]


def measure_bandwidth(numbers: int, *, rounds: int = 9) -> float:
    """Return the bytes per second read by a product of a vector with this many float32 numbers."""
    width = min(1024, numbers)
    matrix, vector = torch.ones(numbers // width, width), torch.ones(width)
    clock = Clock()
    for _ in range(rounds):
        torch.mv(matrix, vector)
        clock()
    return 4 * matrix.numel() / min(clock.seconds())
