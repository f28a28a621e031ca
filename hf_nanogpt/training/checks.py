"""Settings of a training that are refused before anything is read, trained or deleted."""

import importlib.util
import inspect
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from huggingface_hub import is_offline_mode
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler
from transformers.trainer_utils import HubStrategy, SchedulerType

from ..errors import UserError, did_you_mean, one_line

# What an evaluation of ours measures; lower is better in all.
METRICS = ("loss", "perplexity", "bits_per_byte")

_WHOLE = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "eval_accumulation_steps": 1,
    "eval_tokens": 1,
    "num_threads": 1,
    "lora_rank": 1,
    "lora_alpha": 1,
    "seed": 0,
    "data_seed": 0,
    "momentum_warmup_steps": 0,
    "min_train_tokens": 0,
    "dataloader_num_workers": 0,
}
_FROM_0 = (
    *("learning_rate", "head_learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm"),
    "neftune_noise_alpha",
)
_SHARES = ("adam_beta1", "adam_beta2", "label_smoothing_factor")
_INTERVALS = ("logging_steps", "eval_steps", "save_steps", "sample_steps")

# What Trainer passes to every schedule.
_SET_BY_TRAINER = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")

# Settings that do something only with Muon.
ONLY_MUON = ("head_learning_rate", "momentum_warmup_steps")
# Settings that do something only together with another.
_NEEDS = {
    "lora_rank": "lora",
    "lora_alpha": "lora",
    "optim_args": "optim",
    "optim_target_modules": "optim",
    "gradient_checkpointing_kwargs": "gradient_checkpointing",
}

# Settings that are JSON or the name of a file.
_NESTED = ("accelerator_config", "deepspeed", "fsdp_config", "lr_scheduler_kwargs")

# Fields of `TrainingArguments` that `train` has no use for.
_UNUSED = {
    "use_liger_kernel": "Liger has no kernels for this architecture",
    "liger_kernel_config": "Liger has no kernels for this architecture",
    "enable_jit_checkpoint": "SIGTERM always saves a checkpoint",
    "resume_from_checkpoint": "use --resume, which takes the last checkpoint of output_dir",
    "do_predict": "there is no test data; afterwards, use hf-nanogpt eval",
    "label_names": "the labels of packed blocks are always their tokens",
    "length_column_name": "packed blocks have no such column",
    "parallelism_config": "give it to a NanoGPTTrainer in Python",
}


@contextmanager
def explain_arguments(args: Any) -> Iterator[None]:
    """Raise what transformers says about its arguments as a `UserError`.

    A file may be missing, a key unknown, a package not installed.
    """
    values = [(name, getattr(args, name)) for name in _NESTED]
    given = "".join(f"{name}={v}: " for name, v in values if isinstance(v, str | dict) and v)
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, OSError, ImportError) as error:
        # A plain ValueError is transformers' own, which names the setting.
        where = "" if type(error) is ValueError else given
        raise UserError(where + one_line(error)) from error


def check_values(args: Any) -> None:
    """Raise a `UserError` for a value that would fail only later, or with a traceback."""
    for name, least in _WHOLE.items():
        value = getattr(args, name)
        if value is not None and not least <= value < 2**32:
            limit = "" if value < least else " and below 2**32"
            raise UserError(f"{name}={value} must be a whole number, at least {least}{limit}.")
    for name in (*_FROM_0, *_SHARES):
        value, has_limit = getattr(args, name), name in _SHARES
        if value is not None and not (value >= 0 and (value < 1 or not has_limit)):
            raise UserError(f"{name}={value} must be at least 0{' and below 1' * has_limit}.")
    for name in _INTERVALS:
        value = getattr(args, name)
        no_samples = name == "sample_steps" and value == 0
        if not (value is None or no_samples or 0 < value < 1 or value > 0 == value % 1):
            strategy = f"{name.removesuffix('_steps')}_strategy=no"
            none = "or 0 for no samples" if name == "sample_steps" else f"for none, set {strategy}"
            raise UserError(
                f"{name}={value} must be a whole number of steps, or a share of all steps below 1; "
                f"{none}."
            )
    _check_length(args)
    if args.ddp_backend and "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"ddp_backend={args.ddp_backend} has no effect in one process: leave it out."
        )
    _check_choices(args)


def _check_length(args: Any) -> None:
    if not 0 < args.patience <= 1:
        raise UserError(f"patience={args.patience} must be above 0, and at most 1 (never stop).")
    if args.max_steps != -1 and args.max_steps < 1:
        raise UserError(f"max_steps={args.max_steps} must be a whole number, at least 1.")
    if args.max_steps == -1 and not 0 < args.num_train_epochs < math.inf:
        raise UserError(f"num_train_epochs={args.num_train_epochs} must be a number above 0.")


def _check_choices(args: Any) -> None:
    """Check in Python what the command line checks by itself."""
    choices = {f.name: f.metadata["choices"] for f in fields(args) if "choices" in f.metadata}
    choices["include_num_input_tokens_seen"] = (True, False, "all", "non_padding", "no")
    for name, allowed in choices.items():
        value = getattr(args, name)
        if value is not None and value not in allowed:
            hint = did_you_mean(str(value), map(str, allowed))
            raise UserError(f"{name}={value} must be {_list(allowed)}.{hint}")


def _list(names: Any) -> str:
    *others, last = map(str, names)
    return f"{', '.join(others)} or {last}"


