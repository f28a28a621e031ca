"""Checkpoints that a training resumes from exactly, to the bit.

Trainer's checkpoints hold weights, optimizer, schedule and random numbers. Added here: a record of
the files that belong to a checkpoint, so that half a checkpoint is never taken for a whole one; the
loss summed since the last log; and the settings, so that a resumed run is the same run. A file that
does not fit, or that somebody else wrote, is refused in one sentence.
"""

import math
import pickle
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.data_loader import IterableDatasetShard
from accelerate.utils import gather_object
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)
from transformers.trainer_utils import TrainOutput, rotate_checkpoints
from transformers.utils import logging

from ..checkpoint.steps import RECORD, find_damage, find_last_checkpoint, save_state, sum_file
from ..checkpoint.writing import explain_write_errors
from ..data.streams import PackedStream, merge_positions
from ..errors import UserError, explain_errors
from .arguments import NanoGPTTrainingArguments
from .best import BestCallback
from .restoring import RestoreCallback, check_shapes, copy_recipe, set_rates
from .shards import check_shards

logger = logging.get_logger(__name__)


class ResumableTrainer(Trainer):
    """A Trainer that resumes exactly and never saves weights or a loss that is not finite.

    `settings` (see run_settings.py) are kept in its checkpoints, and the weights of `best`.
    """

    args: NanoGPTTrainingArguments
    model: PreTrainedModel  # or a PeftModel, which passes on its attributes
    processing_class: PreTrainedTokenizerBase | Any
    best: BestCallback | None = None

    def __init__(self, *args, settings: dict[str, Any] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.settings = settings or {}
        self.started = time.perf_counter()
        self._running_losses: list[float] = []
        self._saved_step = self._ended_step = -1
        self._step_figures: tuple[Any, Any] = None, None
        self._checkpoint: str | None = None  # that is resumed from, until its random numbers are
        self._random_state: str | None = None  # the same, of a stream that resumes in place
        self.add_callback(RestoreCallback(self))

    def keep_best(self, best: BestCallback) -> None:
        """Let a callback keep the best weights, also when the training is resumed."""
        self.best = best
        self.add_callback(best)

    def train(self, *args, **kwargs):
        """Train as `Trainer` does, with the callback that restores a run as the last one.

        It may evaluate as training begins, when all other callbacks must be ready.
        """
        callback = self.pop_callback(RestoreCallback)
        assert callback is not None
        self.add_callback(callback)
        steps, _, metrics = super().train(*args, **kwargs)
        return TrainOutput(steps, metrics["train_loss"], metrics)  # see `log`

    def set_initial_training_values(self, args, dataloader):
        """Turn shares of all steps into steps: Trainer compares them with the checkpoint's."""
        *values, max_steps = super().set_initial_training_values(args, dataloader)
        for name in ("logging_steps", "eval_steps", "save_steps"):
            if 0 < (share := getattr(args, name) or 0) < 1:
                setattr(args, name, math.ceil(max_steps * share))
        return (*values, max_steps)

    def get_train_dataloader(self) -> DataLoader:
        """Let each process read its own shards of a stream, if `dispatch_batches` is False.

        Accelerate would let each read all, and keep its share of the rows.
        """
        loader = super().get_train_dataloader()
        stream, shard = self.train_dataset, loader.dataset
        if (
            isinstance(stream, PackedStream)
            and stream.seed is not None  # one that ends would end sooner in one process
            and isinstance(shard, IterableDatasetShard)
            and not shard.split_batches
        ):
            stream.split(shard.num_processes, shard.process_index)
            shard.num_processes, shard.process_index = 1, 0  # keep all rows
        return loader

    def _init_training_state(self, max_steps, steps, epochs, checkpoint, trial) -> tuple[int, int]:
        """Return the epochs and batches to skip: no batches of a stream that resumes in place."""
        skipped = super()._init_training_state(max_steps, steps, epochs, checkpoint, trial)
        if not isinstance(self.train_dataset, PackedStream):
            return skipped
        callbacks: Any = self.state.stateful_callbacks  # a dict; the annotation says list
        position = callbacks.get(RECORD, {}).get("stream")
        self.train_dataset.load_state_dict(position, **self._describe_loader())
        if not (position and "places" in position):
            return skipped
        self._random_state = checkpoint
        return skipped[0], 0

    def _locate_stream(self) -> dict[str, Any] | None:
        """Return the position of a stream after the steps done; without `places` to skip them."""
        if not isinstance(self.train_dataset, PackedStream):
            return None
        batches = self.args.gradient_accumulation_steps * self.args.world_size
        position = self.train_dataset.state_dict(
            batches=batches * self.state.global_step, **self._describe_loader()
        )
        if self.train_dataset.num_processes > 1:  # each knows only its own readers
            return merge_positions(gather_object([position]))
        accelerator: Any = self.args.accelerator_config
        if accelerator.split_batches or accelerator.dispatch_batches is False:
            position.pop("places", None)  # other processes read too
        return position

    def _describe_loader(self) -> dict[str, int]:
        args = self.args
        batches = args.gradient_accumulation_steps * args.world_size
        batch_size = self.get_total_train_batch_size(args) // batches
        return {"batch_size": batch_size, "num_workers": args.dataloader_num_workers}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `Trainer` does, unless the training or validation loss is not finite."""
        for name in ("loss", "eval_loss"):
            self._check_finite(logs.get(name, 0.0), name)
        if "train_loss" in logs:  # the mean of all steps, those before an interruption included
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)

    def _check_finite(self, value: float, name: str = "loss") -> None:
        if math.isfinite(value):
            return
        rate, last = self.args.learning_rate, find_last_checkpoint(self.args.output_dir)
        assert rate is not None
        raise UserError(
            f"The {name} is {value} at step {self.state.global_step}, so training stops "
            f"({f'the last good checkpoint is {last}' if last else 'there is no checkpoint yet'}): "
            f"train again with a learning_rate below {rate:g}, for example {rate / 3:.1g}."
        )

    def _run_epoch(self, *args, **kwargs):
        # Trainer looks only after a step: resumed at the end, it would train once more.
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            return super()._run_epoch(*args, **kwargs)
        self.control.should_training_stop = True

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, **kwargs):
        self._step_figures = grad_norm, kwargs.get("learning_rate")  # for the end of the epoch
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    # Saving

    @property
    def saves_shards(self) -> bool:
        """Say whether each process writes its shards into a checkpoint, not one whole weights."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        return plugin is not None and "SHARDED" in str(plugin.state_dict_type)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as `Trainer` does; next to shards of the weights, it leaves out the tokenizer."""
        super().save_model(output_dir, _internal_call)
        if self.saves_shards and self.args.should_save and self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir or self.args.output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save model and tokenizer as `Trainer` does, but no training_args.bin.

        That file is a pickle and may hold a token; what resuming needs is in `settings`, as JSON.
        """
        if not (self.args.should_save or self.is_distributed_loading_by_transformers):
            return
        folder, is_main = output_dir or self.args.output_dir, self.args.should_save
        self.model.save_pretrained(folder, state_dict=state_dict, is_main_process=is_main)
        if is_main and self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _save_checkpoint(self, model, trial):
        if self._saved_step == self.state.global_step:
            return self.note_best()  # never write over a whole checkpoint
        # Weights or a loss that are not finite must not take the place of good ones.
        finite = all(bool(p.isfinite().all()) for p in self.model.parameters())
        loss = self._tr_loss if finite else self._tr_loss * math.nan
        self._running_losses = self.accelerator.gather(loss.reshape(1)).tolist()
        self._check_finite(sum(self._running_losses))
        # Trainer writes all files, trainer_state.json last, with the record of `_save_rng_state`.
        run = self._get_output_dir(trial)
        folder = Path(run) / f"checkpoint-{self.state.global_step}"
        self.state.save_to_json = partial(save_state, self.state)  # type: ignore[method-assign]  # on purpose
        with explain_write_errors(folder, run=run):
            super()._save_checkpoint(model, trial)
        self._saved_step = self.state.global_step

    def note_best(self) -> None:
        """Do what `Trainer` does with the best checkpoint when it saves one."""
        args, state = self.args, self.state
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if best.is_dir():
            state.best_model_checkpoint = str(best)
        if args.should_save:
            rotate_checkpoints(
                args.output_dir, args.save_total_limit, state.best_model_checkpoint, use_mtime=True
            )

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # Only trainer_state.json is missing now: once it exists, all processes have written theirs.
        self.accelerator.wait_for_everyone()
        stream = self._locate_stream()  # all processes take part
        if not self.args.should_save:
            return
        if self.best:
            self.best.save(output_dir, self.state.global_step)
        copy_recipe(self.args.output_dir, output_dir)
        paths = sorted(p for p in Path(output_dir).rglob("*") if p.is_file())
        files = {p.relative_to(output_dir).as_posix(): p for p in paths}
        callbacks: Any = self.state.stateful_callbacks  # a dict; the annotation says list
        callbacks[RECORD] = {
            "settings": self.settings,
            "seconds": time.perf_counter() - self.started,
            "running_losses": self._running_losses,
            "last_logged": self._globalstep_last_logged,
            "step_figures": [v if v is None else float(v) for v in self._step_figures],
            "epoch_ended": self._ended_step == self.state.global_step,
            "stream": stream,
            "best": self.best and self.best.describe(),
            "sizes": {name: p.stat().st_size for name, p in files.items()},
            "checksums": {name: sum_file(p) for name, p in files.items()},
        }

    # Loading

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        check_shards(resume_from_checkpoint)
        with _explain_loading(resume_from_checkpoint, "the weights"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        with _explain_loading(checkpoint, "optimizer.pt or scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint and self.optimizer is not None:
                check_shapes(self.optimizer)
        if checkpoint and isinstance(self.lr_scheduler, LambdaLR):
            set_rates(self.lr_scheduler)
        self._checkpoint = checkpoint

    def _load_scaler(self, checkpoint) -> None:
        with _explain_loading(checkpoint, "scaler.pt"):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint) -> None:
        checkpoint, self._checkpoint = self._checkpoint, None  # only once
        with _explain_loading(checkpoint, "the rng_state"):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None
        if damaged := find_damage(best):
            raise UserError(
                f"{best}/{damaged} is damaged, and that is the best "
                "model: run again with --resume --load_best_model_at_end False to keep the last."
            )
        check_shards(best)
        super()._load_best_model()


@contextmanager
def _explain_loading(checkpoint: str | Path | None, file: str) -> Iterator[None]:
    try:
        with explain_errors(f"Cannot resume from {checkpoint}: {file} cannot be used"):
            yield
    except UserError as error:
        if isinstance(error.__cause__, pickle.UnpicklingError):  # torch runs no code in a file
            raise UserError(
                f"{checkpoint} holds more than tensors and numbers in {file}, which was not "
                "loaded: do not use it."
            ) from error
        raise
