"""Check that this installation gives right results, and describe it for a bug report.

Each check compares a model with something that does not share its faults: the model without a
cache, the model before a later token was changed, the class of transformers that computes the same,
and a saved copy.
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
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from .. import __version__
from ..auto import TESTED_TRANSFORMERS
from ..checkpoint.folder import load_checkpoint
from ..convert import export_checkpoint, find_native_twin
from ..modeling_nanogpt import NanoGPTForCausalLM
from ..presets import load_preset

_LIBRARIES = (
    *("torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors"),
    *("huggingface-hub", "numpy"),
)
_EXTRAS = ("finetune", "serve", "demo", "eval", "gguf", "onnx", "track")
_TINY: dict[str, Any] = {
    "vocab_size": 97,
    "n_layer": 3,
    "n_embd": 32,
    "n_head": 4,
    "block_size": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.3,
    "dropout": 0.0,
}
# The parts that a family of models may have: rotary and learned positions, grouped and sliding
# attention. Weights are drawn from a normal distribution wide enough that no part is too quiet.
_MODELS: dict[str, dict[str, Any]] = {
    "nano": {"num_key_value_heads": 2},
    "gpt2": {},
    "gpt3-125m": {
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
}
# Of a logit in float32, relative to the standard deviation of all: what another order of the same
# sums may change.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Finding:
    """One thing that was checked: of which model, what was found, and whether that is right."""

    model: str
    check: str
    is_right: bool
    detail: str


def describe_environment() -> dict[str, str]:
    """Return versions, processor or GPU, threads and extras, to print."""
    tested = f"tested with {TESTED_TRANSFORMERS[0]} to {TESTED_TRANSFORMERS[-1]}"
    facts = {"hf_nanogpt": __version__, "Python": f"{platform.python_version()} ({sys.platform})"}
    facts |= {name: _version(name) for name in _LIBRARIES}
    facts["transformers"] += f" ({tested})"
    facts["processor"] = f"{_name_processor()}, {torch.backends.cpu.get_cpu_capability()}"
    facts["threads"] = f"{torch.get_num_threads()} of {os.cpu_count()}"
    facts["accelerator"] = _name_accelerator()
    missing = {extra: _find_missing(extra) for extra in _EXTRAS}
    facts["extras"] = ", ".join(name for name in _EXTRAS if not missing[name]) or "none"
    if absent := [f"{name} ({', '.join(what)})" for name, what in missing.items() if what]:
        facts["extras that lack a package"] = ", ".join(absent)
    return facts


def check_installation(checkpoint: str | Path | None = None) -> Iterator[Finding]:
    """Yield what is found of a checkpoint, or of three tiny models that have all parts.

    Raises:
        UserError: the checkpoint cannot be loaded.
    """
    if checkpoint is not None:
        model, _ = load_checkpoint(checkpoint)
        yield from check_model(Path(str(checkpoint)).name, model.float())
        return
    with torch.random.fork_rng(devices=[]):
        for preset, overrides in _MODELS.items():
            torch.manual_seed(0)
            config = load_preset(preset, **(_TINY | overrides))
            yield from check_model(f"tiny {preset}", NanoGPTForCausalLM(config).eval())


@torch.no_grad()
def check_model(name: str, model: PreTrainedModel) -> Iterator[Finding]:
    """Yield what each check finds; an exception in one of them is a finding, too.

    A model whose logits are almost equal, such as an untrained one, is checked for that alone.
    """
    length = min(24, model.config.max_position_embeddings // 2)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (2, length), generator=generator)
    ids = ids.to(model.device)
    for label, check in _CHECKS.items():
        try:
            is_right, detail = check(model, ids)
        except Exception as error:  # a fault to report like the others
            is_right, detail = False, f"{type(error).__name__}: {' '.join(str(error).split())}"
        yield Finding(name, label, is_right, detail)
        if check is _check_spread and not is_right:  # any two flat models agree
            return


def _check_spread(model: PreTrainedModel, ids: torch.Tensor) -> tuple[bool, str]:
    spread = _logits(model, ids).std().item()
    hint = "" if spread > 1 else "; at most 1 proves nothing: train this model first"
    return spread > 1, f"standard deviation {spread:.2f}{hint}"


def _check_cache(model: PreTrainedModel, ids: torch.Tensor) -> tuple[bool, str]:
    cache, first = DynamicCache(config=model.config), ids.shape[1] // 2
    pieces = [_logits(model, ids[:, :first], past_key_values=cache)]
    pieces += [_logits(model, x, past_key_values=cache) for x in ids[:, first:].split(1, dim=1)]
    return _compare(torch.cat(pieces, dim=1), _logits(model, ids))


def _check_generate(model: PreTrainedModel, ids: torch.Tensor) -> tuple[bool, str]:
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    new = min(16, model.config.max_position_embeddings - ids.shape[1])
    given |= {"max_new_tokens": new, "min_new_tokens": new}
    texts = [model.generate(ids, use_cache=use, **given) for use in (True, False)]
    equal = int((texts[0] == texts[1])[:, -new:].sum())
    return equal == 2 * new, f"{equal} of {2 * new} tokens equal"


def _check_leak(model: PreTrainedModel, ids: torch.Tensor) -> tuple[bool, str]:
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % model.config.vocab_size
    difference = (_logits(model, ids) - _logits(model, changed)).abs().amax(dim=(0, 2))
    seen, last = difference[:-1].max().item(), difference[-1].item()
    return seen == 0 and last > 0, f"earlier logits change by {seen:.2g}, the last by {last:.2g}"


def _check_native(model: PreTrainedModel, ids: torch.Tensor) -> tuple[bool, str]:
    if (name := find_native_twin(model.config)) is None:
        return True, "no class of transformers has this architecture; not compared"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "ours")
        export_checkpoint(Path(folder) / "ours", Path(folder) / "native", to=name)
        native = AutoModelForCausalLM.from_pretrained(
            Path(folder) / "native", trust_remote_code=False
        )
    is_right, detail = _compare(_logits(model, ids), _logits(native.to(ids.device).eval(), ids))
    return is_right, f"{type(native).__name__}, {detail}"


def _check_copy(model: PreTrainedModel, ids: torch.Tensor) -> tuple[bool, str]:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        copy = type(model).from_pretrained(folder, trust_remote_code=False).to(ids.device).eval()
    difference = (_logits(copy, ids) - _logits(model, ids)).abs().max().item()
    return difference == 0, f"largest difference {difference:.2g}"


_CHECKS: dict[str, Callable[[PreTrainedModel, torch.Tensor], tuple[bool, str]]] = {
    "logits are spread enough to prove something": _check_spread,
    "cached logits equal uncached": _check_cache,
    "generate gives the same text with and without a cache": _check_generate,
    "no token sees the future": _check_leak,
    "logits equal those of transformers' own class": _check_native,
    "a saved copy gives the same logits": _check_copy,
}


def _logits(model: PreTrainedModel, ids: torch.Tensor, **given) -> torch.Tensor:
    return model(ids, **given or {"use_cache": False}).logits.float()


def _compare(found: torch.Tensor, expected: torch.Tensor) -> tuple[bool, str]:
    difference = ((found - expected).abs().max() / expected.std()).item()
    return difference <= _TOLERANCE, f"largest difference {difference:.1e} standard deviations"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _find_missing(extra: str, owner: str = "hf-nanogpt") -> list[str]:
    """Return the packages of an extra, and of the extras that it names, that are not installed."""
    missing = []
    for requirement in requires(owner) or []:
        spec, _, condition = requirement.partition(";")
        found = re.match(r"([\w.-]+)(?:\[([\w,. -]+)\])?", spec.strip())
        if not found or condition.replace("'", '"').strip() != f'extra == "{extra}"':
            continue
        name, inner = found[1], found[2] or ""
        if _version(name) == "not installed":
            missing.append(name)
        else:
            for other in filter(None, map(str.strip, inner.split(","))):
                missing += _find_missing(other, name)
    return missing


def _name_processor() -> str:
    """Return the processor's model, which Linux tells in a file and others by `platform`."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _name_accelerator() -> str:
    if torch.cuda.is_available():
        cards = {torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())}
        return f"{torch.cuda.device_count()} x {', '.join(cards)}, CUDA {torch.version.cuda}"
    return "mps" if torch.backends.mps.is_available() else "none"