def _check_together(args: Any, defaults: dict[str, Any]) -> None:
    """Raise a `UserError` for a setting that has no effect beside another."""
    if args.min_train_tokens and args.max_steps > 0:
        raise UserError(
            f"min_train_tokens={args.min_train_tokens} has no effect with max_steps="
            f"{args.max_steps}: leave one of them out."
        )
    for name in ONLY_MUON:
        value = getattr(args, name)
        if value != defaults[name] and (args.optim or args.optim_recipe != "muon"):
            raise UserError(
                f"{name}={value} has an effect only with optim_recipe=muon: leave it out."
            )


def check_needs(args: Any) -> None:
    """Raise a `UserError` for a setting that has no effect without another."""
    defaults = {field.name: field.default for field in fields(args)}
    for name, needed in _NEEDS.items():
        if (value := getattr(args, name)) != defaults[name] and not getattr(args, needed):
            raise UserError(f"{name}={value} has no effect without --{needed}: add it.")
    if args.push_to_hub and is_offline_mode():
        raise UserError("push_to_hub=True needs the Hub, and HF_HUB_OFFLINE is set: unset one.")
    _check_together(args, defaults)
    if not args.lora:
        return
    if args.is_sharded:
        raise UserError("lora=True needs whole weights: leave out FSDP and DeepSpeed.")
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise UserError(
            f"hub_strategy={args.hub_strategy.value} does not go with lora=True, which has a whole "
            "model only at the end: leave it out."
        )
    if importlib.util.find_spec("peft") is None:
        raise UserError("lora=True needs a package: pip install 'hf-nanogpt[finetune]'.")


def check_processes(world_size: int) -> None:
    """Raise a `UserError` if processes that were launched together would train apart."""
    launched = os.environ.get("WORLD_SIZE")
    if launched and launched != str(world_size):
        raise UserError(
            f"WORLD_SIZE={launched} processes were launched, but each would train by itself, all "
            "into one output_dir: add --use_cpu to the flags of train, or use a machine with a GPU "
            "for each process. To train in one process, unset WORLD_SIZE."
        )


def check_tracker(name: str) -> None:
    """Raise a `UserError` unless Trainer can report to the tool of this name."""
    if name not in INTEGRATION_TO_CALLBACK:
        hint = did_you_mean(name, INTEGRATION_TO_CALLBACK)
        hint = hint or " Try trackio, tensorboard or wandb."
        raise UserError(f"report_to={name} is unknown.{hint}")
    if name not in get_available_reporting_integrations():
        package = "'hf-nanogpt[track]'" if name in ("trackio", "tensorboard") else name
        raise UserError(f"report_to={name} needs a package: pip install {package}.")


def check_run(args: Any) -> None:
    """Raise a `UserError` for what only `train` cannot do; a `NanoGPTTrainer` may use it."""
    defaults = {field.name: field.default for field in fields(TrainingArguments)}
    for name in _UNUSED.keys() & defaults.keys():  # not every release has all
        if (value := getattr(args, name)) != defaults[name]:
            raise UserError(f"{name}={value} has no effect here: {_UNUSED[name]}.")
    if args.include_num_input_tokens_seen == "no":
        raise UserError(
            "include_num_input_tokens_seen=no would leave the model card without the number of "
            "tokens: use all or non_padding."
        )
    metric = (args.metric_for_best_model or METRICS[0]).removeprefix("eval_")
    if metric not in METRICS:
        raise UserError(
            f"metric_for_best_model={args.metric_for_best_model} must be {_list(METRICS)}."
            f"{did_you_mean(metric, METRICS)}"
        )


def check_schedule(args: TrainingArguments, num_steps: int) -> None:
    """Raise a `UserError` if the schedule lacks a setting or has no rate at one of the steps.

    Some schedules fail only at a step in the middle or at the last one.
    """
    kind, given = SchedulerType(args.lr_scheduler_type), args.lr_scheduler_kwargs or {}
    name, warmup = kind.value, args.get_warmup_steps(num_steps)
    if not isinstance(given, dict):
        raise UserError(f"lr_scheduler_kwargs={given} must be JSON, such as '{{\"min_lr\": 0.1}}'.")
    make: Any = TYPE_TO_SCHEDULER_FUNCTION[kind]
    known = inspect.signature(make).parameters
    if warmup and "num_warmup_steps" not in known:
        raise UserError(
            f"warmup_steps={args.warmup_steps} has no effect with lr_scheduler_type={name}: set it "
            "to 0, or choose another schedule, such as constant_with_warmup."
        )
    # A function that takes any keyword looks at them itself.
    names = [key for key in known if key not in _SET_BY_TRAINER]
    unknown = [key for key in given if key not in names]
    if unknown and all(p.kind != p.VAR_KEYWORD for p in known.values()):
        hint = did_you_mean(unknown[0], names)
        raise UserError(f"lr_scheduler_kwargs: {name} has no setting {unknown[0]}.{hint}")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    try:
        schedule = get_scheduler(kind, optimizer, warmup, num_steps, given)
        functions = schedule.lr_lambdas if isinstance(schedule, LambdaLR) else []
        for step in sorted({0, 1, warmup, warmup + 1, num_steps - 1, num_steps}):
            if not all(0 <= function(step) < math.inf for function in functions):
                raise ValueError(f"it has no rate at step {step}")
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"lr_scheduler_type={name} is not possible with warmup_steps={warmup}, {num_steps} "
            f"steps and lr_scheduler_kwargs={given}: {one_line(error)}."
        ) from error
