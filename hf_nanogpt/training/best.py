"""The weights with the lowest validation loss, and an early end once that loss has turned up."""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..errors import UserError, explain_errors
from .callbacks import warn_if_unwritable
from .progress import show

_FILE = "best.safetensors"
_WORSE = 1.05  # a loss that is higher than the best by this factor has turned up


class BestCallback(TrainerCallback):
    """Keep the weights that had the lowest validation loss, the first ones included.

    An evaluation that is the best so far copies the trained weights to memory (on the CPU). A
    checkpoint gets them as a file only if they are not its own: where the loss falls until the end,
    nothing is written. Training stops where the best loss is `patience` (a share of all steps) ago
    and the loss is 5 % above it. A learning rate that decays lowers the loss again late in a run,
    but not by so much.
    """

    active = False

    def __init__(self, patience: float):
        self.patience = patience
        self.step: int | None = None
        self.loss = math.inf
        self.weights: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.step, self.loss, self.weights, self.active = None, math.inf, {}, True

    def on_step_end(self, args, state, control, **kwargs):
        # The last weights may be the best ones.
        if args.eval_strategy == "steps" and state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_evaluate(self, args, state, control, metrics=None, model=None, **kwargs):
        if not self.active or metrics is None or "eval_loss" not in metrics:
            return
        if metrics["eval_loss"] < self.loss:
            self._remember(model, state.global_step, metrics["eval_loss"])
        elif self._has_turned_up(metrics["eval_loss"], state):
            control.should_training_stop = True
            if state.is_world_process_zero and not args.disable_tqdm:
                with warn_if_unwritable("The reason to stop"):
                    show(f"The validation loss was lowest at step {self.step:,}: training stops.")

    def on_train_end(self, args, state, control, **kwargs):
        self.active = False

    def _remember(self, model: Any, step: int, loss: float) -> None:
        self.step, self.loss = step, loss
        self.weights = {
            name: parameter.detach().to("cpu", copy=True).contiguous()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    def _has_turned_up(self, loss: float, state: TrainerState) -> bool:
        since = state.global_step - (self.step or 0)
        return since >= self.patience * state.max_steps and loss > _WORSE * self.loss

    def restore(self, model: nn.Module) -> None:
        """Give a model its best weights."""
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, weight in self.weights.items():
                parameters[name].copy_(weight)

    # In checkpoints

    def describe(self) -> dict[str, Any] | None:
        """Return which step is the best, for the record of a checkpoint."""
        return None if self.step is None else {"step": self.step, "loss": self.loss}

    def save(self, checkpoint: str | Path, step: int) -> None:
        """Write the best weights into the checkpoint of a step, unless they are its own."""
        if self.weights and self.step != step:
            save_file(self.weights, Path(checkpoint) / _FILE)

    def load(
        self,
        checkpoint: str | Path,
        found: Any,
        model: nn.Module,
        state: TrainerState,
        control: TrainerControl,
    ) -> None:
        """Continue with the best weights of a checkpoint; `found` is what `describe` returned.

        Raises:
            UserError: they are missing, or are not those of this model.
        """
        if found is None:  # until then, none were kept
            return
        with explain_errors(f"Cannot resume from {checkpoint}: {_FILE} cannot be used"):
            step, loss = int(found["step"]), float(found["loss"])
            self._remember(model, step, loss)
            if step != state.global_step:
                weights = load_file(Path(checkpoint) / _FILE)
                shapes, known = (
                    {name: weight.shape for name, weight in side.items()}
                    for side in (weights, self.weights)
                )
                if shapes != known:
                    raise UserError("it holds other weights than this model has")
                self.weights = weights
        # A run that was killed after it had decided to stop.
        last: Any = next((row for row in reversed(state.log_history) if "eval_loss" in row), {})
        if last.get("step") == state.global_step and self._has_turned_up(last["eval_loss"], state):
            control.should_training_stop = True
