"""Settings for the data, the architecture and the training run, and the flags that set them."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, get_args

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from ..configuration_nanogpt import NanoGPTConfig
from ..data.documents import DataArguments, setting
from ..errors import UserError, did_you_mean, settings_errors
from ..presets import PRESETS
from ..untrusted import parse_json
from .checks import (
    METRICS,
    ONLY_MUON,
    check_needs,
    check_processes,
    check_run,
    check_tracker,
    check_values,
    explain_arguments,
)
from .optim import OPTIM_DEFAULTS, OptimRecipe
from .recipes import Choice, as_flags, read_recipe
from .recipes import list_recipes as list_recipes  # also found here

logger = logging.get_logger(__name__)


@dataclass
class NanoGPTTrainingArguments(TrainingArguments):
    """`TrainingArguments` of transformers, with the optimizer and defaults of this project.

    Every field of `TrainingArguments` keeps its name and meaning. `None` for `learning_rate`,
    `adam_beta1`, `adam_beta2`, `weight_decay` or `max_grad_norm` means the value of `optim_recipe`;
    with an `optim`, which takes its place, that of transformers.
    """

    output_dir: str = setting(  # never None: __post_init__ fills it in
        None, "The output directory where the model predictions and checkpoints will be written."
    )
    lora: bool = setting(False, "Train a LoRA adapter of the model of --from, not all weights.")
    lora_rank: int = setting(8, "Rank of the adapter's matrices.")
    lora_alpha: int = setting(16, "The adapter's output is scaled by alpha / rank.")
    optim_recipe: OptimRecipe = field(
        default="muon", metadata={"help": "muon (Muon for matrices, AdamW for the rest) or adamw."}
    )
    optim: str | None = setting(  # type: ignore[assignment]
        None, "An optimizer of transformers, with its defaults, instead of optim_recipe: sgd, ..."
    )
    # The base class annotates these as float; None selects the recipe's value.
    learning_rate: float | None = setting(  # type: ignore[assignment]
        None, "Peak learning rate; with muon, that of the matrices."
    )
    head_learning_rate: float | None = setting(
        None,
        "With muon, that of the head, norms and biases. Default: half of learning_rate, less above "
        "width 128. Lower, a large vocabulary is not learnt by heart so soon.",
    )
    adam_beta1: float | None = None  # type: ignore[assignment]
    adam_beta2: float | None = None  # type: ignore[assignment]
    weight_decay: float | None = None  # type: ignore[assignment]
    max_grad_norm: float | None = None  # type: ignore[assignment]
    momentum_warmup_steps: int = setting(
        0, "Steps in which Muon's momentum rises from 0.85 to 0.95."
    )
    min_train_tokens: int = setting(
        0, "Tokens to train on, at the least: shorter data are gone over again. Not with max_steps."
    )
    document_mask: bool = setting(
        True,
        "Hide the documents of a block from each other. Without it, attention needs no mask, which "
        "is faster on a GPU.",
    )
    num_threads: int | None = setting(None, "CPU threads for torch. Default: one for each core.")
    sample_prompt: str | None = setting(
        None, "Prompt of the samples. Default: the first words of the held-out text."
    )
    sample_steps: float | None = setting(
        None,
        "Steps between samples, or a share of all steps; 0 for no samples. Default: at "
        "evaluations, using at most a fiftieth of the time.",
    )
    logging_steps: float = 10
    eval_strategy: str = "steps"
    eval_steps: float | None = setting(
        None, "Steps between evaluations, or a share of all steps. Default: 0.1."
    )
    eval_tokens: int | None = setting(
        None,
        "Held-out tokens of each evaluation while training. Default: so many that evaluations and "
        "samples together cost at most a tenth of the steps. The end measures all.",
    )
    keep_best: bool = setting(
        True,
        "Keep the weights with the lowest validation loss, and stop early if it turns up. (Not "
        "with FSDP or DeepSpeed; load_best_model_at_end takes its place.)",
    )
    patience: float = setting(
        0.3, "Share of all steps without a better validation loss before training stops early."
    )
    save_steps: float = setting(0.2, "Steps between checkpoints, or a share of all steps.")
    save_total_limit: int | None = 2
    logging_nan_inf_filter: bool = False  # it would hide that training has failed
    include_num_input_tokens_seen: str | bool = True
    ddp_find_unused_parameters: bool | None = False  # there are none

    def __post_init__(self):
        # What the user leaves open.
        if self.optim_recipe not in OPTIM_DEFAULTS:
            hint = did_you_mean(str(self.optim_recipe), OPTIM_DEFAULTS)
            raise UserError(f"optim_recipe={self.optim_recipe} must be muon or adamw.{hint}")
        defaults = TrainingArguments if self.optim else OPTIM_DEFAULTS[self.optim_recipe]
        for name in vars(OPTIM_DEFAULTS[self.optim_recipe]):
            if getattr(self, name) is None:
                setattr(self, name, getattr(defaults, name))
        if self.eval_strategy == "steps" and self.eval_steps is None:
            self.eval_steps = 0.1
        if self.save_strategy == "best" and self.metric_for_best_model is None:
            self.metric_for_best_model = METRICS[0]
        # Trainer takes all but a "loss" for better if greater. (Of several texts, such as a dict of
        # datasets in Python, each has its own figures: `wiki_bits_per_byte`.)
        metric = self.metric_for_best_model or ""
        if self.greater_is_better is None and metric.endswith(METRICS):
            self.greater_is_better = False
        self.dataloader_pin_memory &= torch.accelerator.is_available()
        if self.accelerator_config is None:  # let no CPU wait for copies to a GPU
            self.accelerator_config = {"non_blocking": self.dataloader_pin_memory}
        self.optim_target_modules = _unwrap(self.optim_target_modules)
        check_values(self)
        # The base class must have an `optim`; none of its own means ours.
        chosen, self.optim = self.optim, self.optim or TrainingArguments.optim
        with explain_arguments(self):
            self._limit_waiting()
            super().__post_init__()
        self.optim = self.optim if chosen else None
        check_needs(self)
        check_processes(self.world_size)
        if self.lora:
            self.hub_strategy = HubStrategy.END  # until then there is no whole model to push
        for name in self.report_to or []:
            check_tracker(name)

    def _limit_waiting(self) -> None:
        """Give processes on CPUs the time limit `ddp_timeout`: transformers does so on GPUs."""
        if self.use_cpu:
            limit = timedelta(seconds=self.ddp_timeout)
            PartialState(cpu=True, backend=self.ddp_backend, timeout=limit)

    @property
    def is_sharded(self) -> bool:
        """Say whether each process has only a part of the weights, by FSDP or DeepSpeed."""
        flags = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
        return bool(self.fsdp or self.deepspeed or any(map(parse_flag_from_env, flags)))


def _unwrap(values: Any) -> Any:
    """Return the only one of several values, as it may be a word such as all-linear."""
    return values[0] if isinstance(values, list) and len(values) == 1 else values


def _make_model_arguments() -> type:
    """Make a dataclass of flags from the fields of `NanoGPTConfig`, which None leaves as they are.

    So a new field of the configuration is a flag of `train` too.
    """
    chosen_elsewhere = {"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache"}
    preset = field(default=None, metadata={"help": "A named architecture. Default: nano."})
    fields: list[Any] = [("preset", str | None, preset)]
    for name, annotation in NanoGPTConfig.__annotations__.items():
        if name in chosen_elsewhere:
            continue
        if name == "rope_parameters":
            annotation = str  # as JSON
        elif annotation in (float | int, float | int | None):
            annotation = float
        aliases = [f"--{a}" for a, ours in NanoGPTConfig.attribute_map.items() if ours == name]
        default = field(default=None, metadata={"aliases": aliases})
        fields.append((name, annotation | None, default))
    fields.append(("bias", bool | None, field(default=None)))  # nanoGPT's name for two fields
    return make_dataclass("ModelArguments", fields)


ModelArguments = _make_model_arguments()
# A setting that a person types drops those of the recipe that would win over it: the sizes that
# the recipe gives to its own preset, its steps where passes over the data are asked for.
_REPLACED = {
    "preset": {*ModelArguments.__annotations__},
    "bias": {"attention_bias", "mlp_bias"},
    "dropout": {"attention_dropout"},
    "num_train_epochs": {"max_steps", "min_train_tokens"},
    "min_train_tokens": {"max_steps"},
    "max_steps": {"min_train_tokens"},
    # The rates of another optimizer.
    "optim": {*vars(OPTIM_DEFAULTS["muon"]), *ONLY_MUON},
    "optim_recipe": {*vars(OPTIM_DEFAULTS["muon"]), *ONLY_MUON},
    "learning_rate": {"head_learning_rate"},
    # Steps between evaluations say something only if it is steps that are counted.
    "eval_steps": {"eval_strategy"},
    "save_steps": {"save_strategy"},
    "logging_steps": {"logging_strategy"},
}
# Settings of transformers that take one value or several; its parser knows only the first.
_SEVERAL = {
    name for name, kind in TrainingArguments.__annotations__.items() if list[str] in get_args(kind)
}
LONGEST = 1024  # tokens in a preset's context and in a block to fine-tune on, unless asked for


class _Parser(HfArgumentParser):
    """A parser that raises each mistake as a `UserError`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message[0].upper() + message[1:].rstrip(".") + ".")

    def parse(self, flags: Sequence[str]) -> tuple[Any, ...]:
        """Return the dataclasses that the flags fill."""
        with settings_errors():
            *parts, unknown = self.parse_args_into_dataclasses(
                list(flags), return_remaining_strings=True, look_for_args_file=False
            )
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            hint = did_you_mean(unknown[0], known) or f" See {self.prog} --help."
            raise UserError(f"{unknown[0]} is not a setting.{hint}")
        return tuple(parts)


