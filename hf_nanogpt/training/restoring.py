"""What a resumed training restores besides what `Trainer` loads from a checkpoint."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerState
from transformers.utils import logging

from ..checkpoint.steps import RECORD, save_state
from ..checkpoint.writing import RECIPE
from ..data.packing import PackedBlocks
from ..data.streams import PackedStream
from ..errors import UserError
from ..untrusted import path_inside

logger = logging.get_logger(__name__)

# States of our optimizers that have the shape of their parameter.
_LIKE_PARAMETER = ("exp_avg", "exp_avg_sq", "momentum_buffer")


class RestoreCallback(TrainerCallback):
    """Restore what `Trainer` leaves out when it loads a checkpoint."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer, record = self.trainer, state.stateful_callbacks.get(RECORD, {})
        trainer.started = time.perf_counter() - record.get("seconds", 0.0)
        trainer._saved_step, trainer._ended_step = state.global_step or -1, -1
        if state.global_step == 0:
            return
        _check_steps_left(state)
        state.compute_steps(args, state.max_steps)  # flags win over what the checkpoint says
        if state.best_global_step is not None:  # the folder may have been moved since
            best = path_inside(args.output_dir, f"checkpoint-{state.best_global_step}")
            state.best_model_checkpoint = str(best) if best.is_dir() else None
        if not record:
            return
        if trainer.best:
            trainer.best.load(
                trainer._checkpoint, record.get("best"), trainer.model, state, control
            )
        # Trainer starts the loss since the last log, and that of all steps, from 0.
        losses = record["running_losses"]
        if len(losses) == args.world_size:
            trainer._tr_loss += losses[args.process_index]
            trainer._globalstep_last_logged = record["last_logged"]
        trainer._total_loss_scalar = _sum_logged_losses(state)
        # The checkpoint may have been saved in the middle of what follows its step.
        if state.stateful_callbacks["TrainerControl"]["args"]["should_evaluate"]:
            self._repeat_evaluation(args, state, control)
        at_end = isinstance(state.epoch, float) and state.epoch.is_integer()
        if (at_end or state.global_step == state.max_steps) and record.get("epoch_ended") is False:
            trainer._load_rng_state(trainer._checkpoint)
            trainer.control = trainer.callback_handler.on_epoch_end(args, state, control)
            self._log_save_evaluate(state, record.get("step_figures"))

    def on_epoch_begin(self, args, state, control, **kwargs):
        # accelerate tells it to the dataset of one process only.
        if isinstance(blocks := self.trainer.train_dataset, PackedBlocks):
            blocks.set_epoch(int(state.epoch or 0))

    def on_step_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        if trainer._random_state:
            # In place, Trainer loads them before a DataLoader starts, which draws one itself.
            trainer._checkpoint, trainer._random_state = trainer._random_state, None
            trainer._load_rng_state(trainer._checkpoint)

    def on_step_end(self, args, state, control, **kwargs):
        if isinstance(self.trainer.train_dataset, PackedStream):
            # Trainer counts the batches that this process has read.
            state.epoch = state.global_step / state.max_steps

    def on_epoch_end(self, args, state, control, **kwargs):
        self.trainer._ended_step = state.global_step

    def _log_save_evaluate(self, state, step_figures: Any = None) -> None:
        trainer = self.trainer
        # Whoever wrote the checkpoint may have put anything here.
        norm, rate = step_figures if _are_figures(step_figures) else (None, None)
        trainer._maybe_log_save_evaluate(
            trainer._tr_loss,
            norm,
            trainer.model_wrapped,
            None,
            state.epoch,
            None,
            time.time(),
            learning_rate=rate,
        )

    def _repeat_evaluation(self, args, state, control) -> None:
        """Do the evaluation after the checkpoint's step, which a signal cut short."""
        control.should_evaluate = True
        self._log_save_evaluate(state)
        self.trainer.note_best()
        if args.should_save:  # in the checkpoint too, or resuming again would evaluate again
            state.stateful_callbacks["TrainerControl"] = control.state()
            if self.trainer.best:
                state.stateful_callbacks[RECORD]["best"] = self.trainer.best.describe()
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}/trainer_state.json"
            save_state(state, f"{path}.new")
            os.replace(f"{path}.new", path)


def _are_figures(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(figure, float | None) for figure in value)
    )


def _sum_logged_losses(state: TrainerState) -> float:
    rows = [row for row in state.log_history if isinstance(row.get("loss"), float)]
    steps = [0, *(row["step"] for row in rows)]
    return sum(
        row["loss"] * (row["step"] - before) for row, before in zip(rows, steps, strict=False)
    )


def _check_steps_left(state: TrainerState) -> None:
    if state.global_step > state.max_steps:
        raise UserError(
            f"max_steps={state.max_steps} is too low: the checkpoint to resume from has already "
            f"done {state.global_step} steps."
        )
    if state.global_step == state.max_steps:
        logger.warning("This training has done all its steps: only the results are written.")


def check_shapes(optimizer: Optimizer) -> None:
    """Refuse averages that do not fit their parameter: otherwise the first step would fail."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    for parameter, state in inner.state.items():
        for name in _LIKE_PARAMETER:
            if name in state and state[name].shape != parameter.shape:
                raise UserError(
                    f"{name} has the shape {tuple(state[name].shape)}, and its parameter "
                    f"{tuple(parameter.shape)}"
                )


def copy_recipe(run: str | Path, checkpoint: str | Path) -> None:
    """Put what a run chose into a checkpoint, which may be copied, or pushed, by itself."""
    if (recipe := Path(run) / RECIPE).is_file():
        shutil.copyfile(recipe, Path(checkpoint) / RECIPE)


def set_rates(schedule: LambdaLR) -> None:
    """Set the rates of this run's schedule: that of the checkpoint may have been shorter."""
    rates = [
        base * factor(schedule.last_epoch)
        for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates
