"""Training from settings to a written checkpoint folder."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging

from ..checkpoint.foreign import read_tokenizer
from ..checkpoint.loading import split_revision
from ..checkpoint.steps import find_intact_checkpoint, read_record
from ..checkpoint.writing import (
    check_output_dir,
    clear_output_dir,
    clear_unfinished,
    explain_write_errors,
    staged_folder,
)
from ..data.corpus import Corpus, prepare_tokenizer
from ..data.documents import DataArguments
from ..data.encoding import is_learnt
from ..data.stored import prepare_data
from ..errors import UserError, is_out_of_memory, printable, settings_errors
from ..hub import render_model_card, write_card
from .arguments import NanoGPTTrainingArguments, check_text, parse_settings
from .baseline import measure_ngram
from .best import BestCallback
from .callbacks import PlotCallback, SpeedCallback, plot_losses, warn_if_unwritable
from .choosing import settle_recipe, store_recipe
from .evaluating import StartCallback, use_threads
from .facts import collect_facts, collect_metrics, describe_plan
from .forgetting import remember_place, tell_forgetting
from .held_out import Estimate, choose_estimate
from .locking import lock_output_dir
from .lora import add_adapter, describe_adapter, merge_adapter
from .preparing import Blocks, load_start, prepare_blocks, prepare_config, prepare_model
from .progress import show
from .recipes import Choice, as_flags
from .run_settings import check_settings_match, describe_settings
from .samples import SampleCallback, choose_prompt, draw_sample, read_prompt, set_sampling
from .stopping import follow_launcher, name_missing_ranks, stop_on_signals
from .trainer import NanoGPTTrainer

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class TrainingResult:
    """Where the checkpoint is, the content of its `metrics.json`, and a sample of its writing.

    `metrics["samples"]` has three, `sample` is the first, `question` a chat's prompt in plain text.
    """

    output_dir: Path
    metrics: dict[str, Any]
    prompt: str
    sample: str
    question: str = ""


def train(
    recipe: str | Path | None = None,
    flags: Sequence[str] = (),
    *,
    start_from: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    **settings: Any,
) -> TrainingResult:
    """Train a tokenizer and a model, and write the checkpoint folder.

    Args:
        recipe: the name of a recipe of the package, or the path of a YAML file; by default what
            suits the text (see choosing.py), `finetune` with `start_from`, or `quickstart`.
        flags: settings as on the command line; they win over `settings`.
        start_from: folder or Hub id of a checkpoint to continue training; by default, model and
            tokenizer are made from scratch. It is measured first: its loss on the held-out text and
            what it writes after the prompt are in `metrics["before"]`. Its weights stay if no step
            made that loss lower, and `metrics["old_text"]` says what the training cost on the text
            of the training before, if that is on this machine.
        resume: continue an interrupted run from the last whole `checkpoint-*` in `output_dir`,
            exact to the bit, or from the beginning if there is none yet.
        overwrite: delete what an earlier training left in `output_dir`.
        settings: those of `DataArguments`, `NanoGPTConfig` (nanoGPT's names work too), `preset`,
            and `NanoGPTTrainingArguments`, for example `max_steps=100, n_layer=6`.

    Raises:
        UserError: a setting, the data or the output folder is not usable, or another training uses
            that folder, and nothing was written; or the loss became NaN or infinite, memory ran
            out, or a checkpoint could not be written.
        TrainingInterrupted: a `KeyboardInterrupt`; Ctrl-C, SIGTERM or SIGHUP came during training,
            and a checkpoint was saved first.
    """
    typed = [*as_flags(settings), *flags]
    chosen = settle_recipe(recipe, typed, start_from=start_from, resume=resume)
    data_args, architecture, args = parse_settings(chosen, typed)
    _check_start(start_from, args, data_args)

    lock = lock_output_dir(args.output_dir) if args.should_save else nullcontext()
    with follow_launcher(), use_threads(args), lock, _explain_out_of_memory(args):
        check_output_dir(args.output_dir, overwrite=overwrite, resume=resume)
        last_checkpoint = _find_checkpoint(args) if resume else None
        # Measure the model to start from before the first step, but not again when resuming.
        evaluate_first = (args.eval_on_start or bool(start_from)) and not last_checkpoint
        args = replace(args, eval_on_start=evaluate_first)
        trainer, corpus, prompt = _prepare(
            data_args, architecture, args, start_from, last_checkpoint
        )
        _show_plan(trainer, chosen, start_from, data_args, last_checkpoint)
        before = None
        if start_from:
            trainer.add_callback(StartCallback(trainer))
            before = _draw(trainer, trainer.model, prompt) if args.should_save else ""

        # Until here nothing has been written or deleted.
        if args.should_save and overwrite:
            clear_output_dir(args.output_dir, str(chosen))
        elif args.should_save and resume:
            clear_unfinished(args.output_dir, last_checkpoint)
        if args.should_save:
            store_recipe(chosen, args.output_dir)
        seconds = _fit(trainer, last_checkpoint)

        # Gather what metrics.json and the card say, and write the folder.
        validation = next(iter(cast(Any, trainer.eval_dataset)))
        metrics = {
            **collect_metrics(trainer, seconds, sample_before=before),
            **collect_facts(trainer, str(chosen), typed, start_from, data_args),
            "is_chat": trainer.processing_class.chat_template is not None,
            # In conversations only the answers are learnt, in other text every token.
            "learnt_answers": not all(is_learnt(validation["input_ids"])),
        }
        if args.should_save and (ngram := measure_ngram(corpus)):
            metrics["ngram"] = ngram
        if args.should_save:
            if start_from and not args.is_sharded:
                metrics |= tell_forgetting(trainer, start_from, data_args.data)
            remember_place(data_args.data, metrics)
        result = _write_folder(trainer, metrics, prompt)
        if args.push_to_hub:
            trainer.push_to_hub()
        return result


@contextmanager
def _explain_out_of_memory(args: NanoGPTTrainingArguments) -> Iterator[None]:
    """Say what to lower if a GPU, or this machine, has not enough memory."""
    try:
        yield
    except (MemoryError, RuntimeError, UserError) as error:  # torch's are RuntimeErrors
        if not is_out_of_memory(error):
            raise
        recompute = "" if args.gradient_checkpointing else ", add gradient_checkpointing"
        # Without a cause, or the command line would say something shorter.
        raise UserError(
            f"There is not enough memory on {args.device.type} for train: lower "
            f"per_device_train_batch_size={args.per_device_train_batch_size} (with "
            f"gradient_accumulation_steps={args.gradient_accumulation_steps} raised by the same "
            "factor it is the same training, and resume continues it), "
            f"per_device_eval_batch_size={args.per_device_eval_batch_size}, block_size or the size "
            f"of the model{recompute}."
        ) from None


def _check_start(
    start_from: str | Path | None, args: NanoGPTTrainingArguments, data_args: DataArguments
) -> None:
    check_text(str(start_from))
    for name in ("tokenizer", "vocab_size"):
        if start_from and (value := getattr(data_args, name)) != getattr(DataArguments, name):
            raise UserError(
                f"{start_from} has its own tokenizer, so {name}={value} cannot be set: leave it "
                "out, and use a recipe without it, such as finetune."
            )
    if args.lora and start_from is None:
        raise UserError("lora=True adapts a trained model: name one by --from CHECKPOINT.")
    if start_from and Path(start_from).resolve().is_relative_to(Path(args.output_dir).resolve()):
        raise UserError(
            f"output_dir={args.output_dir} holds {start_from}, the model to start from: choose "
            "another output_dir."
        )


def _find_checkpoint(args: NanoGPTTrainingArguments) -> str | None:
    """Return the checkpoint to resume from; all processes take the one that the first finds."""
    found = find_intact_checkpoint(args.output_dir) if args.process_index == 0 else None
    if args.world_size > 1:
        [found] = broadcast_object_list([found])
    if not found and args.should_save:
        logger.warning(f"{args.output_dir} has no checkpoint yet: training starts from scratch.")
    if found and "min_train_tokens" not in read_record(found).get("settings", {}):
        args.min_train_tokens = 0  # as before there was this setting
    return found


def _prepare(
    data_args: DataArguments,
    architecture: dict[str, Any],
    args: NanoGPTTrainingArguments,
    start_from: str | Path | None,
    last_checkpoint: str | None,
) -> tuple[NanoGPTTrainer, Corpus, str]:
    """Return the trainer of a model on its data, the data, and the prompt of the samples."""
    start = load_start(start_from, architecture) if start_from else None
    # Refuse an impossible architecture before preparing data for it.
    config, length = prepare_config(architecture, data_args, start)

    # Data, tokenizer, model.
    with args.main_process_first(desc="preparing the data"):
        known_tokenizer = start.tokenizer if start else None
        # A resumed run has one already, and does not train it again.
        if last_checkpoint:
            known_tokenizer = read_tokenizer(Path(last_checkpoint))
        corpus = prepare_data(data_args)
        context = config.max_position_embeddings
        tokenizer = prepare_tokenizer(data_args, corpus, known_tokenizer, max_length=context)
        blocks, validation = prepare_blocks(data_args, args, corpus, tokenizer, length)
    model = prepare_model(config, data_args, args, tokenizer, start)

    # A resumed run must be the same run.
    adapter = describe_adapter(model, args)
    estimate = _choose_estimate(validation, args, blocks, length, last_checkpoint)
    settings = describe_settings(
        args, data_args, model.config, blocks, validation, adapter, estimate
    )
    if last_checkpoint:
        check_settings_match(last_checkpoint, settings)

    # With LoRA, new tokens need embeddings that are trained too.
    if args.lora and start:
        set_seed(args.seed)
        grown, (_, revision) = len(tokenizer) > start.num_tokens, split_revision(str(start_from))
        model = add_adapter(model, args, with_embeddings=grown, revision=revision)
    first = next(iter(validation))["input_ids"]
    prompt = choose_prompt(args, data_args, tokenizer, first, context_length=length)
    parts = {"train_dataset": blocks, "eval_dataset": validation, "processing_class": tokenizer}
    trainer = _make_trainer(
        model, args, prompt, length, settings=settings, estimate=estimate, **parts
    )
    return trainer, corpus, prompt


def _choose_estimate(
    validation: Blocks,
    args: NanoGPTTrainingArguments,
    blocks: Blocks,
    context_length: int,
    last_checkpoint: str | None,
) -> Estimate | None:
    """Return what is evaluated while training: in a resumed run the same as before, even longer."""
    count = None
    if last_checkpoint and not args.eval_tokens:
        count = read_record(last_checkpoint).get("settings", {}).get("eval_blocks")
        if not isinstance(count, int):  # version 0.1.0 evaluated on all
            return None
    return choose_estimate(validation, args, blocks, context_length=context_length, count=count)


def _show_plan(
    trainer: NanoGPTTrainer,
    recipe: str | Path | Choice,
    start_from: str | Path | None,
    data_args: DataArguments,
    last_checkpoint: str | None,
) -> None:
    """Check the loader and the schedule, and print what the training is about to do."""
    args = trainer.args
    with settings_errors():  # of the loader
        _, per_epoch, *_, steps = trainer.set_initial_training_values(
            args, trainer.get_train_dataloader()
        )
    if args.process_index == 0 and not args.disable_tqdm:
        plan = describe_plan(
            trainer, recipe, start_from, data_args, steps=steps, steps_per_epoch=per_epoch
        )
        if last_checkpoint:
            plan += f"\nResumed from step {last_checkpoint.rpartition('-')[2]} of {steps}."
        with warn_if_unwritable("The plan"):
            show(printable(plan))


def _make_trainer(
    model: PreTrainedModel,
    args: NanoGPTTrainingArguments,
    prompt: str,
    context_length: int,
    **parts: Any,
) -> NanoGPTTrainer:
    """Return a trainer that shows speed, samples and a plot."""
    speed = SpeedCallback(context_length=context_length)
    # One process alone cannot write a sample with a part of the weights.
    samples = [] if args.is_sharded else [SampleCallback(prompt, speed)]
    with settings_errors():  # Trainer checks some of its settings only now
        trainer = NanoGPTTrainer(
            model, args, callbacks=[*samples, PlotCallback(speed)], speed=speed, **parts
        )
    # With its weights in parts, a model has no whole ones to keep.
    if args.keep_best and not (args.load_best_model_at_end or args.is_sharded):
        trainer.keep_best(BestCallback(args.patience))
    return trainer


def _fit(trainer: NanoGPTTrainer, last_checkpoint: str | None) -> float:
    """Train the model, and return the seconds it took, those before an interruption included."""
    args = trainer.args
    with stop_on_signals(trainer), name_missing_ranks(trainer):
        trainer.train(resume_from_checkpoint=last_checkpoint)
    seconds = time.perf_counter() - trainer.started
    if trainer.best:
        trainer.best.restore(trainer.model)
    if args.lora:  # from here on the whole model is measured, saved and pushed
        trainer.model = merge_adapter(
            trainer.model, trainer.processing_class, args.output_dir, save=args.should_save
        )
    return seconds


def _draw(trainer: NanoGPTTrainer, model: PreTrainedModel, prompt: str, number: int = 0) -> str:
    seed, tokenizer = trainer.args.seed + number, trainer.processing_class
    return draw_sample(model, tokenizer, prompt, max_new_tokens=120, seed=seed)


def _write_folder(trainer: NanoGPTTrainer, metrics: dict[str, Any], prompt: str) -> TrainingResult:
    """Write model, tokenizer, metrics, card and plot into `output_dir`, all or nothing."""
    model, output_dir = trainer.gather_model(), Path(trainer.args.output_dir)
    if not trainer.args.should_save:
        return TrainingResult(output_dir, metrics, prompt, "")
    if not metrics["start_from"]:
        set_sampling(model)  # a checkpoint that was trained further keeps its own
    samples = [_draw(trainer, model, prompt, number) for number in range(3)]
    metrics |= {"prompt": prompt, "sample": samples[0], "samples": samples}
    card = render_model_card(model.config, metrics, name=output_dir.name)
    with explain_write_errors(output_dir, run=output_dir), staged_folder(output_dir) as folder:
        model.save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        try:
            write_card(card, output_dir / "README.md", to=folder / "README.md")
        except UserError as error:  # keep the old card rather than lose the training
            logger.warning(str(error))
        title = f"{output_dir.name}: loss"
        final = metrics["kept_tokens"], metrics["eval_loss"]
        plot_losses(trainer.state.log_history, folder / "loss.png", title=title, final=final)
    question = read_prompt(prompt, trainer.processing_class) if metrics["learnt_answers"] else ""
    return TrainingResult(output_dir, metrics, prompt, samples[0], question)