def make_parser() -> _Parser:
    """Return the parser of all settings of `train`."""
    parts: list[Any] = [DataArguments, ModelArguments, NanoGPTTrainingArguments]
    parser = _Parser(parts, prog="hf-nanogpt train", allow_abbrev=False)
    for action in parser._actions:
        if action.dest in _SEVERAL and action.nargs is None:
            action.nargs = "+"
    return parser


def read_flags(flags: Sequence[str]) -> dict[str, Any]:
    """Return the values of those settings of `train` that the flags name, and no defaults."""
    return vars(_make_reader().parse_known_args(list(flags))[0])


@cache
def _make_reader() -> _Parser:
    parser = make_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return parser


def make_data_parser() -> _Parser:
    """Return the parser of the data's settings alone, as `hf-nanogpt tokenize` takes them."""
    prog = "hf-nanogpt tokenize"
    usage = f"{prog} DATA FOLDER [--SETTING VALUE ...]"
    parts: list[Any] = [DataArguments]
    return _Parser(parts, prog=prog, usage=usage, allow_abbrev=False)


def parse_data(flags: Sequence[str]) -> DataArguments:
    """Return what flags say about the data."""
    return make_data_parser().parse(flags)[0]


def parse_settings(
    recipe: str | Path | Choice, flags: Sequence[str] = (), **settings: Any
) -> tuple[DataArguments, dict[str, Any], NanoGPTTrainingArguments]:
    """Return the settings for data, architecture and training.

    Args:
        recipe: the name of a recipe of the package, the path of a YAML file, or a choice.
        flags: as on the command line, `["--max_steps", "100"]`; they win over all others.
        settings: the same as keywords, `max_steps=100`; they win over the recipe. A `preset` given
            in either way also wins over the sizes in the recipe.

    Raises:
        UserError: the recipe or a setting is unknown, or a value does not fit.
    """
    chosen = [*as_flags(settings), *flags]
    check_text(str(recipe), *chosen)
    data, model, training = make_parser().parse([*choose_defaults(recipe, chosen), *chosen])
    check_run(training)
    if isinstance(recipe, Choice):
        data.exact_vocab_size = bool({"tokenizer", "vocab_size"} & read_flags(chosen).keys())
    architecture = {name: value for name, value in vars(model).items() if value is not None}
    _limit_context(architecture, data)
    if "rope_parameters" in architecture:
        architecture["rope_parameters"] = parse_json(
            model.rope_parameters, where=f"rope_parameters={model.rope_parameters:.80}"
        )
    return data, architecture, training


