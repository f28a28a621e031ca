"""The Trainer of this project: transformers' Trainer, our optimizer, exact metrics."""

import inspect
import os
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import FullyShardedDataParallelPlugin
from torch.nn.functional import pad
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import TensorBoardCallback
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_callback import ProgressCallback as StockProgressCallback
from transformers.trainer_utils import has_length, unwrap_peft_model
from transformers.utils import logging

from ..data.packing import PackedBlocks, PackedCollator, PackedStream
from ..data.tokenization import token_byte_counts
from ..errors import UserError, settings_errors
from ..linear_cross_entropy import LOGITS_AT_ONCE, linear_cross_entropy
from ..modeling_nanogpt import NanoGPTForCausalLM
from .arguments import NanoGPTTrainingArguments
from .callbacks import SpeedCallback
from .checks import check_schedule, explain_arguments
from .evaluating import EvaluatingTrainer, use_threads
from .optim import build_optimizer
from .orthogonal import find_sharing_group
from .progress import ProgressCallback

logger = logging.get_logger(__name__)


class NanoGPTTrainer(EvaluatingTrainer):
    """Train on packed blocks by the optimizer of `args.optim_recipe`.

    It is transformers' `Trainer`, in five files: resume.py (exact checkpoints), stopping.py
    (signals), publishing.py (the Hub), evaluating.py (metrics), and this one (optimizer and loss).
    It takes all that `Trainer` takes, and:

    - with a `processing_class` (the tokenizer), a language model's blocks are collated by
      `PackedCollator`, and `evaluate()` measures `eval_loss`, `eval_perplexity` and
      `eval_bits_per_byte` as exact sums over tokens, whatever the batch size; with your own
      `data_collator` or `compute_metrics`, it evaluates as `Trainer` does;
    - an `optim` or your own optimizer takes the place of `optim_recipe`;
    - `speed` measures the tokens per second and MFU that the log shows;
    - `settings` are kept in the checkpoints, see run_settings.py.
    """

    optimizer: torch.optim.Optimizer | None
    label_smoother: Any

    def __init__(self, model=None, args=None, *, speed: SpeedCallback | None = None, **kwargs):
        _check_collator(kwargs.get("data_collator"))
        self.speed = speed or SpeedCallback()
        kwargs["callbacks"] = [self.speed, *(kwargs.get("callbacks") or [])]
        config = getattr(model, "config", None)
        use_cache = getattr(config, "use_cache", None)
        super().__init__(model, args, **kwargs)
        if config is not None and use_cache is not None:
            config.use_cache = use_cache  # Trainer replaces it, and it would be saved
        # With a tokenizer, blocks are packed and metrics exact, unless the user chose otherwise.
        tokenizer = self.processing_class
        if isinstance(tokenizer, PreTrainedTokenizerBase) and self.shifts_labels:
            if kwargs.get("data_collator") is None:
                mask = getattr(args, "document_mask", True)
                self.data_collator = PackedCollator(tokenizer.eos_token_id, mask)
            if isinstance(self.data_collator, PackedCollator) and self.compute_metrics is None:
                self.byte_counts = token_byte_counts(tokenizer)
        # Trainer knows only transformers' own classes as language models.
        if self.label_smoother is not None and self.shifts_labels:
            self.label_smoother = partial(self.label_smoother, shift_labels=True)
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

    @property
    def shifts_labels(self) -> bool:
        """Say whether the loss compares each token with the label after it, as language models."""
        return getattr(unwrap_peft_model(self.model), "loss_type", "") == "ForCausalLM"

    def train(self, *args, **kwargs):
        with use_threads(self.args):
            return super().train(*args, **kwargs)

    def set_initial_training_values(self, args, dataloader):
        """Refuse what would make no step, or would fail at one, before anything is trained."""
        if has_length(dataloader) and len(dataloader) == 0:
            raise UserError(
                f"per_device_train_batch_size={args.per_device_train_batch_size} is larger than "
                "the training data, and dataloader_drop_last=True leaves out batches that are not "
                "full: lower one, or leave out the other."
            )
        *values, max_steps = super().set_initial_training_values(args, dataloader)
        if self.lr_scheduler is None:
            check_schedule(args, max_steps)
        if self.optimizer is self.optimizer_cls_and_kwargs is None and getattr(args, "optim", None):
            with explain_arguments(args):  # some need a package
                self.get_optimizer_cls_and_kwargs(args, self.model)
        return (*values, max_steps)

    def log(self, logs, start_time=None):
        """Log as `Trainer` does, with `tokens_per_second` and `mfu` next to the training loss."""
        if "loss" in logs:
            logs.update(self.speed.read(self.state))
        super().log(logs, start_time)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return Trainer's loss; the model keeps a cache only if `args.use_cache` says so.

        If nothing reads the logits of a batch, and there are more than `LOGITS_AT_ONCE`, a model of
        ours computes the loss without having all of them in memory, by `linear_cross_entropy`.
        """
        if getattr(getattr(self.model, "config", None), "use_cache", None) is not None:
            inputs = {"use_cache": self.args.use_cache} | inputs
        smoother, smoothing = self.label_smoother, self.args.label_smoothing_factor
        if not return_outputs and self._has_too_many_logits(inputs):
            smooth = partial(linear_cross_entropy, label_smoothing=smoothing)
            inputs = {**inputs, "linear_loss": smooth if smoothing else linear_cross_entropy}
            self.label_smoother = None  # it reads the logits
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self.label_smoother = smoother

    def _has_too_many_logits(self, inputs) -> bool:
        model, labels = unwrap_peft_model(self.model), inputs.get("labels")
        if labels is None or self.compute_loss_func is not None:
            return False
        if "linear_loss" not in inspect.signature(type(model).forward).parameters:
            return False
        too_many = labels.numel() * model.config.vocab_size > LOGITS_AT_ONCE
        return too_many and model.loss_function is ForCausalLMLoss

    def training_step(self, model, inputs, *args, **kwargs):
        """Do Trainer's step; with `torch_compile`, one graph serves smaller batches too."""
        if self.args.torch_compile and isinstance(self.data_collator, PackedCollator):
            rows = self.state.train_batch_size  # `auto_find_batch_size` may have lowered it
            inputs = _fill_batch(inputs, rows or 0, self.speed.context_length or 0)
        return super().training_step(model, inputs, *args, **kwargs)

    def _track_num_input_tokens(self, inputs):
        """Count as Trainer does, which reads the count from the GPU and so waits for each step.

        Packed blocks have one length but for the last one, which a second row in its batch pads to
        the same, so each process knows the counts of all.
        """
        world, ids = self.args.world_size, inputs.get("input_ids")
        if ids is None or self.args.include_num_input_tokens_seen != "all":
            return super()._track_num_input_tokens(inputs)
        is_packed = isinstance(self.train_dataset, PackedBlocks | PackedStream)
        is_even = isinstance(self.data_collator, PackedCollator) and self.accelerator.even_batches
        if world == 1 or (is_packed and is_even and len(ids) > 1):
            self.state.num_input_tokens_seen += world * ids.numel()
        else:
            super()._track_num_input_tokens(inputs)

    def _get_num_items_in_batch(self, batch_samples, device):
        """Count 1 if there is nothing to learn, so that the loss is 0 and not 0 / 0."""
        count = super()._get_num_items_in_batch(batch_samples, device)
        return count.clamp(min=1) if isinstance(count, torch.Tensor) else count and max(count, 1)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Leave out of the loss the rows that several processes repeat to share the last batch.

        So they learn what one process learns from the same batches.
        """
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        args, accelerator = self.args, self.accelerator
        if (
            count is None
            or args.world_size == 1
            or not (self.shifts_labels and accelerator.gradient_state.end_of_dataloader)
            or not (has_length(self.train_dataset) and accelerator.even_batches)
            # These repeat none.
            or args.dataloader_drop_last
            or args.train_sampling_strategy == "batch_rebalance"
        ):
            return batches, count
        # The first process has the first rows of the last batch.
        labels = batches[-1]["labels"]
        if rest := len(self.train_dataset) % (len(labels) * args.world_size):
            repeated = labels[max(0, rest - len(labels) * args.process_index) :]
            repeated.fill_(-100)
            if args.include_num_input_tokens_seen == "all":  # Trainer will count them
                tokens = accelerator.gather(torch.tensor(repeated.numel(), device=device))
                self.state.num_input_tokens_seen -= int(tokens.sum())
        return batches, self._get_num_items_in_batch(batches, device)

    @property
    def _has_recipe(self) -> bool:
        args = self.args
        chosen = self.optimizer_cls_and_kwargs is not None or getattr(args, "optim", None)
        return isinstance(args, NanoGPTTrainingArguments) and not chosen

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        args = self.args
        if self.optimizer is None and self._has_recipe:
            self.optimizer = build_optimizer(
                self.model if model is None else model,
                recipe=args.optim_recipe,
                learning_rate=args.learning_rate,
                head_learning_rate=args.head_learning_rate,
                weight_decay=args.weight_decay,
                betas=(args.adam_beta1 or 0.0, args.adam_beta2 or 0.0),
                eps=args.adam_epsilon,
                momentum_warmup=args.momentum_warmup_steps,
                process_group=find_sharing_group() if self._is_replicated() else None,
            )
        return super().create_optimizer(model)

    def _is_replicated(self) -> bool:
        """Say whether each process holds the whole model, and the same gradients, as with DDP."""
        by_ddp = self.accelerator.distributed_type.startswith("MULTI_")
        return by_ddp and not self.is_distributed_loading_by_transformers

    def create_scheduler(self, num_training_steps, optimizer=None):
        with settings_errors():  # of lr_scheduler_kwargs
            return super().create_scheduler(num_training_steps, optimizer)

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


def _fill_batch(inputs: dict, rows: int, length: int) -> dict:
    """Fill a batch of `PackedCollator` up to (rows, length) by what is not learnt."""
    filled = dict(inputs)
    # Without `document_mask` there are no position ids.
    for name in inputs.keys() & {"input_ids", "labels", "position_ids"}:
        given = inputs[name]
        below, right = max(0, rows - given.shape[0]), max(0, length - given.shape[1])
        filled[name] = pad(given, (0, right, 0, below), value=-100 if name == "labels" else 0)
    return filled


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


def _check_collator(collator) -> None:
    """Warn of a collator that does not let the end of a text be learnt."""
    tokenizer: Any = getattr(collator, "tokenizer", None)
    if not isinstance(collator, DataCollatorForLanguageModeling) or collator.mlm:
        return
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        logger.warning(
            f"DataCollatorForLanguageModeling does not learn the pad_token, which is "
            f"{tokenizer.pad_token!r}, as is the eos_token: the model never learns where a text "
            "ends. Leave data_collator out, or give the tokenizer another pad_token."
        )
