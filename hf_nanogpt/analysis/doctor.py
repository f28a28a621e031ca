"""Check that this installation gives right results, and describe it for a bug report.

Each check compares a model with something that does not share its faults: the model without a
cache, the model before a later token was changed, the equivalent class of transformers, and a saved
copy.
"""

import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from .. import __version__
from ..auto import TESTED_TRANSFORMERS
from ..checkpoint.loading import load_checkpoint
from ..configuration_nanogpt import NanoGPTConfig
from ..convert import export_checkpoint, find_native_format
from ..errors import one_line
from ..flops import name_processor
from ..modeling_nanogpt import NanoGPTForCausalLM
from ..presets import load_preset

_LIBRARIES = "torch transformers accelerate datasets tokenizers safetensors huggingface-hub numpy"
_EXTRAS = ("finetune", "serve", "demo", "eval", "gguf", "onnx", "track")
# Weights are drawn from a normal distribution wide enough for every part to matter.
_TINY: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
_TINY |= {"vocab_size": 97, "n_layer": 3, "n_embd": 32, "n_head": 4, "block_size": 64}
_TINY |= {"initializer_range": 0.3, "dropout": 0.0}
# Together they have all parts: rotary and learned positions, grouped and sliding attention.
_MODELS: dict[str, dict[str, Any]] = {
    "nano": {"num_key_value_heads": 2},
    "gpt2": {},
    "gpt3-125m": {
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
}
# How far a float32 logit may move, in standard deviations of all logits, if the same sums are
# computed in another order.
_TOLERANCE = 1e-4

Result = tuple[bool, str]  # whether it is right, and what was found


@dataclass(frozen=True)
class Finding:
    """One check of one model: whether it passed, and what was found."""

    model: str
    check: str
    is_right: bool
    detail: str


def describe_environment() -> dict[str, str]:
    """Return versions, processor or GPU, threads and extras, to print."""
    tested = f"tested with {TESTED_TRANSFORMERS[0]} to {TESTED_TRANSFORMERS[-1]}"
    facts = {"hf_nanogpt": __version__, "Python": f"{platform.python_version()} ({sys.platform})"}
    facts |= {name: _version(name) for name in _LIBRARIES.split()}
    facts["transformers"] += f" ({tested})"
    facts["processor"] = f"{name_processor()}, {torch.backends.cpu.get_cpu_capability()}"
    facts["threads"] = f"{torch.get_num_threads()} of {os.cpu_count()}"
    facts["accelerator"] = _name_accelerator()
    missing = {extra: _find_missing(extra) for extra in _EXTRAS}
    facts["extras"] = ", ".join(name for name in _EXTRAS if not missing[name]) or "none"
    if absent := [f"{name} ({', '.join(what)})" for name, what in missing.items() if what]:
        facts["extras that lack a package"] = ", ".join(absent)
    return facts


def check_installation(checkpoint: str | Path | None = None) -> Iterator[Finding]:
    """Yield the findings for a checkpoint, or for three tiny models that together have all parts.

    Raises:
        UserError: the checkpoint cannot be loaded.
    """
    if checkpoint is not None:
        model, _ = load_checkpoint(checkpoint)
        yield from check_model(Path(checkpoint).name, model.float())
        return
    with torch.random.fork_rng(devices=[]):
        for preset, overrides in _MODELS.items():
            torch.manual_seed(0)
            config = load_preset(preset, **(_TINY | overrides))
            yield from check_model(f"tiny {preset}", NanoGPTForCausalLM(config).eval())


@torch.no_grad()
def check_model(name: str, model: PreTrainedModel) -> Iterator[Finding]:
    """Yield the finding of each check; an exception in a check is a finding, too.

    If all logits are almost equal, as in an untrained model, only that is reported.
    """
    length = min(24, model.config.max_position_embeddings // 2)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (2, length), generator=generator)
    ids = ids.to(model.device)
    for label, check in _CHECKS.items():
        try:
            is_right, detail = check(model, ids)
        except Exception as error:  # whatever is wrong here is what we are looking for
            is_right, detail = False, f"{type(error).__name__}: {one_line(error)}"
        yield Finding(name, label, is_right, detail)
        if check is _check_spread and not is_right:  # any two flat models agree
            return


def _check_spread(model: PreTrainedModel, ids: torch.Tensor) -> Result:
    spread = _logits(model, ids).std().item()
    hint = "" if spread > 1 else "; at most 1 proves nothing: train this model first"
    return spread > 1, f"standard deviation {spread:.2f}{hint}"


def _check_cache(model: PreTrainedModel, ids: torch.Tensor) -> Result:
    cache, first = DynamicCache(config=model.config), ids.shape[1] // 2
    pieces = [_logits(model, ids[:, :first], past_key_values=cache)]
    pieces += [_logits(model, x, past_key_values=cache) for x in ids[:, first:].split(1, dim=1)]
    return _compare(torch.cat(pieces, dim=1), _logits(model, ids))


def _check_generate(model: PreTrainedModel, ids: torch.Tensor) -> Result:
    new = min(16, model.config.max_position_embeddings - ids.shape[1])
    settings = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}
    settings["attention_mask"] = torch.ones_like(ids)
    generator: Any = model  # PreTrainedModel does not declare generate
    cached, uncached = (generator.generate(ids, use_cache=use, **settings) for use in (True, False))
    equal = int((cached == uncached)[:, -new:].sum())
    return equal == 2 * new, f"{equal} of {2 * new} tokens equal"


def _check_leak(model: PreTrainedModel, ids: torch.Tensor) -> Result:
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % model.config.vocab_size
    difference = (_logits(model, ids) - _logits(model, changed)).abs().amax(dim=(0, 2))
    earlier, last = difference[:-1].max().item(), difference[-1].item()
    detail = f"earlier logits change by {earlier:.2g}, the last by {last:.2g}"
    return earlier == 0 and last > 0, detail


def _check_native(model: PreTrainedModel, ids: torch.Tensor) -> Result:
    if (name := find_native_format(cast(NanoGPTConfig, model.config))) is None:
        return True, "no class of transformers has this architecture; not compared"
    with tempfile.TemporaryDirectory() as folder:
        ours, exported = Path(folder, "ours"), Path(folder, "native")
        model.save_pretrained(ours)
        export_checkpoint(ours, exported, to=name)
        native: Any = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=False)
    is_right, detail = _compare(_logits(model, ids), _logits(native.to(ids.device).eval(), ids))
    return is_right, f"{type(native).__name__}, {detail}"