def _limit_context(architecture: dict[str, Any], data: DataArguments) -> None:
    """Give a preset a context that can be trained, unless the user chose one."""
    preset = PRESETS.get(architecture.get("preset", ""), {})
    longest = max(LONGEST, data.context_length or 0)
    whole = preset.get("max_position_embeddings", 0)
    if whole > longest and "max_position_embeddings" not in architecture:
        architecture["max_position_embeddings"] = longest
        logger.warning_once(
            f"preset={architecture['preset']} gets a context of {longest:,} tokens instead of "
            f"{whole:,}, which few machines can train: --block_size sets it."
        )


def choose_defaults(recipe: str | Path | Choice, chosen: Sequence[str]) -> list[str]:
    """Return the settings of a recipe as flags, without those that the `chosen` flags replace."""
    defaults, lora_defaults = read_recipe(recipe)
    check_text(*as_flags(defaults | lora_defaults))
    if read_flags([*as_flags(defaults), *chosen]).get("lora"):
        defaults |= lora_defaults
    typed, known = read_flags(chosen), read_flags(as_flags(defaults))
    if typed.get("optim_recipe") == known.get("optim_recipe", "muon"):
        typed.pop("optim_recipe", None)  # the recipe's rates are for it
    replaced = set().union(*(_REPLACED.get(name, ()) for name in typed))
    kept = []
    for name, value in defaults.items():
        flags = as_flags({name: value})
        if not read_flags(flags).keys() & replaced:  # it knows the other names of a setting
            kept += flags
    return kept


def check_text(*texts: str) -> None:
    """Raise a `UserError` unless the texts can be written to the card at the end of training."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{text!a} is not UTF-8 text, and the model card has to repeat it: give another "
                "name or text, or use a UTF-8 locale."
            ) from error
