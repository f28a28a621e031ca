"""Where each setting of a training comes from: a flag, recipe, preset, the corpus or a default."""

from collections.abc import Container, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..data.documents import DataArguments
from ..data.stored import holds_tokens
from ..presets import PRESETS
from .arguments import (
    ModelArguments,
    NanoGPTTrainingArguments,
    choose_defaults,
    parse_settings,
    read_flags,
)
from .choosing import settle_recipe
from .preparing import make_config
from .recipes import CHOSEN, Choice


@dataclass(frozen=True)
class Setting:
    """A setting, its value, and what it comes from: a flag, a recipe, a preset, the corpus."""

    group: str
    name: str
    value: Any
    origin: str


def explain_settings(
    recipe: str | Path | Choice | None,
    flags: Sequence[str] = (),
    *,
    start_from: str | Path | None = None,
) -> list[Setting]:
    """Return the settings that `train` would use with the same arguments, and train nothing.

    They are those of the data; those of the architecture, unless `start_from` brings its own; and
    the training arguments that differ from the defaults of `TrainingArguments`, or are given.

    Raises:
        UserError: as `settle_recipe`, or there is no such architecture.
    """
    chosen = settle_recipe(recipe, flags, start_from=start_from)
    data, architecture, args = parse_settings(chosen, flags)
    typed = read_flags(flags)
    in_recipe = read_flags(choose_defaults(chosen, flags))
    if "bias" in architecture:  # nanoGPT's name for two fields
        for given in (typed, in_recipe):
            given |= dict.fromkeys(("attention_bias", "mlp_bias") if "bias" in given else ())
    preset = architecture.get("preset", "nano")
    in_preset: dict[str, Any] = {}
    groups = {"data": {field.name: getattr(data, field.name) for field in fields(data)}}
    for name in _list_unused(data, start_from) - typed.keys():
        del groups["data"][name]
    if not start_from:
        config = make_config(architecture, vocab_size=data.vocab_size)
        names = [name for name in ModelArguments.__annotations__ if name not in ("preset", "bias")]
        groups["model"] = {"preset": preset} | {name: getattr(config, name) for name in names}
        # Another size may have replaced what the preset says.
        row = PRESETS[preset].items()
        in_preset = {name: value for name, value in row if getattr(config, name) == value}
    groups["training"] = _list_changed(args, {*typed, *in_recipe})

    def find_origin(name: str) -> str:
        if name in typed:
            return "flag"
        if name in in_recipe:
            return CHOSEN if isinstance(chosen, Choice) else f"recipe {Path(chosen).stem}"
        return f"preset {preset}" if name in in_preset else "default"

    return [
        Setting(group, name, value, find_origin(name))
        for group, settings in groups.items()
        for name, value in settings.items()
        if value is not None
    ]


def _list_unused(data: DataArguments, start_from: str | Path | None) -> set[str]:
    """Return the settings of the tokenizer that have no effect: only a BPE gets its size by one."""
    if start_from:  # which brings its own tokenizer
        return {"tokenizer", "vocab_size"}
    is_made = data.tokenizer == "bpe" and not holds_tokens(Path(data.data))
    return set() if is_made else {"vocab_size"}


def _list_changed(args: NanoGPTTrainingArguments, given: Container[str]) -> dict[str, Any]:
    """Return the arguments that are given, or have another value than in `TrainingArguments`."""
    usual = TrainingArguments(output_dir=args.output_dir, use_cpu=args.use_cpu).to_dict()
    return {  # `to_dict` hides tokens
        name: value
        for name, value in args.to_dict().items()
        if value != usual.get(name) or name in given
    }
