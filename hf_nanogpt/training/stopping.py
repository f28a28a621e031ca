"""Stopping a training at any moment, by a signal or a fault, and going on as if it never stopped.

Trainer's checkpoints hold weights, optimizer, schedule and random numbers. What they lack is added
here: which files belong to them, so that half of one is never taken for whole; the loss summed up
since the last log; and the settings, so that going on with others does not pass for the same run.
"""

import itertools
import json
import math
import os
import signal
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback
from transformers.utils import logging

from ..checkpoint.checksums import RECORD, find_damage, read_record, save_state, sum_file
from ..checkpoint.folder import explain_write_errors, find_last_checkpoint
from ..configuration_nanogpt import NanoGPTConfig
from ..data.documents import DataArguments
from ..data.packing import PackedBlocks, PackedStream
from ..errors import UserError
from ..hub.publishable import publish_place
from ..untrusted import path_inside
from .arguments import NanoGPTTrainingArguments
from .guarding import GuardedTrainer

logger = logging.get_logger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Of the training arguments, those that decide what is learnt. Trainer silently takes most of them
# from the checkpoint, whatever is asked for.
_DECISIVE = (
    *("optim_recipe", "learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay"),
    *("max_grad_norm", "momentum_warmup_steps", "lr_scheduler_type", "lr_scheduler_kwargs"),
    *("warmup_steps", "seed"),
    *("data_seed", "bf16", "fp16", "label_smoothing_factor", "neftune_noise_alpha"),
    *("train_sampling_strategy", "dataloader_drop_last"),
)
# These may change, with a warning: the first two are a wish of their own, the others only regroup
# the same sums, as long as the batch size in total is the same.
_LENGTH = ("max_steps", "num_train_epochs")
_GROUPING = ("per_device_train_batch_size", "gradient_accumulation_steps", "processes")


class TrainingInterrupted(KeyboardInterrupt):
    """A signal has stopped the training.

    Attributes:
        signum: the signal: SIGINT, SIGTERM or SIGHUP.
        checkpoint: the last one saved, to go on from, or None.
    """

    def __init__(self, signum: int, checkpoint: str | None):
        where = f"go on from {checkpoint}" if checkpoint else "no checkpoint was saved"
        super().__init__(f"Training was interrupted: {where}.")
        self.signum, self.checkpoint = signum, checkpoint


