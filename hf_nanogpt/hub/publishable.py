"""Remove from the facts of a training what must not be published: secrets and local paths."""

import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..configuration_nanogpt import NanoGPTConfig
from ..errors import without_secrets

# The flags that a card may show: those that decide the result, and none that can hold a token or
# the name of a machine. What is not listed is not published.
_PUBLISHED = {
    *("from", "held_out"),
    *("data", "validation_data", "validation_fraction", "text_column", "dataset_config"),
    *("dataset_split", "streaming", "validation_documents", "tokenizer", "vocab_size"),
    *("context_length", "chat_template"),
    *("max_steps", "num_train_epochs", "min_train_tokens", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "auto_find_batch_size", "train_sampling_strategy"),
    *("dataloader_drop_last", "seed", "data_seed"),
    *("optim", "load_best_model_at_end", "keep_best", "patience", "eval_tokens"),
    *("metric_for_best_model", "greater_is_better", "eval_strategy", "eval_steps", "save_strategy"),
    "save_steps",
    *("optim_recipe", "learning_rate", "head_learning_rate", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("momentum_warmup_steps", "lr_scheduler_type", "warmup_steps"),
    *("label_smoothing_factor", "neftune_noise_alpha", "average_tokens_across_devices"),
    "document_mask",
    *("bf16", "fp16", "tf32", "torch_compile", "gradient_checkpointing"),
    *("lora", "lora_rank", "lora_alpha"),
    "preset",
    *(field.name for field in fields(NanoGPTConfig)),
    *NanoGPTConfig.attribute_map,  # nanoGPT's names
}


def publish_place(place: str) -> str:
    """Return an address without its secrets; of a path on this machine, only the last part."""
    place = without_secrets(place)
    is_private = os.path.isabs(place) or place.startswith("~")
    return Path(place).name if is_private else place


def publish_command(command: Sequence[str]) -> list[str]:
    """Return a command without the flags that must not be shown, in any spelling."""
    kept: list[str] = []
    is_shown = True
    for part in command:
        if part.startswith("--"):
            flag, equals, value = part.partition("=")
            name = flag.removeprefix("--").replace("-", "_")
            is_shown = name.removeprefix("no_") in _PUBLISHED
            part = f"--{name}{equals}{publish_place(value)}"
        else:  # the value of the flag before it, or an argument before all flags
            part = publish_place(part)
        if is_shown:
            kept.append(part)
    return kept


def read_command(command: Sequence[Any]) -> dict[str, str]:
    """Return the flags of a command from `metrics.json`, each with the word behind it."""
    words = [str(word) for word in command]
    return dict(zip([word.removeprefix("--") for word in words], [*words[1:], ""], strict=True))


def publish_facts(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a `metrics.json`, cleaned of what earlier versions wrote into it."""
    clean = dict(metrics)
    for name in ("data", "start_from"):
        if isinstance(value := metrics.get(name), str):
            clean[name] = publish_place(value)
    for name in ("command", "eval_command"):
        if isinstance(value := metrics.get(name), list):
            clean[name] = publish_command([str(part) for part in value])
    if isinstance(settings := metrics.get("settings"), dict) and "Tokenizer" in settings:
        clean["settings"] = settings | {"Tokenizer": publish_place(str(settings["Tokenizer"]))}
    return clean
