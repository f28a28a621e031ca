"""Training from settings to a written checkpoint, by `NanoGPTTrainer`."""

import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

from ..checkpoint.folder import (
    check_output_dir,
    clear_output_dir,
    clear_unfinished,
    explain_write_errors,
    find_intact_checkpoint,
    load_checkpoint,
    split_revision,
    staged_folder,
)
from ..checkpoint.foreign import read_tokenizer
from ..configuration_nanogpt import NanoGPTConfig
from ..data.conversations import add_chat_template
from ..data.documents import DataArguments
from ..data.encoding import decode_ids, is_learnt
from ..data.packing import PackedBlocks, PackedStream, cut_blocks
from ..data.sources import STDLIB
from ..data.stored import load_tokens
from ..errors import UserError
from ..evaluation import check_context_length
from ..hub import render_model_card, write_card
from ..modeling_nanogpt import NanoGPTForCausalLM
from .arguments import NanoGPTTrainingArguments, as_flags, check_text, make_config, parse_settings
from .callbacks import (
    PlotCallback,
    SampleCallback,
    draw_sample,
    plot_losses,
)
from .facts import collect_facts
from .locking import lock_output_dir
from .lora import add_adapter, describe_adapter, merge_adapter
from .stopping import check_settings, describe_settings, stop_on_signals
from .trainer import NanoGPTTrainer

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class TrainingResult:
    """Where the checkpoint is, the content of its `metrics.json`, and what it made of a prompt."""

    output_dir: Path
    metrics: dict[str, Any]
    prompt: str
    sample: str


def train(
    recipe: str | Path = "quickstart",
    flags: Sequence[str] = (),
    *,
    start_from: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    **settings: Any,
) -> TrainingResult:
    """Train a tokenizer and a model, and write the checkpoint folder.

    Args:
        recipe: the name of one of ours, or the path of a YAML file.
        flags: settings as on the command line; they win.
        start_from: folder or Hub id of a checkpoint whose model and tokenizer to go on with; by
            default both are made from nothing. It is measured first: what it made of the held-out
            text and of the prompt is in `metrics["before"]`.
        resume: go on from the last whole `checkpoint-*` in `output_dir`, exact to the bit, or from
            the beginning if there is none yet.
        overwrite: delete what an earlier training left in `output_dir`.
        settings: those of `DataArguments`, `NanoGPTConfig` (also by nanoGPT's names), `preset`, and
            `NanoGPTTrainingArguments`, for example `max_steps=100, n_layer=6`.

    Raises:
        UserError: a setting, the data or the output folder is not usable, or another training has
            that folder, and nothing was written; or the loss is no longer finite, or a checkpoint
            could not be written.
        TrainingInterrupted: a `KeyboardInterrupt`; Ctrl-C, SIGTERM or SIGHUP came while it trained,
            and a checkpoint was saved first.
    """
    check_text(str(start_from))
    data_args, architecture, args = parse_settings(recipe, flags, **settings)
    if start_from and Path(start_from).resolve().is_relative_to(Path(args.output_dir).resolve()):
        raise UserError(
            f"output_dir={args.output_dir} holds {start_from}, the model to go on with: choose "
            "another output_dir."
        )
    with lock_output_dir(args.output_dir) if args.should_save else nullcontext():
        check_output_dir(args.output_dir, overwrite=overwrite, resume=resume)
        return _train(
            str(recipe),
            [*as_flags(settings), *flags],
            data_args,
            architecture,
            args,
            start_from=start_from,
            resume=resume,
            overwrite=overwrite,
        )


def _train(
    recipe: str,
    flags: list[str],
    data_args: DataArguments,
    architecture: dict[str, Any],
    args: NanoGPTTrainingArguments,
    *,
    start_from: str | Path | None,
    resume: bool,
    overwrite: bool,
) -> TrainingResult:
    last_checkpoint = _find_start(args) if resume else None
    trainer, length = _make_trainer(data_args, architecture, args, start_from, last_checkpoint)
    held_out = next(iter(trainer.eval_dataset))["input_ids"]
    prompt = _choose_prompt(args, data_args, trainer.processing_class, held_out)
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        trainer.add_callback(SampleCallback(prompt, trainer.speed))
    trainer.add_callback(PlotCallback(trainer.speed))
    sample = _draw(trainer, trainer.model, prompt) if start_from and args.should_save else ""
    if args.should_save and overwrite:
        clear_output_dir(args.output_dir)
    elif args.should_save and resume:
        clear_unfinished(args.output_dir, last_checkpoint)
    with stop_on_signals(trainer):
        trainer.train(resume_from_checkpoint=last_checkpoint)
    seconds = time.perf_counter() - trainer.started
    if args.lora:
        trainer.model = merge_adapter(
            trainer.model, trainer.processing_class, args.output_dir, save=args.should_save
        )
    metrics = _collect_metrics(trainer, seconds)
    if start_from and (first := _evaluations(trainer)[0])["step"] == 0:
        metrics["before"] = _pick_figures(first) | {"sample": sample}
    metrics |= collect_facts(
        recipe,
        flags,
        start_from=start_from,
        data_args=data_args,
        args=args,
        context_length=length,
    )
    metrics["is_chat"] = trainer.processing_class.chat_template is not None
    result = _write_artifacts(trainer, metrics, prompt=prompt)
    if args.push_to_hub:
        trainer.push_to_hub()
    return result