class InterruptibleTrainer(GuardedTrainer):
    """A Trainer that stops on request, never saves what is not finite, and resumes exactly.

    Attributes:
        settings: what `describe_settings` returned, to be kept in the checkpoints.
        signum: the signal that asks to stop, which `stop_on_signals` sets; else 0.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.settings: dict[str, Any] = {}
        self.signum = 0
        self.started = time.perf_counter()
        self._group, self._running_losses, self._saved_step = None, [], -1
        self.add_callback(_ResumeCallback(self))

    def train(self, *args, **kwargs):
        # Last, for it may evaluate as training begins, when all others must be ready.
        self.add_callback(self.pop_callback(_ResumeCallback))
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for name in ("loss", "eval_loss"):
            self._check_finite(logs.get(name, 0.0), name)
        super().log(logs, start_time)

    def _check_finite(self, value: float, name: str = "loss") -> None:
        if math.isfinite(value):
            return
        rate, last = self.args.learning_rate, find_last_checkpoint(self.args.output_dir)
        raise UserError(
            f"The {name} is {value} at step {self.state.global_step}, so training stops "
            f"({f'the last good checkpoint is {last}' if last else 'there is no checkpoint yet'}): "
            f"train anew with a learning_rate lower than {rate:g}, for example {rate / 3:.1g}."
        )

    def _init_training_state(self, max_steps, *args, **kwargs):
        # Resumed, Trainer would warn that a share of all steps is not the number of steps it was.
        for name in ("logging_steps", "eval_steps", "save_steps"):
            if 0 < (share := getattr(self.args, name) or 0) < 1:
                setattr(self.args, name, math.ceil(max_steps * share))
        return super()._init_training_state(max_steps, *args, **kwargs)

    def _run_epoch(self, *args, **kwargs):
        # Trainer looks at max_steps after a step only: resumed at the end it would train once more.
        if self.state.global_step < self.state.max_steps:
            return super()._run_epoch(*args, **kwargs)
        self.control.should_training_stop = True

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args, **kwargs):
        # Elsewhere looking at it means to wait for the device, or that only one process stops.
        if tr_loss.device.type == "cpu" and self._group is None:
            self._check_finite(tr_loss.item())
        stopping = self._agree_on_stopping()
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        if stopping:
            self._save_and_stop(stopping)

    def _agree_on_stopping(self) -> int:
        """Return the signal that any process got, else 0: all must stop after the same step."""
        if self._group is None:
            return self.signum
        signum = torch.tensor(self.signum)
        torch.distributed.all_reduce(signum, torch.distributed.ReduceOp.MAX, group=self._group)
        return int(signum)

    def _save_and_stop(self, signum: int) -> None:
        self._save_checkpoint(self.model_wrapped, None)
        self.accelerator.wait_for_everyone()
        raise TrainingInterrupted(signum, find_last_checkpoint(self.args.output_dir))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save model and tokenizer as `Trainer` does, but no training_args.bin.

        That is a pickle, and may hold a token; what resuming needs is JSON, see `settings`.
        """
        if not (self.args.should_save or self.is_distributed_loading_by_transformers):
            return
        folder, is_main = output_dir or self.args.output_dir, self.args.should_save
        model = self.model
        if isinstance(model, FSDPModule):
            # FSDP2 made a class in a file of torch's, and both names would be saved. This model has
            # our class and no weights, which are all in `state_dict`.
            with torch.device("meta"):
                model = type(self.model).__bases__[-1](self.model.config).to(self.model.dtype)
            model.generation_config = self.model.generation_config
        model.save_pretrained(folder, state_dict=state_dict, is_main_process=is_main)
        if is_main and self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_best_model(self) -> None:
        if damaged := find_damage(self.state.best_model_checkpoint):
            raise UserError(
                f"{self.state.best_model_checkpoint}/{damaged} is damaged, and that is the best "
                "model: go on with --resume --load_best_model_at_end False to keep the last."
            )
        super()._load_best_model()

    def _save_checkpoint(self, model, trial):
        if self._saved_step == self.state.global_step:
            return  # never write over a whole checkpoint
        finite = all(bool(p.isfinite().all()) for p in self.model.parameters())
        loss = self._tr_loss if finite else self._tr_loss * math.nan
        self._running_losses = self.accelerator.gather(loss.reshape(1)).tolist()
        self._check_finite(sum(self._running_losses))
        run = self._get_output_dir(trial)
        folder = Path(run) / f"checkpoint-{self.state.global_step}"
        self.state.save_to_json = partial(save_state, self.state)
        with explain_write_errors(folder, run=run):
            super()._save_checkpoint(model, trial)
        self._saved_step = self.state.global_step

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # Only trainer_state.json is still to come: where it is, the files of all processes are.
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            return
        paths = sorted(p for p in Path(output_dir).rglob("*") if p.is_file())
        files = {p.relative_to(output_dir).as_posix(): p for p in paths}
        self.state.stateful_callbacks[RECORD] = {
            "settings": self.settings,
            "seconds": time.perf_counter() - self.started,
            "running_losses": self._running_losses,
            "last_logged": self._globalstep_last_logged,
            "sizes": {name: p.stat().st_size for name, p in files.items()},
            "checksums": {name: sum_file(p) for name, p in files.items()},
        }