def _check_copy(model: PreTrainedModel, ids: torch.Tensor) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        copy: Any = type(model).from_pretrained(folder, trust_remote_code=False)
    difference = (_logits(copy.to(ids.device).eval(), ids) - _logits(model, ids)).abs().max().item()
    return difference == 0, f"largest difference {difference:.2g}"


_CHECKS: dict[str, Callable[[PreTrainedModel, torch.Tensor], Result]] = {
    "logits are spread enough to prove something": _check_spread,
    "cached logits equal uncached": _check_cache,
    "generate gives the same text with and without a cache": _check_generate,
    "no token sees the future": _check_leak,
    "logits equal those of transformers' own class": _check_native,
    "a saved copy gives the same logits": _check_copy,
}


def _logits(model: PreTrainedModel, ids: torch.Tensor, **cache: Any) -> torch.Tensor:
    return model(ids, **cache or {"use_cache": False}).logits.float()


def _compare(found: torch.Tensor, expected: torch.Tensor) -> Result:
    difference = ((found - expected).abs().max() / expected.std()).item()
    return difference <= _TOLERANCE, f"largest difference {difference:.1e} standard deviations"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _find_missing(extra: str, package: str = "hf-nanogpt") -> list[str]:
    """Return which packages of an extra, and of the extras that it names, are not installed."""
    missing = []
    for requirement in requires(package) or []:
        spec, _, condition = requirement.partition(";")
        found = re.match(r"([\w.-]+)(?:\[([\w,. -]+)\])?", spec.strip())
        if not found or condition.replace("'", '"').strip() != f'extra == "{extra}"':
            continue
        name, inner_extras = found[1], found[2] or ""
        if _version(name) == "not installed":
            missing.append(name)
        else:
            for inner in filter(None, map(str.strip, inner_extras.split(","))):
                missing += _find_missing(inner, name)
    return missing


def _name_accelerator() -> str:
    if torch.cuda.is_available():
        cards = {torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())}
        return f"{torch.cuda.device_count()} x {', '.join(cards)}, CUDA {torch.version.cuda}"
    return "mps" if torch.backends.mps.is_available() else "none"
