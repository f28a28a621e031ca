"""Training: transformers' Trainer with our optimizer, packed batches and exact metrics."""

import json
import shlex
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from huggingface_hub.errors import HTTPError
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, Trainer, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_callback import ProgressCallback as StockProgressCallback
from transformers.trainer_utils import HubStrategy, get_last_checkpoint
from transformers.utils import logging

from .arguments import NanoGPTTrainingArguments, as_flags, make_config, parse_settings
from .callbacks import ProgressCallback, plot_losses
from .card import render_model_card
from .checkpoint import check_output_dir, clear_output_dir, staged_folder
from .data import (
    STDLIB,
    DataArguments,
    Documents,
    load_documents,
    load_tokenizer,
)
from .evaluation import check_context_length, sum_losses, summarize_losses
from .facts import collect_facts
from .generation import generate_text
from .hub import Release, push_to_hub, write_card
from .hub_errors import explain_hub_error
from .hub_queue import PushQueue
from .modeling_nanogpt import NanoGPTForCausalLM
from .optim import build_optimizer
from .packing import PackedCollator, pack_documents
from .tokenization import token_byte_counts

logger = logging.get_logger(__name__)


class NanoGPTTrainer(Trainer):
    """Train on packed blocks by the optimizer of `args.optim_recipe`.

    Takes all that `Trainer` takes. With a `processing_class` (the tokenizer) it collates blocks by
    `PackedCollator` and evaluates `eval_loss`, `eval_perplexity` and `eval_bits_per_byte` as exact
    sums over tokens, whatever the batch size; a `data_collator` or `compute_metrics` of one's own
    wins.
    """

    args: NanoGPTTrainingArguments
    optimizer: torch.optim.Optimizer | None

    def __init__(self, model=None, args=None, **kwargs):
        tokenizer = kwargs.get("processing_class")
        self.byte_counts = None
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            if kwargs.get("data_collator") is None:
                kwargs["data_collator"] = PackedCollator(tokenizer.eos_token_id)
            if kwargs.get("compute_metrics") is None:
                kwargs["compute_metrics"] = _compute_metrics
                self.byte_counts = token_byte_counts(tokenizer)
        super().__init__(model, args, **kwargs)
        self.remove_callback(PrinterCallback)
        if self.pop_callback(StockProgressCallback) is not None:
            self.add_callback(ProgressCallback)

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
            )
        return self.optimizer

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Hand the sums of each row to Trainer's loop as "logits", which it gathers."""
        if self.byte_counts is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad(), self.compute_loss_context_manager():
            sums = sum_losses(model, self._prepare_inputs(inputs), self.byte_counts)
        return None, sums, sums

    # The Hub: what hub.py pushes, in place of all files of the folder and a card of blanks.

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        self.pushes = PushQueue()
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        try:
            super().init_hf_repo(token, private)
        except HTTPError as error:
            raise ValueError(
                f"hub_model_id={name} is no place to push to: {explain_hub_error(error)}."
            ) from error

    def create_model_card(self, *args, **kwargs) -> None:
        """Write the card into `output_dir`, where a person's own edits stay."""
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            facts = {"num_parameters": self.model.num_parameters()}
            card = render_model_card(self.model.config, facts, name=folder.absolute().name)
            write_card(card, folder / "README.md")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> Release | None:
        """Save to `output_dir` and push that as `hub.push_to_hub` does; always waits for the end.

        Raises:
            ValueError: the Hub refused; what was trained is safe in `output_dir`.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        return push_to_hub(
            self.args.output_dir,
            self.hub_model_id,
            branch=revision or self.args.hub_revision,
            private=private or bool(self.args.hub_private_repo),
            message=commit_message,
            token=token or self.args.hub_token,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        args, strategy = self.args, self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        branches = [args.hub_revision or "main"]
        if strategy == HubStrategy.CHECKPOINT:
            branches.append("last-checkpoint")
        elif strategy == HubStrategy.ALL_CHECKPOINTS:
            branches.append(Path(checkpoint_folder).name)
        self.pushes.add(
            checkpoint_folder,
            self.hub_model_id,
            branches=branches,
            num_parameters=self.model.num_parameters(),
            message=f"Training in progress, step {self.state.global_step}",
            skip_waiting=not (args.hub_always_push or strategy == HubStrategy.ALL_CHECKPOINTS),
            token=args.hub_token,
        )

    def _finish_current_push(self) -> None:
        if self.hub_model_id is None:
            return
        for error in self.pushes.finish():
            logger.error(
                f"A push during training failed: {error} To push what was trained: hf-nanogpt push "
                f"{shlex.quote(self.args.output_dir)} {self.hub_model_id}"
            )


def _compute_metrics(prediction) -> dict[str, float]:
    result = summarize_losses(torch.as_tensor(prediction.predictions))
    return {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.num_tokens,
        "bytes": result.num_bytes,
    }


@dataclass(frozen=True)
class TrainingResult:
    """Where the checkpoint is, the content of its `metrics.json`, and what it made of a prompt."""

    output_dir: Path
    metrics: dict[str, Any]
    prompt: str
    sample: str


def train(
    recipe: str | Path = "quickstart",
    flags: Sequence[str] = (),
    *,
    resume: bool = False,
    overwrite: bool = False,
    **settings: Any,
) -> TrainingResult:
    """Train a tokenizer and a model from nothing, and write the checkpoint folder.

    Args:
        recipe: the name of one of ours, or the path of a YAML file.
        flags: settings as on the command line; they win.
        resume: go on from the last `checkpoint-*` in `output_dir`.
        overwrite: delete what an earlier training left in `output_dir`.
        settings: those of `DataArguments`, `NanoGPTConfig` (also by nanoGPT's names), `preset`, and
            `NanoGPTTrainingArguments`, for example `max_steps=100, n_layer=6`.

    Raises:
        ValueError: a setting, the data or the output folder is not usable. Nothing was written.
    """
    data_args, architecture, args = parse_settings(recipe, flags, **settings)
    check_output_dir(args.output_dir, overwrite=overwrite, resume=resume)
    # Refuse an impossible architecture now, not after minutes of preparing data for it.
    config = make_config(architecture, vocab_size=data_args.vocab_size)
    check_context_length(config, data_args.context_length)
    last_checkpoint = get_last_checkpoint(args.output_dir) if resume else None

    with args.main_process_first(desc="preparing the data"):
        documents, held_out = load_documents(data_args)
        if last_checkpoint:
            tokenizer = AutoTokenizer.from_pretrained(last_checkpoint)
            config = AutoConfig.from_pretrained(last_checkpoint)
        else:
            tokenizer = load_tokenizer(data_args, documents)
            config = make_config(architecture, **_vocabulary(tokenizer))
        length = check_context_length(config, data_args.context_length)
        tokenizer.model_max_length = config.max_position_embeddings
        pack = partial(
            pack_documents,
            tokenizer=tokenizer,
            context_length=length,
            num_proc=data_args.num_proc,
        )
        blocks, validation = pack(documents), pack(held_out)
    _check_blocks(blocks, length, args)

    set_seed(args.seed)
    trainer = NanoGPTTrainer(
        NanoGPTForCausalLM(config),
        args,
        train_dataset=blocks,
        eval_dataset=validation,
        processing_class=tokenizer,
    )
    if overwrite and args.should_save:
        clear_output_dir(args.output_dir)
    started, tokens_before = time.perf_counter(), _tokens_seen(last_checkpoint)
    trainer.train(resume_from_checkpoint=last_checkpoint)
    seconds = time.perf_counter() - started
    metrics = _collect_metrics(trainer, seconds, tokens_before)
    words = [*as_flags(settings), *flags]
    metrics |= collect_facts(
        str(recipe), words, data_args=data_args, args=args, context_length=length
    )
    prompt = _choose_prompt(args, data_args, held_out)
    result = _write_artifacts(trainer, metrics, prompt=prompt)
    if args.push_to_hub:
        trainer.push_to_hub()
    return result


def _choose_prompt(
    args: NanoGPTTrainingArguments, data_args: DataArguments, held_out: Documents
) -> str:
    """Return the prompt of the sample: the user's, or one that suits the text."""
    if args.sample_prompt is not None:
        return args.sample_prompt
    if data_args.data == STDLIB:
        return "def main("
    return " ".join(next(iter(held_out))["text"].split()[:3])[:40]


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    ids = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    return {"vocab_size": len(tokenizer), **ids}


def _check_blocks(blocks: Documents, length: int, args: NanoGPTTrainingArguments) -> None:
    if isinstance(blocks, IterableDataset):
        if args.max_steps <= 0:
            raise ValueError(f"max_steps={args.max_steps}: a stream has no end, so give max_steps.")
    elif len(blocks) == 1 and (tokens := len(blocks[0]["input_ids"])) < length:
        raise ValueError(
            f"The training text has {tokens} tokens, fewer than one block of context_length="
            f"{length}: give more text, or a smaller block_size or context_length."
        )


def _tokens_seen(checkpoint: str | None) -> int:
    if checkpoint is None:
        return 0
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    return state["num_input_tokens_seen"]


def _collect_metrics(trainer: NanoGPTTrainer, seconds: float, tokens_before: int) -> dict[str, Any]:
    state = trainer.state
    history = [row for row in state.log_history if "eval_loss" in row]
    fresh = history and history[-1]["step"] == state.global_step
    last = history[-1] if fresh and not trainer.args.load_best_model_at_end else trainer.evaluate()
    tokens = state.num_input_tokens_seen
    return {
        "eval_loss": last["eval_loss"],
        "perplexity": last["eval_perplexity"],
        "bits_per_byte": last["eval_bits_per_byte"],
        "eval_tokens": last["eval_tokens"],
        "eval_bytes": last["eval_bytes"],
        "num_parameters": trainer.model.num_parameters(),
        "train_steps": state.global_step,
        "train_tokens": tokens,
        "train_seconds": round(seconds, 2),
        "tokens_per_second": round((tokens - tokens_before) / seconds, 1),
    }


def _write_artifacts(
    trainer: NanoGPTTrainer, metrics: dict[str, Any], *, prompt: str
) -> TrainingResult:
    args, tokenizer = trainer.args, trainer.processing_class
    model = trainer.accelerator.unwrap_model(trainer.model)
    output_dir, sample = Path(args.output_dir), ""
    if not args.should_save:
        return TrainingResult(output_dir, metrics, prompt, sample)
    room = model.config.max_position_embeddings - len(tokenizer(prompt)["input_ids"]) - 1
    with suppress(ValueError):  # a prompt longer than the context leaves no room for a sample
        [sample] = generate_text(
            model.eval(),
            tokenizer,
            prompt,
            max_new_tokens=min(120, room),
            temperature=0.7,
            seed=args.seed,
        )
    metrics |= {"prompt": prompt, "sample": sample}
    card = render_model_card(model.config, metrics, name=output_dir.name)
    with staged_folder(output_dir) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        try:
            write_card(card, output_dir / "README.md", to=folder / "README.md")
        except ValueError as error:  # no reason to lose the training: the old card stays
            logger.warning(str(error))
        plot_losses(
            trainer.state.log_history, folder / "loss.png", title=f"{output_dir.name}: loss"
        )
    return TrainingResult(output_dir, metrics, prompt, sample)