class _ResumeCallback(TrainerCallback):
    """Bring back what `Trainer` forgets of a checkpoint, and stop in the midst of an evaluation."""

    def __init__(self, trainer: InterruptibleTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer, record = self.trainer, state.stateful_callbacks.get(RECORD, {})
        trainer.started = time.perf_counter() - record.get("seconds", 0.0)
        trainer._saved_step = state.global_step or -1
        if args.world_size > 1:
            trainer._group = torch.distributed.new_group(backend="gloo")
        if state.global_step == 0:
            return
        if state.global_step > state.max_steps:
            raise UserError(
                f"max_steps={state.max_steps} is not possible: the checkpoint to resume from has "
                f"done {state.global_step} steps already; give more."
            )
        if state.global_step == state.max_steps:
            logger.warning("All steps of this training are done: nothing is left but its results.")
        state.compute_steps(args, state.max_steps)  # flags win over what the checkpoint says
        if state.best_global_step is not None:  # the path in the file may lead elsewhere
            best = path_inside(args.output_dir, f"checkpoint-{state.best_global_step}")
            state.best_model_checkpoint = str(best) if best.is_dir() else None
        if not record:
            return
        losses = record["running_losses"]
        if len(losses) == args.world_size:
            trainer._tr_loss += losses[args.process_index]
            trainer._globalstep_last_logged = record["last_logged"]
        if state.stateful_callbacks["TrainerControl"]["args"]["should_evaluate"]:
            # The evaluation after this step was cut short: make up for it.
            control.should_evaluate = True
            trainer._maybe_log_save_evaluate(
                trainer._tr_loss, None, trainer.model_wrapped, None, state.epoch, None, time.time()
            )
            if args.should_save:
                state.stateful_callbacks["TrainerControl"] = control.state()
                path = Path(args.output_dir) / f"checkpoint-{state.global_step}/trainer_state.json"
                save_state(state, f"{path}.new")
                os.replace(f"{path}.new", path)

    def on_prediction_step(self, args, state, control, **kwargs):
        # Several processes finish it, as they have not agreed to leave; and so does save_strategy
        # "best", which cannot save before it knows the result.
        may_leave = self.trainer._group is None and args.save_strategy != "best"
        if self.trainer.signum and may_leave and control.should_evaluate:
            self.trainer._save_and_stop(self.trainer.signum)


@contextmanager
def stop_on_signals(trainer: InterruptibleTrainer) -> Iterator[None]:
    """Make Ctrl-C, SIGTERM and SIGHUP save a checkpoint and stop by `TrainingInterrupted`.

    A second signal stops it at once. Outside the main thread nothing changes, and a signal that the
    process ignores stays ignored.
    """

    def handle(signum: int, frame) -> None:
        # After Ctrl-C torchrun sends each process the same signal again.
        if trainer.signum and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise TrainingInterrupted(signum, find_last_checkpoint(trainer.args.output_dir))
        trainer.signum = trainer.signum or signum

    before, trainer.signum = {}, 0
    if threading.current_thread() is threading.main_thread():
        heard = [s for s in _SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
        before = {signum: signal.signal(signum, handle) for signum in heard}
    try:
        yield
    except BaseException:
        # Trainer does not end what its callbacks began, such as the progress bar.
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
        raise
    else:
        if signum := trainer._agree_on_stopping():  # it came after the last step
            raise TrainingInterrupted(signum, find_last_checkpoint(trainer.args.output_dir))
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def describe_settings(
    args: NanoGPTTrainingArguments,
    data_args: DataArguments,
    config: NanoGPTConfig,
    *,
    blocks: PackedBlocks | PackedStream,
    validation: PackedBlocks | PackedStream,
    adapter: str | None = None,
) -> dict[str, Any]:
    """Return, as JSON has it, everything that decides what a training learns."""
    values = args.to_dict()
    architecture = {name: getattr(config, name) for name in NanoGPTConfig.__annotations__}
    accumulated = args.per_device_train_batch_size * args.gradient_accumulation_steps
    settings = {
        **{name: values[name] for name in (*_DECISIVE, *_LENGTH, *_GROUPING[:2])},
        "processes": args.world_size,
        "total batch size": accumulated * args.world_size * max(1, args.n_gpu),
        **architecture,
        "tokenizer": publish_place(data_args.tokenizer),  # the Hub gets this file
        "vocab_size": data_args.vocab_size,
        "chat_template": data_args.chat_template,
        "lora": adapter,
        "data": _identify(blocks),
        "validation data": _identify(validation),
    }
    return json.loads(json.dumps(settings))


def _identify(blocks: PackedBlocks | PackedStream) -> str:
    """Tell one text from another by a checksum of some blocks, and by how many there are."""
    if isinstance(blocks, PackedBlocks):
        some: Any = (blocks[i] for i in range(0, len(blocks), max(1, len(blocks) // 64)))
        name = f"{len(blocks)} blocks"
    else:
        some, name = itertools.islice(blocks, 8), "a stream"
    total = 0
    for row in some:
        total = zlib.crc32(np.asarray(row["input_ids"], dtype=np.int64).tobytes(), total)
    return f"{name} with checksum {total:08x}"


def check_settings(checkpoint: str, settings: dict[str, Any]) -> None:
    """Raise a `UserError`, or warn, if `checkpoint` was trained with other settings."""
    record = read_record(checkpoint)
    if not record:
        raise UserError(
            f"{checkpoint} cannot be resumed exactly: it was saved with save_only_model, or not by "
            "this version of hf_nanogpt; train anew in another output_dir."
        )
    before = record["settings"]
    if isinstance(path := before.get("tokenizer"), str):  # as version 0.1.0 wrote it
        before["tokenizer"] = publish_place(path)
    changed = [name for name, value in settings.items() if before.get(name) != value]

    def tell(names: list[str]) -> str:
        return ", ".join(f"{name}={settings[name]} (was {before.get(name)})" for name in names)

    if decisive := [name for name in changed if name not in (*_LENGTH, *_GROUPING)]:
        raise UserError(
            f"{checkpoint} was trained with other settings, and going on would be a different run: "
            f"{tell(decisive)}. Give the former ones, or train anew in another output_dir."
        )
    if length := [name for name in changed if name in _LENGTH]:
        logger.warning(
            f"Going on with {tell(length)}: the learning rate follows the new schedule from here "
            "on, so the result is not that of one run of this length."
        )
    if grouping := [name for name in changed if name in _GROUPING]:
        logger.warning(f"Going on with {tell(grouping)}: equal up to rounding, not to the bit.")
