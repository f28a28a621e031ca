"""How well a model predicts text: loss, perplexity and bits per byte, summed over every token."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .checkpoint import load_checkpoint
from .data import DataArguments, Documents, load_documents, load_text
from .packing import PackedCollator, pack_documents
from .tokenization import token_byte_counts


@dataclass(frozen=True)
class EvaluationResult:
    """What `evaluate` measured.

    Attributes:
        loss: mean negative log-likelihood, nats per predicted token.
        perplexity: exp(loss).
        bits_per_byte: all nats over ln 2, per byte of the text in UTF-8. Unlike the loss it can be
            compared between tokenizers. Predicting where documents end costs bits too, and adds no
            byte.
        num_tokens: tokens predicted, one <|endoftext|> per document included.
        num_bytes: bytes of the text.
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
    logits = model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).logits[:, :-1]
    nats = nn.functional.cross_entropy(
        logits.float().mT, labels, reduction="none"
    )  # 0 where ignored
    known = labels != -100
    sizes = byte_counts.to(labels.device)[labels.clamp(min=0)] * known
    return torch.stack([x.double().sum(dim=1) for x in (nats, known, sizes)], dim=1)


def summarize_losses(sums: torch.Tensor) -> EvaluationResult:
    """Turn sums of nats, tokens and bytes, shape (..., 3), into the result."""
    nats, tokens, size = sums.reshape(-1, 3).sum(dim=0).tolist()
    loss = nats / max(tokens, 1)
    return EvaluationResult(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=nats / math.log(2) / max(size, 1),
        num_tokens=int(tokens),
        num_bytes=int(size),
    )


@torch.no_grad()
def evaluate(
    model: PreTrainedModel | str | Path,
    data: Documents | str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    context_length: int | None = None,
    batch_size: int = 16,
    text_column: str = "text",
    held_out: float | None = None,
    show_progress: bool = False,
) -> EvaluationResult:
    """Measure a model on text, in blocks of `context_length` tokens.

    Args:
        model: a model with its `tokenizer`, or the folder or Hub id of a checkpoint.
        data: documents, or what `hf-nanogpt train --data` takes.
        context_length: by default the model's; longer ones are refused.
        batch_size: blocks at a time; changes speed, not the result.
        held_out: measure on the part that training with `validation_fraction=held_out` holds out.

    Raises:
        ValueError: there is no such checkpoint or data, or `context_length` is out of range.
    """
    if not isinstance(model, PreTrainedModel):
        model, own_tokenizer = load_checkpoint(model)
        tokenizer = tokenizer or own_tokenizer
    if tokenizer is None:
        raise ValueError("tokenizer=None: give the tokenizer that goes with the model.")
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens and the model vocab_size="
            f"{model.config.vocab_size}: they do not belong together."
        )
    length = check_context_length(model.config, context_length)
    documents = data
    if isinstance(data, str) and held_out is not None:
        split = DataArguments(data=data, text_column=text_column, validation_fraction=held_out)
        documents = load_documents(split)[1]
    elif isinstance(data, str):
        documents = load_text(data, text_column=text_column)
    blocks = pack_documents(documents, tokenizer, context_length=length)
    collate = PackedCollator(tokenizer.eos_token_id)
    loader: DataLoader = DataLoader(blocks, batch_size=batch_size, collate_fn=collate)
    counts = token_byte_counts(tokenizer).to(model.device)
    was_training = model.training
    model.eval()
    total = torch.zeros(3, dtype=torch.float64)
    try:
        for batch in tqdm(loader, desc="Evaluating", disable=not show_progress, leave=False):
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            total += sum_losses(model, batch, counts).sum(dim=0).cpu()
    finally:
        model.train(was_training)
    if not total[1]:
        raise ValueError(f"data={data} holds no text: there is nothing to measure on.")
    return summarize_losses(total)


def check_context_length(config: PreTrainedConfig, context_length: int | None) -> int:
    """Return the block length to use, or raise a `ValueError` where the model cannot take it."""
    limit = config.max_position_embeddings
    length = limit if context_length is None else context_length
    if not 2 <= length <= limit:
        raise ValueError(
            f"context_length={length} is out of range: this model takes 2 to {limit} tokens "
            "(max_position_embeddings, or block_size)."
        )
    return length