def _find_start(args: NanoGPTTrainingArguments) -> str | None:
    """Return the checkpoint to resume from, in all processes that which the first has found."""
    found = find_intact_checkpoint(args.output_dir) if args.process_index == 0 else None
    if args.world_size > 1:
        [found] = broadcast_object_list([found])
    if not found and args.should_save:
        logger.warning(f"{args.output_dir} has no checkpoint yet: training begins at the start.")
    return found


def _make_trainer(
    data_args: DataArguments,
    architecture: dict[str, Any],
    args: NanoGPTTrainingArguments,
    start_from: str | Path | None,
    last_checkpoint: str | None,
) -> tuple[NanoGPTTrainer, int]:
    """Return the trainer of a model on its data, and the tokens in a block."""
    model, own = _load_start(start_from, architecture, args)
    known = len(own) if own else 0
    if own:
        add_chat_template(own, data_args.chat_template, model=model)
    # Refuse an impossible architecture now, not after minutes of preparing data for it.
    config = model.config if model else make_config(architecture, vocab_size=data_args.vocab_size)
    check_context_length(config, data_args.context_length)
    with args.main_process_first(desc="preparing the data"):
        if last_checkpoint:
            own = read_tokenizer(Path(last_checkpoint))
        tokenizer, tokens, held_out = load_tokens(data_args, own)
        if model is None:
            config = make_config(architecture, **_vocabulary(tokenizer))
        tokenizer.model_max_length = config.max_position_embeddings
        length = check_context_length(config, data_args.context_length)
        cut: dict[str, Any] = {"context_length": length, "eos_token_id": tokenizer.eos_token_id}
        seed = args.seed if args.data_seed is None else args.data_seed
        blocks, validation = cut_blocks(tokens, seed=seed, **cut), cut_blocks(held_out, **cut)
    _check_blocks(blocks, length, args)
    settings = describe_settings(
        args,
        data_args,
        config,
        blocks=blocks,
        validation=validation,
        adapter=describe_adapter(model, args),
    )
    if last_checkpoint:
        check_settings(last_checkpoint, settings)

    set_seed(args.seed)
    if model is None:
        model = NanoGPTForCausalLM(config)
        add_chat_template(tokenizer, data_args.chat_template, model=model)
    if args.lora:
        grown, (_, revision) = len(tokenizer) > known, split_revision(str(start_from))
        model = add_adapter(model, args, with_embeddings=grown, revision=revision)
    args.eval_on_start = (args.eval_on_start or bool(start_from)) and not last_checkpoint
    datasets = {"train_dataset": blocks, "eval_dataset": validation}
    trainer = NanoGPTTrainer(model, args, **datasets, processing_class=tokenizer)
    trainer.settings = settings
    trainer.speed.context_length = length
    return trainer, length


def _load_start(
    start_from: str | Path | None, architecture: dict[str, Any], args: NanoGPTTrainingArguments
) -> tuple[PreTrainedModel | None, PreTrainedTokenizerBase | None]:
    """Load what training goes on with, in float32, as the optimizer needs it."""
    if start_from is None:
        if args.lora:
            raise UserError("lora=True adapts a trained model: give one by --from CHECKPOINT.")
        return None, None
    if architecture:
        raise UserError(
            f"The architecture is that of {start_from}, and {', '.join(architecture)} cannot be "
            "chosen as well: leave it out, and take a recipe without it, such as finetune."
        )
    model, tokenizer = load_checkpoint(start_from)
    if (kind := model.config.model_type) != NanoGPTConfig.model_type:
        raise UserError(
            f"{start_from} is a model of type {kind!r}: make it one of ours first, hf-nanogpt "
            f"convert {start_from} FOLDER, and go on --from FOLDER."
        )
    if tokenizer is None or tokenizer.eos_token_id is None:
        raise UserError(f"{start_from} has no tokenizer with an eos_token, to end documents with.")
    return model.float().train(), tokenizer


