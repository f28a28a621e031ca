"""What `metrics.json` and the model card say about a training: its results and how to repeat it."""

import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from .. import __version__
from ..data.documents import DataArguments
from ..data.encoding import is_learnt
from ..data.packing import PackedBlocks
from ..data.stored import holds_tokens
from ..hub.publishable import publish_command, publish_place
from .arguments import NanoGPTTrainingArguments
from .held_out import Estimate, count_tokens
from .recipes import CHOSEN, Choice
from .trainer import NanoGPTTrainer

_FEW_TOKENS = 1_000  # learnt ones that are held out
_LONG = 100_000  # tokens; if more are held out, enough of them are learnt


def describe_plan(
    trainer: NanoGPTTrainer,
    recipe: str | Path | Choice,
    start_from: str | Path | None,
    data_args: DataArguments,
    *,
    steps: int,
    steps_per_epoch: int,
) -> str:
    """Return what a training of so many steps is about to do, a line for each fact."""
    args, blocks, held_out = trainer.args, trainer.train_dataset, trainer.eval_dataset
    # A stream has no known size.
    learnt, measured = (
        f"{side.num_tokens - side.num_padding:,} tokens"
        if isinstance(side, PackedBlocks)
        else "a stream"
        for side in (blocks, held_out)
    )
    passes = f", {steps / steps_per_epoch:,.2f} passes over the data"
    model = trainer.model
    count, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    part = f", {trained:,} of them trained" if trained < count else ""
    length, context = trainer.speed.context_length, model.config.max_position_embeddings
    if length and length < context:
        part += f"; blocks of {length:,} tokens of its {context:,} (--context_length)"
    evaluation = None
    if trainer.estimate and isinstance(held_out, PackedBlocks) and args.eval_strategy != "no":
        evaluation = _describe_evaluation(trainer.estimate, held_out)
    facts = {
        "data": f"{learnt} to train on, {measured} held out",
        "tokenizer": _describe_tokenizer(trainer, start_from, data_args),
        "model": f"{count:,} parameters{part}",
        "evaluation": evaluation,
        "steps": f"{steps:,}{passes if isinstance(blocks, PackedBlocks) else ''}",
        "recipe": f"{Path(str(recipe)).name}, {_name_optimizer(args)}, "
        f"peak rate {args.learning_rate:g}",
    }
    reasons = recipe.reasons if isinstance(recipe, Choice) else ()
    lines = [*facts.items(), *(("chosen", reason) for reason in reasons)]
    return "\n".join(f"{name:<10} {fact}" for name, fact in lines if fact)


def _describe_evaluation(estimate: Estimate, held_out: PackedBlocks) -> str:
    """Say what the loss is estimated on while training."""
    count = count_tokens(estimate.blocks)
    rows = (estimate.blocks[i]["input_ids"] for i in range(len(estimate.blocks)))
    what = "tokens" if all(is_learnt(row[1:]).all() for row in rows) else "tokens of answers"
    if len(estimate.blocks) == len(held_out):
        told, total = f"on all {count:,} {what}", count
    else:
        half = ", in one half of the held-out text" if estimate.has_halves else ""
        total = count_tokens(held_out) if held_out.num_tokens < _LONG else _FEW_TOKENS
        told = f"on {count:,} {what}{half}; at the end on all"
    return told + ("; so few make rough figures: hold out more" if total < _FEW_TOKENS else "")


def collect_metrics(
    trainer: NanoGPTTrainer, seconds: float, *, sample_before: str | None
) -> dict[str, Any]:
    """Return the figures of a training that is done.

    With `sample_before`, what the model to start from wrote, its own figures are under `before`.
    """
    state = trainer.state
    history = state.log_history
    kept_step = find_kept_step(trainer)
    evaluated = (row for row in history if "eval_loss" in row and row["step"] == kept_step)
    kept_tokens = next(evaluated, {}).get("num_input_tokens_seen", state.num_input_tokens_seen)
    final = trainer.measure()
    metrics: dict[str, Any] = {
        **_pick_figures(final),
        "eval_tokens": final["eval_tokens"],
        "eval_bytes": final["eval_bytes"],
        "num_parameters": trainer.model.num_parameters(),
        "train_steps": state.global_step,
        "kept_step": kept_step,
        "kept_tokens": kept_tokens,
        "planned_steps": state.max_steps,
        "train_tokens": state.num_input_tokens_seen,
        "train_seconds": round(seconds, 2),
        **trainer.speed.summarize(state),
    }
    if final.get("eval_fresh_tokens") and _find_best_step(trainer) is not None:
        metrics["fresh_half"] = _pick_figures(final, "eval_fresh") | {
            "eval_tokens": final["eval_fresh_tokens"]
        }
    before = next((row for row in history if "before_loss" in row), None)
    if sample_before is not None and before:
        metrics["before"] = _pick_figures(before, "before") | {"sample": sample_before}
    return metrics


def _pick_figures(row: dict[str, float], prefix: str = "eval") -> dict[str, float]:
    return {
        "eval_loss": row[f"{prefix}_loss"],
        "perplexity": row[f"{prefix}_perplexity"],
        "bits_per_byte": row[f"{prefix}_bits_per_byte"],
    }


