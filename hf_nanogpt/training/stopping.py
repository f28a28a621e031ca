"""Stopping a training by a signal, with a checkpoint to resume from."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from ..checkpoint.steps import find_last_checkpoint
from ..errors import UserError
from .resume import ResumableTrainer

logger = logging.get_logger(__name__)

_ANSWER = timedelta(seconds=15)  # less than torchrun leaves to processes that are to end
# Schedules that look at the result of an evaluation.
_FOLLOW_METRIC = ("reduce_lr_on_plateau", "greedy")
_LOOK = 1.0  # seconds between two looks for the launcher
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class TrainingInterrupted(KeyboardInterrupt):
    """A signal has stopped the training.

    Attributes:
        signum: the signal: SIGINT, SIGTERM or SIGHUP.
        checkpoint: the last one saved, to resume from, or None.
    """

    def __init__(self, signum: int, checkpoint: str | None):
        where = f"resume from {checkpoint}" if checkpoint else "no checkpoint was saved"
        super().__init__(f"Training was interrupted: {where}.")
        self.signum, self.checkpoint = signum, checkpoint


class InterruptibleTrainer(ResumableTrainer):
    """A Trainer that saves a checkpoint and stops when `stop_on_signals` sets its `signum`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.signum = 0
        # Of all processes, where there are several: one is of no use after a time-out.
        self.group: Any = None
        self.roll_call: Any = None
        self.add_callback(_StopCallback(self))

    def _maybe_log_save_evaluate(self, tr_loss, *args, **kwargs):
        # On a GPU, reading the loss would wait for it; of several processes, only one would stop.
        if tr_loss.device.type == "cpu" and self.group is None:
            self._check_finite(tr_loss.item())
        signum = self.agree_on_signal()
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)
        if signum:
            self.save_and_stop(signum)

    def agree_on_signal(self) -> int:
        """Return the signal that any process got, or 0: all must stop after the same step."""
        if self.group is None:
            return self.signum
        signum = torch.tensor(self.signum)
        torch.distributed.all_reduce(signum, torch.distributed.ReduceOp.MAX, group=self.group)
        return int(signum)

    def save_and_stop(self, signum: int) -> None:
        """Save a checkpoint, unless this step has one, and raise `TrainingInterrupted`."""
        self._save_checkpoint(self.model_wrapped, None)
        self.accelerator.wait_for_everyone()
        raise TrainingInterrupted(signum, find_last_checkpoint(self.args.output_dir))


class _StopCallback(TrainerCallback):
    """Let the processes talk about signals, and stop in the middle of an evaluation."""

    def __init__(self, trainer: InterruptibleTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if args.world_size > 1:
            # NCCL ends a process that waits longer than `ddp_timeout`: name who is missing before.
            limit = timedelta(seconds=args.ddp_timeout)
            limit = max(limit - 2 * _ANSWER, limit / 2)
            self.trainer.group, self.trainer.roll_call = (
                torch.distributed.new_group(backend="gloo", timeout=limit) for _ in range(2)
            )

    def on_prediction_step(self, args, state, control, **kwargs):
        # Several processes finish the evaluation, as they have not agreed to stop. So does what
        # cannot be saved before the result is known: the best model, a rate that depends on it.
        waits = args.save_strategy == "best" or args.lr_scheduler_type in _FOLLOW_METRIC
        may_stop = self.trainer.group is None and not waits
        if self.trainer.signum and may_stop and control.should_evaluate:
            self.trainer.save_and_stop(self.trainer.signum)


@contextmanager
def stop_on_signals(trainer: InterruptibleTrainer) -> Iterator[None]:
    """Make Ctrl-C, SIGTERM and SIGHUP save a checkpoint and raise `TrainingInterrupted`.

    A second signal stops at once. Nothing changes outside the main thread, nor for a signal that
    the process ignores.
    """

    def handle(signum: int, frame) -> None:
        # After Ctrl-C torchrun sends each process the same signal again.
        if trainer.signum and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise TrainingInterrupted(signum, find_last_checkpoint(trainer.args.output_dir))
        trainer.signum = trainer.signum or signum

    handlers, trainer.signum = {}, 0
    if threading.current_thread() is threading.main_thread():
        heeded = [s for s in _SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
        handlers = {signum: signal.signal(signum, handle) for signum in heeded}
    try:
        yield
    except BaseException:
        # Trainer does not end what its callbacks began, such as the progress bar.
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
        raise
    else:
        if signum := trainer.agree_on_signal():  # it came after the last step
            raise TrainingInterrupted(signum, find_last_checkpoint(trainer.args.output_dir))
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


@contextmanager
def follow_launcher() -> Iterator[None]:
    """Send this process SIGTERM if torchrun, which started it, dies.

    Else it would keep output_dir and its GPU. It begins before the data are prepared: later, the
    launcher may be gone already, and nothing would tell.
    """
    launcher, ended = os.getppid(), threading.Event()

    def look() -> None:
        while not ended.wait(_LOOK):
            if os.getppid() != launcher:
                logger.warning("The launcher of this process is gone: training stops.")
                return os.kill(os.getpid(), signal.SIGTERM)

    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=look, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


@contextmanager
def name_missing_ranks(trainer: InterruptibleTrainer) -> Iterator[None]:
    """Say which processes are missing if talking to them fails, as after `args.ddp_timeout`.

    The first process asks all others to answer. If all do, or there is only one, the error stays.
    """
    try:
        yield
    except RuntimeError as error:
        by_network = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if trainer.roll_call is None or not by_network:
            raise
        try:
            torch.distributed.monitored_barrier(trainer.roll_call, _ANSWER, wait_all_ranks=True)
        except RuntimeError as absence:
            raise UserError(
                f"Step {trainer.state.global_step + 1} does not end, because a process is gone or "
                f"stalled: {absence}"
            ) from error
        raise
