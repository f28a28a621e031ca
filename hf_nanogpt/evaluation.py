"""How well a model predicts text: loss, perplexity and bits per byte, summed over every token."""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import unwrap_peft_model

from .checkpoint.loading import load_checkpoint
from .data.conversations import Documents
from .data.documents import (
    DataArguments,
    check_fraction,
    count_bytes,
    load_documents,
    load_text,
)
from .data.encoding import count_ids, encode_unlearnt
from .data.packing import PackedBlocks, PackedCollator, PackedStream, pack_documents
from .data.tokenization import token_byte_counts
from .errors import UserError, without_secrets
from .linear_cross_entropy import LOGITS_AT_ONCE


@dataclass(frozen=True)
class EvaluationResult:
    """What `evaluate` measured.

    Attributes:
        loss: mean negative log-likelihood, nats per predicted token.
        perplexity: exp(loss).
        bits_per_byte: all nats over ln 2, per byte of the text in UTF-8. Unlike the loss it can be
            compared between tokenizers. It includes the bits for predicting where documents end.
        num_tokens: tokens predicted, including one <|endoftext|> per document.
        num_bytes: bytes of the text; of conversations, those of the tokens that are learnt.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    num_tokens: int
    num_bytes: int


def sum_losses(
    model: nn.Module, batch: dict[str, torch.Tensor], byte_counts: torch.Tensor
) -> torch.Tensor:
    """Return nats, predicted tokens and bytes of each row of a packed batch, (B, 3) float64."""
    labels = batch["labels"][:, 1:]  # (B, T - 1)
    # No attention mask and no cache: only then do the position ids keep packed documents apart.
    inputs: dict[str, Any] = {"use_cache": False}
    inputs |= {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
    (rows, length), kept = labels.shape, {}
    trunk, vocab_size = _find_trunk(model)
    # Run the trunk once, and the head on as many positions at a time as memory allows.
    size = max(1, LOGITS_AT_ONCE // (rows * vocab_size)) if trunk else length
    in_parts = size < length
    nats = torch.empty(labels.shape, device=labels.device)
    with _run_once(trunk) if trunk and in_parts else nullcontext():
        for start in range(0, max(1, length), max(1, size)):
            part = labels[:, start : start + size]
            if in_parts:
                kept["logits_to_keep"] = start + torch.arange(part.shape[1], device=labels.device)
            logits = model(**inputs, **kept).logits
            if not in_parts and logits.shape[1] != length + 1:
                raise UserError(
                    f"The model returns {logits.shape[1]} logits for {length + 1} tokens. Prompt "
                    "tuning of PEFT does so, and lets packed documents see each other: measure one "
                    "document at a time, or use LoRA."
                )
            logits = logits[:, : part.shape[1]]
            nats[:, start : start + size] = nn.functional.cross_entropy(
                logits.float().mT, part, reduction="none"
            )  # 0 where ignored
    known = labels != -100
    sizes = byte_counts.to(labels.device)[labels.clamp(min=0)] * known
    # Apple's mps has no float64.
    parts = [x.cpu() if x.device.type == "mps" else x for x in (nats, known, sizes)]
    return torch.stack([x.double().sum(dim=1) for x in parts], dim=1)


def _find_trunk(model: nn.Module) -> tuple[nn.Module | None, int]:
    """Return the part of a model before its head, and V; None if logits cannot be had in parts."""
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return None, 0  # positions are not those of the tokens
    model = unwrap_peft_model(model)
    # Sharded, all processes must call the model equally often, however long their rows are.
    if not isinstance(model, PreTrainedModel) or isinstance(model, FSDPModule):
        return None, 0
    takes_positions = "logits_to_keep" in inspect.signature(type(model).forward).parameters
    return (model.base_model if takes_positions else None), model.config.vocab_size


@contextmanager
def _run_once(module: nn.Module) -> Iterator[None]:
    """Let a module answer all calls with its answer to the first."""
    forward, before = module.forward, vars(module).get("forward")
    answers: list[Any] = []

    def remember(*args, **kwargs):
        if not answers:
            answers.append(forward(*args, **kwargs))
        return answers[0]

    module.forward = remember
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def summarize_losses(sums: torch.Tensor, num_bytes: int | None = None) -> EvaluationResult:
    """Turn sums of nats, tokens and bytes, shape (..., 3), into the result.

    If the bytes of the text are known, `num_bytes` takes the place of those of the tokens.
    """
    nats, tokens, size = sums.reshape(-1, 3).sum(dim=0).tolist()
    size = size if num_bytes is None else num_bytes
    loss = nats / max(tokens, 1)
    return EvaluationResult(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=nats / math.log(2) / max(size, 1),
        num_tokens=int(tokens),
        num_bytes=int(size),
    )


class SlidingWindows(IterableDataset):
    """Blocks that begin with up to `overlap` tokens of those before, which are not predicted again.

    These tokens, and the first one of each block, are marked as not to be learnt, so that
    `PackedCollator` leaves them out of the labels.
    """

    def __init__(self, blocks: PackedBlocks | PackedStream, *, overlap: int):
        self.blocks, self.overlap = blocks, overlap

    def __len__(self) -> int:
        return len(self.blocks)  # type: ignore[arg-type]  # a stream has no length

    def __iter__(self) -> Iterator[dict]:
        past = np.array([], dtype=np.int64)
        for block in iter(self.blocks):
            window, known = np.concatenate((past, block["input_ids"])), len(past) + 1
            yield {"input_ids": np.append(encode_unlearnt(window[:known]), window[known:])}
            # The last token of this block is the first of the next.
            past = window[max(0, len(window) - 1 - self.overlap) : -1]


@torch.no_grad()
def evaluate(
    model: PreTrainedModel | str | Path,
    data: Documents | str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    context_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 16,
    text_column: str = "text",
    held_out: float | None = None,
    document_mask: bool = True,
    show_progress: bool = False,
) -> EvaluationResult:
    """Measure a model on text, in blocks of `context_length` tokens.

    The first tokens of a block are predicted from few others, however long the document is. With a
    `stride`, a window moves by that many tokens at a time, and every token is predicted, once, from
    at least the `context_length - stride` tokens before it, or from all that its document has. This
    takes about `context_length / stride` times as long, and the result for long documents no longer
    depends on where blocks begin.

    Args:
        model: a model with its `tokenizer`, or the folder or Hub id of a checkpoint.
        data: documents, or what `hf-nanogpt train --data` takes.
        context_length: by default the model's; a longer one is refused.
        stride: 1 to `context_length - 1` tokens; by default the latter, without overlap.
        batch_size: blocks at a time; changes speed, not the result.
        held_out: measure on the part that training with `validation_fraction=held_out` holds out.
        document_mask: False lets the documents of a block see those before them, as a model has
            learnt that was trained with `document_mask=False`.

    Raises:
        UserError: the checkpoint or the data does not exist, or a length is out of range.
    """
    if not isinstance(model, PreTrainedModel):
        model, found = load_checkpoint(model)
        tokenizer = tokenizer or found
    if tokenizer is None:
        raise UserError("tokenizer=None: give the tokenizer that goes with the model.")
    if count_ids(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"The tokenizer needs vocab_size={count_ids(tokenizer)}, but the model has vocab_size="
            f"{model.config.vocab_size}: they do not belong together."
        )
    length = check_context_length(model.config, context_length)
    step = check_stride(length, stride)
    documents = _load_text(data, text_column, held_out) if isinstance(data, str) else data
    # Blocks share one token, so blocks of `step + 1` tokens advance by `step`.
    blocks = pack_documents(documents, tokenizer, context_length=step + 1)
    windows = SlidingWindows(blocks, overlap=length - 1 - step)
    collate = PackedCollator(tokenizer.eos_token_id, document_mask)
    loader: DataLoader = DataLoader(windows, batch_size=batch_size, collate_fn=collate)
    counts = token_byte_counts(tokenizer).to(model.device)
    was_training = model.training
    model.eval()
    total = torch.zeros(3, dtype=torch.float64)
    try:
        # None: a bar in a terminal, and nothing in a file.
        hidden = None if show_progress else True
        for batch in tqdm(loader, desc="Evaluating", disable=hidden, leave=False):
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            total += sum_losses(model, batch, counts).sum(dim=0).cpu()
    finally:
        model.train(was_training)
    if not total[1]:
        name = without_secrets(data) if isinstance(data, str) else "documents"
        raise UserError(f"data={name} has no text, or no answers, to measure on.")
    return summarize_losses(total, count_bytes(documents))


def _load_text(data: str, text_column: str, held_out: float | None) -> Documents:
    if held_out is None:
        return load_text(data, text_column=text_column)
    check_fraction("held_out", held_out)
    args = DataArguments(data=data, text_column=text_column, validation_fraction=held_out)
    return load_documents(args)[1]


def check_context_length(config: PreTrainedConfig, context_length: int | None) -> int:
    """Return the block length to use, or raise a `UserError` if the model cannot take it."""
    limit = config.max_position_embeddings
    length = limit if context_length is None else context_length
    if not 2 <= length <= limit:
        raise UserError(
            f"context_length={length} is out of range: this model takes 2 to {limit} tokens "
            "(max_position_embeddings, or block_size)."
        )
    return length


def check_stride(context_length: int, stride: int | None) -> int:
    """Return how far the window moves each time, or raise a `UserError` if it skips tokens."""
    step = context_length - 1 if stride is None else stride
    if not 1 <= step < context_length:
        raise UserError(
            f"stride={stride} is out of range: with blocks of {context_length} tokens it must be "
            f"1 to {context_length - 1}."
        )
    return step