def collect_facts(
    trainer: NanoGPTTrainer,
    recipe: str,
    flags: Sequence[str],
    start_from: str | Path | None,
    data_args: DataArguments,
) -> dict[str, Any]:
    """Return data, command, settings, hardware and versions of a training.

    They are made to be published: only the settings listed here are shown, an address without user
    and query, which may be secrets, and an absolute path by its last part.
    """
    # The command that repeats the training, and the size of a step.
    args, length = trainer.args, trainer.speed.context_length
    named = [] if recipe == CHOSEN else [recipe]
    start = ["--from", str(start_from)] if start_from else []
    size = trainer.state.train_batch_size if args.auto_find_batch_size else args.train_batch_size
    batch = (size or 1) * args.gradient_accumulation_steps * args.world_size
    return {
        "recipe": Path(recipe).name,
        "data": publish_place(data_args.data),
        "datasets": [data_args.data] if _is_hub_dataset(data_args.data) else [],
        "start_from": start_from and publish_place(str(start_from)),
        "command": publish_command(["hf-nanogpt", "train", *named, *start, *flags]),
        "eval_command": _repeat_evaluation(trainer, data_args),
        "settings": {
            "Tokenizer": _describe_tokenizer(trainer, start_from, data_args),
            "Batch": f"{batch} blocks of {length} tokens",
            "Optimizer": _name_optimizer(args),
            "Learning rate": args.learning_rate,
            "Learning rate of the head": args.head_learning_rate,
            "Schedule": SchedulerType(args.lr_scheduler_type).value,
            "Weight decay": args.weight_decay,
            "Precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
            "Documents of a block": None if args.document_mask else "see those before them",
            "Seed": args.seed,
            "LoRA": _describe_adapter(args),
            "Weights": _describe_weights(trainer),
        },
        "hardware": _describe_hardware(args),
        "versions": {"hf_nanogpt": __version__, "python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "datasets", "tokenizers")},
    }


def _describe_tokenizer(
    trainer: NanoGPTTrainer, start_from: str | Path | None, data_args: DataArguments
) -> str:
    """Say where the tokenizer in the folder comes from, and its size."""
    if start_from:
        origin = f"that of {publish_place(str(start_from))}"
    elif holds_tokens(Path(data_args.data)):
        origin = "that of the data"
    else:
        origin = publish_place(data_args.tokenizer)
    return f"{origin}, {len(trainer.processing_class):,} tokens"


def _describe_weights(trainer: NanoGPTTrainer) -> str | None:
    state, args = trainer.state, trainer.args
    step, metric = find_kept_step(trainer), "validation loss"
    if args.load_best_model_at_end and state.best_model_checkpoint:
        metric = args.metric_for_best_model or metric
    elif step == state.global_step:
        return None
    return f"of step {step:,}, the best by {metric}"


def find_kept_step(trainer: NanoGPTTrainer) -> int:
    """Return the step after which the weights were as they are kept."""
    best = _find_best_step(trainer)
    return trainer.state.global_step if best is None else best


def _find_best_step(trainer: NanoGPTTrainer) -> int | None:
    """Return the step of the weights that an evaluation chose; None if the last ones are kept."""
    state = trainer.state
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint:
        return state.best_global_step or 0
    return trainer.best.step if trainer.best else None


def _name_optimizer(args: NanoGPTTrainingArguments) -> str:
    return OptimizerNames(args.optim).value if args.optim else args.optim_recipe


def _describe_adapter(args: NanoGPTTrainingArguments) -> str | None:
    return f"rank {args.lora_rank}, alpha {args.lora_alpha}, merged" if args.lora else None


def _is_hub_dataset(data: str) -> bool:
    """Say whether data came from the Hub: it looks like an id, and is not a path."""
    return not Path(data).exists() and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", data))


def _repeat_evaluation(trainer: NanoGPTTrainer, data_args: DataArguments) -> list[str] | None:
    """Return the arguments of `hf-nanogpt eval` that measure on the same text, if it can."""
    default, folder = DataArguments(), Path(data_args.data)
    # Not on tokens without their text, nor on what `eval` has no flags for.
    if holds_tokens(folder):
        return None
    if data_args.streaming or data_args.dataset_config or data_args.dataset_split != "train":
        return None
    flags = ["--data", publish_place(data_args.validation_data or data_args.data)]
    if not data_args.validation_data:
        flags += ["--held_out", str(data_args.validation_fraction)]
    if data_args.text_column != default.text_column:
        flags += ["--text_column", data_args.text_column]
    if (length := trainer.speed.context_length) != trainer.model.config.max_position_embeddings:
        flags += ["--context_length", str(length)]
    if not trainer.args.document_mask:
        flags += ["--no_document_mask"]
    return flags


def _describe_hardware(args: NanoGPTTrainingArguments) -> str:
    if args.device.type == "cuda":
        return f"{args.world_size} x {torch.cuda.get_device_name(args.device)}"
    if args.device.type == "cpu":
        processes = f"{args.world_size} processes of " if args.world_size > 1 else ""
        return f"{processes}{torch.get_num_threads()} CPU threads ({platform.machine()})"
    return f"{args.world_size} x {args.device.type}"
