"""What a model card has to tell of a training besides its results, as JSON for `metrics.json`."""

import os
import platform
import re
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .arguments import ModelArguments, NanoGPTTrainingArguments
from .configuration_nanogpt import NanoGPTConfig
from .data import DataArguments
from .token_files import find_token_files
from .tokenized import TOKENIZED
from .untrusted import without_secrets

# What a card may show of the command: all that decides the result, and no place where a token or a
# name of somebody's machine is given. What is not listed is not published.
_PUBLISHED = {
    *("from", "held_out"),
    *("data", "validation_data", "validation_fraction", "text_column", "dataset_config"),
    *("dataset_split", "streaming", "validation_documents", "tokenizer", "vocab_size"),
    *("context_length", "chat_template"),
    *("max_steps", "num_train_epochs", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "auto_find_batch_size", "train_sampling_strategy"),
    *("dataloader_drop_last", "seed", "data_seed"),
    *("optim_recipe", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm", "momentum_warmup_steps", "lr_scheduler_type", "warmup_steps"),
    *("label_smoothing_factor", "neftune_noise_alpha", "average_tokens_across_devices"),
    *("bf16", "fp16", "tf32", "torch_compile", "gradient_checkpointing"),
    *("lora", "lora_rank", "lora_alpha"),
    *(field.name for field in fields(ModelArguments)),
    *NanoGPTConfig.attribute_map,  # nanoGPT's names
}


def collect_facts(
    recipe: str,
    flags: Sequence[str],
    *,
    start_from: str | Path | None = None,
    data_args: DataArguments,
    args: NanoGPTTrainingArguments,
    context_length: int,
) -> dict[str, Any]:
    """Return data, command, settings, hardware and versions of a training.

    They are made to be published: only listed settings are shown, an address without user and
    query, which may be secrets, and an absolute path by its last part.
    """
    start = ["--from", str(start_from)] if start_from else []
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {
        "recipe": Path(recipe).name,
        "data": publish_place(data_args.data),
        "datasets": [data_args.data] if _is_hub_dataset(data_args.data) else [],
        "start_from": start_from and publish_place(str(start_from)),
        "command": _publish_command(["hf-nanogpt", "train", recipe, *start, *flags]),
        "eval_command": _repeat_evaluation(data_args),
        "settings": {
            "Tokenizer": publish_place(data_args.tokenizer),
            "Batch": f"{batch} blocks of {context_length} tokens",
            "Optimizer": args.optim_recipe,
            "Learning rate": args.learning_rate,
            "Schedule": str(args.lr_scheduler_type.value),
            "Weight decay": args.weight_decay,
            "Precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
            "Seed": args.seed,
            "LoRA": _describe_adapter(args),
        },
        "hardware": _describe_hardware(args),
        "versions": {"hf_nanogpt": __version__, "python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "datasets", "tokenizers")},
    }


def _describe_adapter(args: NanoGPTTrainingArguments) -> str | None:
    return f"rank {args.lora_rank}, alpha {args.lora_alpha}, merged" if args.lora else None


def publish_place(place: str) -> str:
    """Return an address without its secrets, or of a path on this machine the last part."""
    place = without_secrets(place)
    is_private = os.path.isabs(place) or place.startswith("~")
    return Path(place).name if is_private else place


def _publish_command(words: Sequence[str]) -> list[str]:
    """Return a command with those of its flags that may be shown, however they are spelled."""
    kept: list[str] = []
    shown = True
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            name = flag.removeprefix("--").replace("-", "_")
            shown = name.removeprefix("no_") in _PUBLISHED
            word = f"--{name}{equals}{publish_place(value)}"
        else:  # the value of a flag, or what stands before all flags
            word = publish_place(word)
        if shown:
            kept.append(word)
    return kept


def publish_facts(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a `metrics.json` that an earlier version wrote, fit to be published."""
    clean = dict(metrics)
    for name in ("data", "start_from"):
        if isinstance(value := metrics.get(name), str):
            clean[name] = publish_place(value)
    for name in ("command", "eval_command"):
        if isinstance(value := metrics.get(name), list):
            clean[name] = _publish_command([str(word) for word in value])
    if isinstance(settings := metrics.get("settings"), dict) and "Tokenizer" in settings:
        clean["settings"] = settings | {"Tokenizer": publish_place(str(settings["Tokenizer"]))}
    return clean


def _is_hub_dataset(data: str) -> bool:
    """Say whether data that was loaded came from the Hub: it looks so, and is no path here."""
    return not Path(data).exists() and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", data))


def _repeat_evaluation(data_args: DataArguments) -> list[str] | None:
    """Return the arguments of `hf-nanogpt eval` that measure on the same text, where it can."""
    default, folder = DataArguments(), Path(data_args.data)
    if (folder / TOKENIZED).is_file() or find_token_files(folder):
        return None
    if data_args.streaming or data_args.dataset_config or data_args.dataset_split != "train":
        return None
    words = ["--data", publish_place(data_args.validation_data or data_args.data)]
    if not data_args.validation_data:
        words += ["--held_out", str(data_args.validation_fraction)]
    if data_args.text_column != default.text_column:
        words += ["--text_column", data_args.text_column]
    if data_args.context_length:
        words += ["--context_length", str(data_args.context_length)]
    return words


def _describe_hardware(args: NanoGPTTrainingArguments) -> str:
    if args.device.type == "cuda":
        return f"{args.world_size} x {torch.cuda.get_device_name(args.device)}"
    if args.device.type == "cpu":
        processes = f"{args.world_size} processes of " if args.world_size > 1 else ""
        return f"{processes}{torch.get_num_threads()} CPU threads ({platform.machine()})"
    return f"{args.world_size} x {args.device.type}"
