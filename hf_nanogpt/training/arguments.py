"""Settings from a recipe and flags: for the data, the architecture and the training run.

A recipe is a YAML file whose sections hold what could as well be given as flags; it is read as if
it stood on the command line before them, so that both are checked alike and flags win.
"""

import difflib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import parse_flag_from_env
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.trainer_utils import HubStrategy

from ..configuration_nanogpt import NanoGPTConfig
from ..data.documents import DataArguments
from ..errors import UserError
from ..presets import load_preset
from ..untrusted import parse_json, parse_yaml
from .lora import LoraArguments
from .optim import OPTIM_DEFAULTS, OptimRecipe

RECIPES = Path(__file__).parent.parent / "recipes"


@dataclass
class NanoGPTTrainingArguments(LoraArguments, TrainingArguments):
    """`TrainingArguments` of transformers, with the project's optimizer and defaults.

    Every field of `TrainingArguments` keeps its name and meaning. `None` for `learning_rate`,
    `adam_beta1`, `adam_beta2`, `weight_decay` or `max_grad_norm` means what `optim_recipe` says.
    """

    optim_recipe: OptimRecipe = field(
        default="muon", metadata={"help": "muon (Muon for matrices, AdamW for the rest) or adamw."}
    )
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Peak learning rate; of the matrices, where the recipe is muon."},
    )
    adam_beta1: float | None = field(default=None)  # type: ignore[assignment]
    adam_beta2: float | None = field(default=None)  # type: ignore[assignment]
    weight_decay: float | None = field(default=None)  # type: ignore[assignment]
    max_grad_norm: float | None = field(default=None)  # type: ignore[assignment]
    momentum_warmup_steps: int = field(
        default=0, metadata={"help": "Steps in which Muon's momentum rises from 0.85 to 0.95."}
    )
    num_threads: int | None = field(
        default=None, metadata={"help": "CPU threads for torch; by default as many as cores."}
    )
    sample_prompt: str | None = field(
        default=None,
        metadata={"help": "Prompt of the samples; default: words held out."},
    )
    sample_steps: float | None = field(
        default=None,
        metadata={
            "help": "Steps between samples, or a share; 0: none. Default: at each evaluation."
        },
    )
    logging_steps: float = field(default=10)
    eval_strategy: str = field(default="steps")  # type: ignore[assignment]
    eval_steps: float | None = field(
        default=None, metadata={"help": "Default: a tenth of all steps."}
    )
    save_steps: float = field(
        default=0.2, metadata={"help": "Steps between checkpoints, or a share."}
    )
    save_total_limit: int | None = field(default=2)
    logging_nan_inf_filter: bool = field(default=False)  # it would hide that training has failed
    include_num_input_tokens_seen: str | bool = field(default=True)
    ddp_find_unused_parameters: bool | None = field(default=False)  # there are none

    def __post_init__(self):
        for name, value in vars(OPTIM_DEFAULTS[self.optim_recipe]).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.eval_strategy == "steps" and self.eval_steps is None:
            self.eval_steps = 0.1
        if self.num_threads is not None:
            if self.num_threads < 1:
                raise UserError(f"num_threads={self.num_threads} is not possible: give 1 or more.")
            torch.set_num_threads(self.num_threads)
        if self.momentum_warmup_steps < 0:
            raise UserError(
                f"momentum_warmup_steps={self.momentum_warmup_steps} is not possible: give 0 or "
                "more."
            )
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False
        if self.sample_steps is not None and not (
            0 <= self.sample_steps < 1 or self.sample_steps == int(self.sample_steps) > 0
        ):
            raise UserError(
                f"sample_steps={self.sample_steps} is not possible: give a whole number of steps, "
                "a share of all steps below 1, or 0 for no samples."
            )
        LoraArguments.__post_init__(self)
        TrainingArguments.__post_init__(self)
        _check_processes(self.world_size)
        if self.lora:
            flags = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
            if self.fsdp or self.deepspeed or any(map(parse_flag_from_env, flags)):
                raise UserError(
                    "lora=True needs whole weights: train it without FSDP and DeepSpeed."
                )
            self.hub_strategy = HubStrategy.END  # before, there are adapters and no whole model
        for name in self.report_to or []:
            _check_tracker(name)


def _check_processes(world_size: int) -> None:
    """Raise a `UserError` if processes that were launched together would train apart."""
    launched = os.environ.get("WORLD_SIZE")
    if launched and launched != str(world_size):
        raise UserError(
            f"WORLD_SIZE={launched} processes were launched, but each would train by itself, all "
            "into one output_dir: add --use_cpu to the flags of train, or use a machine with a GPU "
            "for each process. To train in one process, unset WORLD_SIZE."
        )


