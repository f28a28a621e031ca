"""Loading the files of a checkpoint to resume from, which somebody else may have written."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.optim import Optimizer
from transformers import Trainer

from ..errors import UserError, explain_errors

_LIKE_PARAMETER = ("exp_avg", "exp_avg_sq", "momentum_buffer")


class GuardedTrainer(Trainer):
    """A Trainer to which a wrong file of a checkpoint is a `UserError` that names the folder."""

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        with _explain_loading(resume_from_checkpoint, "the weights"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        with _explain_loading(checkpoint, "optimizer.pt or scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint and self.optimizer is not None:
                _check_shapes(self.optimizer)

    def _load_scaler(self, checkpoint) -> None:
        with _explain_loading(checkpoint, "scaler.pt"):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint) -> None:
        with _explain_loading(checkpoint, "the rng_state"):
            super()._load_rng_state(checkpoint)


@contextmanager
def _explain_loading(checkpoint: str | Path | None, file: str) -> Iterator[None]:
    try:
        with explain_errors(f"{checkpoint} cannot be resumed from, as {file} cannot be used"):
            yield
    except ValueError as error:
        if isinstance(error.__cause__, pickle.UnpicklingError):  # torch runs no code in a file
            raise UserError(
                f"{checkpoint} holds more than tensors and numbers in {file}, which was not "
                "loaded: do not use it."
            ) from error
        raise


def _check_shapes(optimizer: Optimizer) -> None:
    """Refuse averages that do not fit their parameter, which fail in the first step only."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    for parameter, state in inner.state.items():
        for name in _LIKE_PARAMETER:
            if name in state and state[name].shape != parameter.shape:
                raise UserError(
                    f"{name} has the shape {tuple(state[name].shape)}, and its parameter "
                    f"{tuple(parameter.shape)}"
                )
