"""Exact evaluation of packed blocks: a part of them while training, all of them otherwise."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from ..evaluation import sum_losses, summarize_losses
from .held_out import Estimate
from .publishing import HubTrainer


class EvaluatingTrainer(HubTrainer):
    """A `Trainer` that measures packed blocks by exact sums over tokens.

    `estimate` says which of the blocks of `eval_dataset` are measured while training.
    """

    byte_counts: torch.Tensor | None = None  # of each token; None evaluates as `Trainer` does
    _sums: list[torch.Tensor] | None = None  # of an evaluation

    def __init__(self, *args, estimate: Estimate | None = None, **kwargs):
        self.estimate = estimate
        super().__init__(*args, **kwargs)

    def evaluate(self, eval_dataset=None, *args, **kwargs) -> dict[str, float]:
        """Evaluate on all of the held-out text, or while training on the part of the estimate."""
        if eval_dataset is None and self.is_in_train and self.estimate is not None:
            eval_dataset = self.estimate.blocks
        return super().evaluate(eval_dataset, *args, **kwargs)

    def measure(self) -> dict[str, float]:
        """Return the figures of all of the held-out text; tell no tracker, whose run has ended."""
        loader = self.get_eval_dataloader()
        metrics = self.evaluation_loop(loader, "Evaluation", prediction_loss_only=True).metrics
        self._check_finite(metrics["eval_loss"], "eval_loss")
        return metrics

    def get_eval_dataloader(self, eval_dataset=None):
        """Evaluate on every block: without the last batch, the result would not be exact.

        The blocks come in their order, which tells one half from the other.
        """
        # Trainer reads these here, for training and evaluation alike. Workers that persist would
        # serve the blocks of the first evaluation in all later ones.
        args = self.args
        names = "dataloader_drop_last", "dataloader_persistent_workers", "train_sampling_strategy"
        kept = {name: getattr(args, name) for name in names}
        args.dataloader_drop_last = False
        args.dataloader_persistent_workers = False
        if self.estimate is not None:
            args.train_sampling_strategy = "random"  # sequential in evaluations
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            for name, value in kept.items():
                setattr(args, name, value)

    def evaluation_loop(
        self, dataloader, description, *args, metric_key_prefix: str = "eval", **kwargs
    ):
        """Evaluate as `Trainer` does; on packed blocks, add up the exact sums over all tokens."""
        exact = self.byte_counts is not None and description == "Evaluation"
        self._sums = [] if exact else None
        kwargs["metric_key_prefix"] = metric_key_prefix
        with use_threads(self.args), self._keep_weights():
            output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        if self._sums is not None:
            sums = torch.cat([torch.zeros(0, 3), *(some.cpu() for some in self._sums)])
            figures = self._name_figures(sums, dataloader.dataset)
            metrics: Any = output.metrics
            metrics.update({f"{metric_key_prefix}_{k}": v for k, v in figures.items()})
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if self._sums is None or self.byte_counts is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad(), self.compute_loss_context_manager():
            sums = sum_losses(model, self._prepare_inputs(inputs), self.byte_counts)
        self._sums.append(self.accelerator.gather_for_metrics(sums))
        return None, None, None

    def _name_figures(self, sums: torch.Tensor, dataset: Any) -> dict[str, float]:
        """Return the figures of all rows (N, 3), and `fresh_*` of those that chose nothing."""
        num_bytes = getattr(dataset, "num_bytes", None)
        figures = _name_figures(sums, num_bytes)
        if (
            self.estimate is None
            or not self.estimate.has_halves
            or dataset is not self.eval_dataset
        ):
            return figures
        fresh = sums[1::2]
        if num_bytes is not None:  # the bytes of the tokens may differ from those of the text
            fresh = fresh * torch.tensor([1.0, 1.0, num_bytes / max(1.0, sums[:, 2].sum().item())])
        return figures | {f"fresh_{name}": value for name, value in _name_figures(fresh).items()}

    @contextmanager
    def _keep_weights(self) -> Iterator[None]:
        """Give the model back its weights if the evaluation converts them to half precision."""
        if self.is_in_train or not (self.args.bf16_full_eval or self.args.fp16_full_eval):
            yield
            return
        model: Any = self.model
        if not self.is_model_parallel:
            model.to(self.args.device)  # else the conversion makes new parameters
        weights = [(parameter, parameter.data) for parameter in model.parameters()]
        buffers = [
            (module, name, buffer)
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]
        try:
            yield
        finally:
            for parameter, data in weights:
                parameter.data = data
            for module, name, buffer in buffers:
                setattr(module, name, buffer)


class StartCallback(TrainerCallback):
    """Measure the checkpoint that training starts from on all of the held-out text, as `before`."""

    def __init__(self, trainer: EvaluatingTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.trainer.evaluate(self.trainer.eval_dataset, metric_key_prefix="before")


@contextmanager
def use_threads(args: TrainingArguments) -> Iterator[None]:
    """Let torch use the CPU threads of `args.num_threads` in the block, if they are given."""
    before = torch.get_num_threads()
    torch.set_num_threads(getattr(args, "num_threads", None) or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _name_figures(sums: torch.Tensor, num_bytes: int | None = None) -> dict[str, float]:
    result = summarize_losses(sums, num_bytes)
    return {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.num_tokens,
        "bytes": result.num_bytes,
    }
