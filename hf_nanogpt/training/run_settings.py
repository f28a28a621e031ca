"""The settings that decide what a training learns, and whether a checkpoint was made with them."""

import itertools
import json
import zlib
from typing import Any

import numpy as np
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..checkpoint.steps import read_record
from ..configuration_nanogpt import NanoGPTConfig
from ..data.documents import DataArguments
from ..data.packing import PackedBlocks, PackedStream
from ..errors import UserError
from ..hub.publishable import publish_place
from .arguments import NanoGPTTrainingArguments
from .held_out import Estimate

logger = logging.get_logger(__name__)

# The training arguments that decide what is learnt. Trainer silently takes most of them from the
# checkpoint, whatever the user asks for.
_DECISIVE = (
    *("optim_recipe", "optim", "optim_args", "optim_target_modules", "momentum_warmup_steps"),
    *("learning_rate", "head_learning_rate", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("seed", "data_seed", "bf16", "fp16", "label_smoothing_factor"),
    *("neftune_noise_alpha", "train_sampling_strategy", "dataloader_drop_last", "document_mask"),
)
# These may change, with a warning. A user may want a longer run; and the same total batch size may
# be split in another way, which only regroups the same sums.
_LENGTH = ("max_steps", "num_train_epochs", "min_train_tokens")
_GROUPING = ("per_device_train_batch_size", "gradient_accumulation_steps", "processes")


def describe_settings(
    args: NanoGPTTrainingArguments,
    data_args: DataArguments,
    config: PreTrainedConfig,
    blocks: PackedBlocks | PackedStream,
    validation: PackedBlocks | PackedStream,
    adapter: str | None,
    estimate: Estimate | None,
) -> dict[str, Any]:
    """Return everything that decides what a training learns, as it comes back from JSON."""
    values = args.to_dict()
    accumulated = args.per_device_train_batch_size * args.gradient_accumulation_steps
    # Arguments, architecture, tokenizer, data.
    settings = {
        **{name: values[name] for name in (*_DECISIVE, *_LENGTH, *_GROUPING[:2])},
        "processes": args.world_size,
        "total batch size": accumulated * args.world_size * max(1, args.n_gpu),
        **{name: getattr(config, name) for name in NanoGPTConfig.__annotations__},
        "tokenizer": publish_place(data_args.tokenizer),  # the Hub gets this file
        "vocab_size": data_args.vocab_size,
        "chat_template": data_args.chat_template,
        "lora": adapter,
        "data": _identify(blocks),
        "validation data": _identify(validation),
        "eval_blocks": len(estimate.blocks) if estimate else None,
    }
    if args.metric_for_best_model:
        direction = "highest" if args.greater_is_better else "lowest"
        settings["metric_for_best_model"] = f"{args.metric_for_best_model}, {direction}"
    return json.loads(json.dumps(settings))


def _identify(blocks: PackedBlocks | PackedStream) -> str:
    """Tell one text from another by the number of blocks and a checksum of some of them."""
    if isinstance(blocks, PackedBlocks):
        some: Any = (blocks[i] for i in range(0, len(blocks), max(1, len(blocks) // 64)))
        name = f"{len(blocks)} blocks"
    else:
        some, name = itertools.islice(blocks, 8), "a stream"
    total = 0
    for row in some:
        total = zlib.crc32(np.asarray(row["input_ids"], dtype=np.int64).tobytes(), total)
    return f"{name} with checksum {total:08x}"


def check_settings_match(checkpoint: str, settings: dict[str, Any]) -> None:
    """Raise a `UserError`, or warn, if `checkpoint` was trained with other settings."""
    # What the checkpoint was trained with.
    record = read_record(checkpoint)
    if not record:
        raise UserError(
            f"{checkpoint} cannot be resumed exactly: it was saved with save_only_model, or not by "
            "this version of hf_nanogpt. Start a new training in another output_dir."
        )
    # Version 0.1.0 had no such choices, and evaluated on all.
    before = {"document_mask": True, "eval_blocks": None, "min_train_tokens": 0}
    before |= record["settings"]
    if isinstance(path := before.get("tokenizer"), str):  # as version 0.1.0 wrote it
        before["tokenizer"] = publish_place(path)
    # A run may begin or cease to look for its best model, but not by another metric.
    if "metric_for_best_model" in settings:
        before.setdefault("metric_for_best_model", settings["metric_for_best_model"])
    changed = [name for name, value in settings.items() if before.get(name) != value]

    def list_changes(names: list[str]) -> str:
        return ", ".join(f"{name}={settings[name]} (was {before.get(name)})" for name in names)

    # Refuse what would change the run; warn of what may change.
    if decisive := [name for name in changed if name not in (*_LENGTH, *_GROUPING)]:
        raise UserError(
            f"{checkpoint} was trained with other settings, so this would be a different run: "
            f"{list_changes(decisive)}. Use the former settings, or another output_dir."
        )
    if length := [name for name in changed if name in _LENGTH]:
        logger.warning(
            f"Resuming with {list_changes(length)}: the learning rate follows the new schedule "
            "from now on, so the result differs from a single run of this length."
        )
    if grouping := [name for name in changed if name in _GROUPING]:
        logger.warning(f"Resuming with {list_changes(grouping)}: equal up to rounding only.")
