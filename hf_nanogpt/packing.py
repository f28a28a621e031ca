"""From documents to training batches: tokens in packed blocks with `position_ids`.

Packed, a corpus reads `<eos> document <eos> document ... <eos>`, cut into blocks of
`context_length` tokens in which the last token of one block is the first of the next: as models
predict the tokens after the first of a block, every token is predicted exactly once.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, List, NamedSplit, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from .data import Documents

_VERSION = 1  # of the blocks; a new one leaves those in the cache of `datasets` behind


def pack_documents(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int,
    num_proc: int | None = None,
) -> Documents:
    """Tokenise documents and pack them into rows with `input_ids` of `context_length` tokens.

    The last block may be shorter; `PackedCollator` pads it. A `Dataset` is memory-mapped from Arrow
    files in the cache of `datasets`, so the corpus may be larger than memory; an `IterableDataset`
    is packed as it streams.
    """
    eos = tokenizer.eos_token_id
    kind = "uint16" if len(tokenizer) <= 2**16 else "int32"
    features = Features({"input_ids": List(Value(kind))})
    settings = {"context_length": context_length, "eos_token_id": eos}
    encode = _Encoder(tokenizer)
    if isinstance(documents, IterableDataset):
        tokens = documents.map(
            encode, batched=True, remove_columns=list(documents.features or ["text"])
        )
        return IterableDataset.from_generator(
            _generate_blocks, gen_kwargs={"tokens": tokens, **settings}, features=features
        )
    words = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer
    key = Hasher.hash((_VERSION, documents._fingerprint, words, eos))
    tokens = documents.map(
        encode,
        batched=True,
        batch_size=64,
        remove_columns=documents.column_names,
        features=features,
        num_proc=num_proc,
        new_fingerprint=key,
        desc="Tokenising",
    )
    blocks = Dataset.from_generator(
        _generate_blocks,
        gen_kwargs={"tokens": tokens, **settings},
        features=features,
        fingerprint=Hasher.hash((key, settings)),
        split=NamedSplit("blocks"),
    )
    return blocks.with_format("numpy")


class _Encoder:
    """Turn a batch of texts into token ids, eos first where a document starts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def __call__(self, batch: dict) -> dict:
        starts = batch.get("starts") or [True] * len(batch["text"])
        # "<|endoftext|>" inside a text is text, not the end of a document.
        encoded = self.tokenizer(
            batch["text"],
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        eos = [self.tokenizer.eos_token_id]
        return {
            "input_ids": [
                eos + ids if new else ids for new, ids in zip(starts, encoded, strict=True)
            ]
        }


def _generate_blocks(tokens: Documents, context_length: int, eos_token_id: int) -> Iterator[dict]:
    """Cut the stream of all tokens, closed by eos, into blocks that overlap by one token."""
    rest = np.empty(0, dtype=np.int64)
    for row in tokens.with_format("numpy"):
        stream = np.concatenate((rest, row["input_ids"]))
        count = max(0, (len(stream) - 1) // (context_length - 1))
        for i in range(count):
            start = i * (context_length - 1)
            yield {"input_ids": stream[start : start + context_length]}
        rest = stream[count * (context_length - 1) :]
    yield {"input_ids": np.append(rest, eos_token_id)}


@dataclass
class PackedCollator:
    """Make a batch of blocks: `input_ids`, `labels` and `position_ids`, each (B, T) of int64.

    Positions start again at every eos, which keeps packed documents from seeing each other, and the
    labels equal the inputs (models shift them). A short block is filled with eos, labelled -100.
    """

    eos_token_id: int

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        input_ids = torch.full((len(rows), length), self.eos_token_id)
        labels = torch.full_like(input_ids, -100)
        for i, row in enumerate(rows):
            ids = torch.as_tensor(np.asarray(row["input_ids"], dtype=np.int64))
            input_ids[i, : len(ids)] = labels[i, : len(ids)] = ids
        index = torch.arange(length).expand_as(input_ids)
        starts = torch.where(input_ids == self.eos_token_id, index, 0).cummax(dim=1).values
        return {"input_ids": input_ids, "labels": labels, "position_ids": index - starts}
