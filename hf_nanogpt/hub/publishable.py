"""What may be published of a training: listed settings, no secret and no path of a machine."""

import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..configuration_nanogpt import NanoGPTConfig
from ..errors import without_secrets

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
    "preset",
    *(field.name for field in fields(NanoGPTConfig)),
    *NanoGPTConfig.attribute_map,  # nanoGPT's names
}


def publish_place(place: str) -> str:
    """Return an address without its secrets, or of a path on this machine the last part."""
    place = without_secrets(place)
    is_private = os.path.isabs(place) or place.startswith("~")
    return Path(place).name if is_private else place


def publish_command(words: Sequence[str]) -> list[str]:
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
            clean[name] = publish_command([str(word) for word in value])
    if isinstance(settings := metrics.get("settings"), dict) and "Tokenizer" in settings:
        clean["settings"] = settings | {"Tokenizer": publish_place(str(settings["Tokenizer"]))}
    return clean