def _choose_prompt(
    args: NanoGPTTrainingArguments,
    data_args: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    held_out: np.ndarray,
) -> str:
    """Return the prompt of the sample: the user's, or one that suits the text.

    Of conversations it is what comes before the first answer, the first token to be learnt.
    """
    if args.sample_prompt is not None:
        return args.sample_prompt
    if data_args.data == STDLIB:
        return "def main("
    if not (learnt := is_learnt(held_out)).all():
        end = learnt.argmax() or len(held_out) // 2  # else a part of the question
        return tokenizer.decode(decode_ids(held_out[:end]))
    words = tokenizer.decode(held_out, skip_special_tokens=True).split()
    return " ".join(words[:3])[: min(40, len(held_out) // 2)]


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    ids = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    return {"vocab_size": len(tokenizer), **ids}


def _check_blocks(
    blocks: PackedBlocks | PackedStream, length: int, args: NanoGPTTrainingArguments
) -> None:
    if isinstance(blocks, PackedStream):
        if args.max_steps <= 0:
            raise UserError(f"max_steps={args.max_steps}: a stream has no end, so give max_steps.")
    elif len(blocks) == 1 and (tokens := len(blocks[0]["input_ids"])) < length:
        raise UserError(
            f"The training text has {tokens} tokens, fewer than one block of context_length="
            f"{length}: give more text, or a smaller block_size or context_length."
        )
    elif not any(is_learnt(blocks[i]["input_ids"]).any() for i in range(len(blocks))):
        raise UserError(
            "No message of the training data is an assistant's: there is nothing to learn."
        )


def _collect_metrics(trainer: NanoGPTTrainer, seconds: float) -> dict[str, Any]:
    state, history = trainer.state, _evaluations(trainer)
    fresh = history and history[-1]["step"] == state.global_step
    last = history[-1] if fresh and not trainer.args.load_best_model_at_end else trainer.evaluate()
    return {
        **_pick_figures(last),
        "eval_tokens": last["eval_tokens"],
        "eval_bytes": last["eval_bytes"],
        "num_parameters": trainer.model.num_parameters(),
        "train_steps": state.global_step,
        "train_tokens": state.num_input_tokens_seen,
        "train_seconds": round(seconds, 2),
        **trainer.speed.summarize(state),
    }


def _evaluations(trainer: NanoGPTTrainer) -> list[dict[str, float]]:
    return [row for row in trainer.state.log_history if "eval_loss" in row]


def _pick_figures(row: dict[str, float]) -> dict[str, float]:
    return {
        "eval_loss": row["eval_loss"],
        "perplexity": row["eval_perplexity"],
        "bits_per_byte": row["eval_bits_per_byte"],
    }


def _draw(trainer: NanoGPTTrainer, model: torch.nn.Module, prompt: str) -> str:
    seed, tokenizer = trainer.args.seed, trainer.processing_class
    return draw_sample(model, tokenizer, prompt, max_new_tokens=120, seed=seed)


def _gather_model(trainer: NanoGPTTrainer) -> NanoGPTForCausalLM:
    """Return the trained model, put together from its shards on the process that saves."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not trainer.is_fsdp_enabled:
        return model
    state_dict = trainer.accelerator.get_state_dict(trainer.model)  # every process takes part
    if not trainer.args.should_save:
        return model
    whole = NanoGPTForCausalLM.from_pretrained(
        None, config=model.config, state_dict=state_dict, trust_remote_code=False
    )
    whole.generation_config = model.generation_config
    return whole


def _write_artifacts(
    trainer: NanoGPTTrainer, metrics: dict[str, Any], *, prompt: str
) -> TrainingResult:
    args, tokenizer = trainer.args, trainer.processing_class
    model = _gather_model(trainer)
    output_dir, sample = Path(args.output_dir), ""
    if not args.should_save:
        return TrainingResult(output_dir, metrics, prompt, sample)
    sample = _draw(trainer, model, prompt)
    metrics |= {"prompt": prompt, "sample": sample}
    card = render_model_card(model.config, metrics, name=output_dir.name)
    with explain_write_errors(output_dir, run=output_dir), staged_folder(output_dir) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        try:
            write_card(card, output_dir / "README.md", to=folder / "README.md")
        except ValueError as error:  # no reason to lose the training: the old card stays
            logger.warning(str(error))
        plot_losses(
            trainer.state.log_history, folder / "loss.png", title=f"{output_dir.name}: loss"
        )
    return TrainingResult(output_dir, metrics, prompt, sample)