def _check_tracker(name: str) -> None:
    """Raise a `UserError` unless Trainer can report to the tool of this name, here and now."""
    if name not in INTEGRATION_TO_CALLBACK:
        nearest = difflib.get_close_matches(name, INTEGRATION_TO_CALLBACK, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else "try trackio, tensorboard or wandb."
        raise UserError(f"report_to={name} is unknown: {hint}")
    if name not in get_available_reporting_integrations():
        package = "'hf-nanogpt[track]'" if name in ("trackio", "tensorboard") else name
        raise UserError(f"report_to={name} needs a package: pip install {package}.")


def _make_model_arguments() -> type:
    """Derive the flags of the architecture from the configuration's own fields."""
    aliases: dict[str, list[str]] = {}
    for alias, name in NanoGPTConfig.attribute_map.items():
        aliases.setdefault(name, []).append(f"--{alias}")
    elsewhere = {"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache"}
    preset = field(default=None, metadata={"help": "A named architecture (default: nano)."})
    fields: list[Any] = [("preset", str | None, preset)]
    for name, kind in NanoGPTConfig.__annotations__.items():
        if name in elsewhere:
            continue
        if name == "rope_parameters":
            kind = str
        elif kind in (float | int, float | int | None):
            kind = float
        metadata = {"aliases": aliases.get(name, [])}
        fields.append((name, kind | None, field(default=None, metadata=metadata)))
    fields.append(("bias", bool | None, field(default=None)))
    return make_dataclass("ModelArguments", fields)


ModelArguments = _make_model_arguments()


class _Parser(HfArgumentParser):
    """An argument parser whose errors are exceptions of one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message[0].upper() + message[1:].rstrip(".") + ".")


def make_parser(prog: str = "hf-nanogpt train") -> HfArgumentParser:
    """Return the parser of all settings, for its `--help`."""
    kinds = [DataArguments, ModelArguments, NanoGPTTrainingArguments]
    return _Parser(kinds, prog=prog, allow_abbrev=False)


def make_data_parser() -> HfArgumentParser:
    """Return the parser of the data's settings alone."""
    prog = "hf-nanogpt tokenize"
    usage = f"{prog} DATA FOLDER [--SETTING VALUE ...]"
    return _Parser([DataArguments], prog=prog, usage=usage, allow_abbrev=False)


def parse_settings(
    recipe: str | Path, flags: Sequence[str] = (), **settings: Any
) -> tuple[DataArguments, dict[str, Any], NanoGPTTrainingArguments]:
    """Return what a recipe, then `settings`, then `flags` say: data, architecture, training.

    Args:
        recipe: the name of one of ours, or the path of a YAML file.
        flags: as on the command line, `["--max_steps", "100"]`.
        settings: the same as keywords, `max_steps=100`.

    Raises:
        UserError: the recipe or a name in it is unknown, or a value does not fit.
    """
    defaults, defaults_of_lora = _read_recipe(recipe)
    words = [*as_flags(settings), *flags]
    if _asks_for_lora([*as_flags(defaults), *words]):
        defaults |= defaults_of_lora
    given = [*as_flags(defaults), *words]
    check_text(str(recipe), *given)
    parser = make_parser()
    data, model, training, unknown = parser.parse_args_into_dataclasses(
        given, return_remaining_strings=True, look_for_args_file=False
    )
    _refuse_unknown(unknown, parser)
    architecture = {name: value for name, value in vars(model).items() if value is not None}
    if "rope_parameters" in architecture:
        architecture["rope_parameters"] = parse_json(
            model.rope_parameters, where=f"rope_parameters={model.rope_parameters:.80}"
        )
    return data, architecture, training


def check_text(*words: str) -> None:
    """Raise a `UserError` unless the words can be written to the card at the end of training."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{word!a} is not UTF-8 text, and the model card has to repeat it: give "
                "another name or text, or use a UTF-8 locale."
            ) from error


def _asks_for_lora(given: list[str]) -> bool:
    parser = _Parser([LoraArguments], allow_abbrev=False)
    lora, _ = parser.parse_args_into_dataclasses(
        given, return_remaining_strings=True, look_for_args_file=False
    )
    return lora.lora


def parse_data(flags: Sequence[str]) -> DataArguments:
    """Return what flags say about the data, as `hf-nanogpt tokenize` takes them."""
    parser = make_data_parser()
    data, unknown = parser.parse_args_into_dataclasses(
        list(flags), return_remaining_strings=True, look_for_args_file=False
    )
    _refuse_unknown(unknown, parser)
    return data


def _refuse_unknown(unknown: list[str], parser: HfArgumentParser) -> None:
    if not unknown:
        return
    known = [option for action in parser._actions for option in action.option_strings]
    nearest = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}?" if nearest else f"see {parser.prog} --help."
    raise UserError(f"{unknown[0]} is no known setting: {hint}")


def make_config(architecture: dict[str, Any], **fields: Any) -> NanoGPTConfig:
    """Return the configuration that parsed architecture settings, with `fields` added, describe."""
    overrides = {name: value for name, value in architecture.items() if name != "preset"}
    return load_preset(architecture.get("preset", "nano"), **overrides, **fields)


def list_recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _read_recipe(recipe: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of a recipe, and those that replace some of them with `--lora`."""
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        nearest = difflib.get_close_matches(str(recipe), list_recipes(), n=1, cutoff=0.4)
        hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
        known = ", ".join(list_recipes())
        raise UserError(f"recipe={recipe} is unknown. {hint}Known: {known}, or a .yaml file.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe={recipe} is not valid YAML: {error}") from error
    sections = parse_yaml(text, where=f"recipe={recipe}")
    names = ("data", "model", "training", "lora")
    kinds = dict | None  # an empty section is None
    if (
        not isinstance(sections, dict)
        or set(sections) - set(names)
        or not all(isinstance(part, kinds) for part in sections.values())
    ):
        raise UserError(
            f"recipe={recipe} must have the sections {', '.join(names)}, each with settings, and "
            "no others."
        )
    with_lora = sections.pop("lora", None) or {}
    always = {name: value for part in sections.values() for name, value in (part or {}).items()}
    return always, with_lora


def as_flags(settings: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in settings.items():
        if value is None:
            continue
        if isinstance(value, dict):
            value = json.dumps(value)
        values = value if isinstance(value, list | tuple) else [value]
        flags += [f"--{name}={values[0]}"] if len(values) == 1 else [f"--{name}", *map(str, values)]
    return flags
