"""The Trainer of this project: transformers' Trainer, our optimizer, exact metrics."""

import os
from dataclasses import replace

import torch
from accelerate import FullyShardedDataParallelPlugin
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_callback import ProgressCallback as StockProgressCallback

from ..data.packing import PackedCollator
from ..data.tokenization import token_byte_counts
from ..errors import UserError, settings_errors
from ..evaluation import sum_losses, summarize_losses
from ..modeling_nanogpt import NanoGPTForCausalLM
from .arguments import NanoGPTTrainingArguments
from .callbacks import SpeedCallback
from .optim import build_optimizer
from .progress import ProgressCallback
from .publishing import HubTrainer


class NanoGPTTrainer(HubTrainer):
    """Train on packed blocks by the optimizer of `args.optim_recipe`.

    It is transformers' `Trainer`, in four files: resume.py (exact checkpoints), stopping.py
    (signals), publishing.py (the Hub), and this one (optimizer, loss and metrics). It takes all
    that `Trainer` takes, and:

    - with a `processing_class` (the tokenizer), it collates blocks by `PackedCollator` and
      evaluates `eval_loss`, `eval_perplexity` and `eval_bits_per_byte` as exact sums over tokens,
      whatever the batch size; your own `data_collator` or `compute_metrics` wins;
    - `speed` measures the tokens per second and MFU that the log shows;
    - `settings` are kept in the checkpoints, see run_settings.py.
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(self, model=None, args=None, *, speed: SpeedCallback | None = None, **kwargs):
        # With a tokenizer, blocks are packed and metrics exact, unless the user chose otherwise.
        tokenizer = kwargs.get("processing_class")
        self.byte_counts = None
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            if kwargs.get("data_collator") is None:
                kwargs["data_collator"] = PackedCollator(tokenizer.eos_token_id)
            if kwargs.get("compute_metrics") is None:
                kwargs["compute_metrics"] = _compute_metrics
                self.byte_counts = token_byte_counts(tokenizer)
        self.speed = speed or SpeedCallback()
        kwargs["callbacks"] = [self.speed, *(kwargs.get("callbacks") or [])]
        if isinstance(args, NanoGPTTrainingArguments) and args.num_threads:
            torch.set_num_threads(args.num_threads)
        config = getattr(model, "config", None)
        use_cache = getattr(config, "use_cache", None)
        super().__init__(model, args, **kwargs)
        if config is not None and use_cache is not None:
            config.use_cache = use_cache  # Trainer replaces it, and it would be saved
        if self.is_fsdp_enabled:
            _prepare_fsdp(self.accelerator.state.fsdp_plugin)
        # Our progress bar replaces the stock one, and printing of all that is logged.
        self.remove_callback(PrinterCallback)
        if self.pop_callback(StockProgressCallback) is not None:
            self.add_callback(ProgressCallback)
        # By default, TensorBoard writes into the current folder.
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = os.path.join(self.args.output_dir, "tensorboard")

    def log(self, logs, start_time=None):
        """Log as `Trainer` does, with `tokens_per_second` and `mfu` next to the training loss."""
        if "loss" in logs:
            logs.update(self.speed.read(self.state))
        super().log(logs, start_time)

    def compute_loss(self, model, inputs, *args, **kwargs):
        """Return Trainer's loss; the model keeps a cache only if `args.use_cache` says so."""
        if getattr(self.model.config, "use_cache", None) is not None:
            inputs = {"use_cache": self.args.use_cache} | inputs
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples, device):
        """Count 1 if there is nothing to learn, so that the loss is 0 and not 0 / 0."""
        count = super()._get_num_items_in_batch(batch_samples, device)
        return count.clamp(min=1) if isinstance(count, torch.Tensor) else count and max(count, 1)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            args = self.args
            self.optimizer = build_optimizer(
                self.model if model is None else model,
                recipe=args.optim_recipe,
                learning_rate=args.learning_rate,
                weight_decay=args.weight_decay,
                betas=(args.adam_beta1 or 0.0, args.adam_beta2 or 0.0),
                eps=args.adam_epsilon,
                momentum_warmup=args.momentum_warmup_steps,
            )
        return self.optimizer

    def get_eval_dataloader(self, eval_dataset=None):
        """Evaluate on every block: without the last batch, the result would not be exact."""
        # Trainer reads the flag here, for training and evaluation alike.
        kept, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = kept

    def create_scheduler(self, num_training_steps, optimizer=None):
        with settings_errors():  # of lr_scheduler_kwargs
            return super().create_scheduler(num_training_steps, optimizer)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return the sums of each row as "logits", which Trainer gathers over all processes."""
        if self.byte_counts is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad(), self.compute_loss_context_manager():
            sums = sum_losses(model, self._prepare_inputs(inputs), self.byte_counts)
        return None, sums, sums

    def gather_model(self) -> PreTrainedModel:
        """Return the trained model; with FSDP, whole again on the process that saves."""
        model = self.accelerator.unwrap_model(self.model)
        if not self.is_fsdp_enabled:
            return model
        state_dict = self.accelerator.get_state_dict(self.model)  # all processes send their part
        if not self.args.should_save:
            return model
        whole = NanoGPTForCausalLM.from_pretrained(
            None, config=model.config, state_dict=state_dict, trust_remote_code=False
        )
        whole.generation_config = model.generation_config
        return whole


def _prepare_fsdp(plugin: FullyShardedDataParallelPlugin) -> None:
    """Keep losses and the sums of gradients in float32, where weights are used in bfloat16."""
    if plugin.fsdp_version == 1:
        raise UserError(
            "fsdp_version=1 flattens the matrices that Muon needs: set fsdp_version to 2, as "
            "examples/accelerate/fsdp2.yaml does."
        )
    if policy := plugin.mixed_precision_policy:
        policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)
        plugin.mixed_precision_policy = policy


def _compute_metrics(prediction) -> dict[str, float]:
    result = summarize_losses(torch.as_tensor(prediction.predictions))
    return {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.num_tokens,
        "bytes": result.num_bytes,
    }
