"""From text to training batches: sources -> documents -> packed blocks with `position_ids`.

A corpus is a list of documents, not one stream. Packed, it reads `<eos> document <eos> document ...
<eos>`, cut into blocks of `context_length` tokens in which the last token of one block is the first
of the next: as models predict the tokens after the first of a block, every token is predicted
exactly once.
"""

import glob
import math
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, List, NamedSplit, Value, load_dataset
from datasets.fingerprint import Hasher
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from .checkpoint import unreachable
from .tokenization import TokenizerKind, train_tokenizer

logger = logging.get_logger(__name__)

STDLIB = "python-stdlib"
_TABLES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_PIECE = 4_000_000  # characters of a long text that are handled at a time
_TOKENIZER_BYTES = 64_000_000  # more text than this does not change a small vocabulary
_FEW = 20  # with fewer documents than this, each gives its tail to validation

Documents: TypeAlias = Dataset | IterableDataset


@dataclass
class DataArguments:
    """Where the text comes from and how it becomes tokens."""

    data: str = field(
        default=STDLIB,
        metadata={
            "help": "Text to train on: a file, folder or glob of UTF-8 text, or of .jsonl, .csv "
            "or .parquet tables, a Hub dataset id, or "
            f"{STDLIB} (the source code of Python's standard library)."
        },
    )
    validation_data: str | None = field(
        default=None,
        metadata={"help": "Text to validate on; by default part of `data` is held out."},
    )
    validation_fraction: float = field(
        default=0.1, metadata={"help": "Share of `data` that is held out, by document."}
    )
    text_column: str = field(
        default="text", metadata={"help": "Column of a table that holds the text."}
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub dataset."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    streaming: bool = field(
        default=False, metadata={"help": "Read a table or Hub dataset as a stream."}
    )
    validation_documents: int = field(
        default=200, metadata={"help": "Documents to hold out of a stream."}
    )
    tokenizer: str = field(
        default="bpe", metadata={"help": "bpe, char, byte, or the folder or Hub id of a tokenizer."}
    )
    vocab_size: int = field(
        default=2048, metadata={"help": "Size of the vocabulary for tokenizer=bpe."}
    )
    context_length: int | None = field(
        default=None, metadata={"help": "Tokens in a block; by default the model's context."}
    )
    num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise."})

    def __post_init__(self):
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction={self.validation_fraction} must be between 0 and 1, "
                "for example 0.1."
            )


def load_documents(args: DataArguments) -> tuple[Documents, Documents]:
    """Load `args.data` and return its training and validation documents, rows with a `text`.

    Which documents are held out depends on their text alone (a checksum), not on their order; of a
    corpus of fewer than 20 text files the end of each is held out, of so small a table the last
    rows.

    Raises:
        ValueError: the source is missing, empty or no text, or too small to hold anything out.
    """
    if args.validation_data:
        return _read(args.data, args, 0.0)[0], _read(args.validation_data, args, 0.0)[0]
    train, validation = _read(args.data, args, args.validation_fraction)
    if _is_empty(validation) or _is_empty(train):
        raise ValueError(
            f"data={args.data} is too small to hold out validation_fraction="
            f"{args.validation_fraction} of it: give more text, a larger fraction, or "
            "validation_data."
        )
    return train, validation


def load_text(data: str, *, text_column: str = "text") -> Documents:
    """Return all documents of `data` (see `DataArguments`), nothing held out."""
    return _read(data, DataArguments(text_column=text_column), 0.0)[0]


def _is_empty(documents: Documents) -> bool:
    return next(iter(documents), None) is None


def _read(data: str, args: DataArguments, fraction: float) -> tuple[Documents, Documents]:
    files = _find_files(data)
    if files and files[0].suffix not in _TABLES:
        return _read_texts(data, files, fraction)
    return _read_table(data, files, args, fraction)


# Text files


def _find_files(data: str) -> list[Path]:
    """List the files that `data` names; none means that it can only be a Hub id."""
    path = Path(data).expanduser()
    if data == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
        files = [p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts)]
    elif path.is_dir():
        files = [
            p for p in path.rglob("*") if not any(x[0] == "." for x in p.relative_to(path).parts)
        ]
    elif path.is_file():
        return [path]
    else:
        files = [Path(p) for p in glob.glob(str(path), recursive=True)]
        if not files and (
            data.count("/") != 1 or path.suffix or path.parent.is_dir() or "*" in data
        ):
            raise ValueError(f"data={data} was not found: there is no such file, folder or match.")
        if not files:
            return []
    files = sorted(p for p in files if p.is_file() and p.stat().st_size)
    texts = [p for p in files if p.suffix not in _TABLES and _is_text(p)]
    tables = [p for p in files if p.suffix in _TABLES]
    if tables and texts:
        raise ValueError(
            f"data={data} mixes tables ({tables[0].name}) and texts: give a glob for one."
        )
    if not texts and not tables:
        raise ValueError(f"data={data} holds no UTF-8 text and no .jsonl, .csv or .parquet file.")
    if skipped := len(files) - len(texts) - len(tables):
        logger.warning(f"{skipped} of the files in {data} are no UTF-8 text and are left out.")
    return tables or texts


def _is_text(path: Path) -> bool:
    """Say whether a file begins as UTF-8 text (the rest is checked when it is read)."""
    with path.open("rb") as file:
        head = file.read(8192)
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:
            return False
    return bool(head.strip()) and b"\0" not in head


def _read_texts(data: str, files: list[Path], fraction: float) -> tuple[Dataset, Dataset]:
    for path in files:
        if path.stat().st_size == 0:
            raise ValueError(f"data={path} is empty: there is nothing to train on.")
        if not _is_text(path):
            raise ValueError(f"data={path} is not UTF-8 text: convert it, or name the right file.")
    # Sizes and times are among the arguments, so that a changed text is not served from the cache.
    # (A tuple: `from_generator` would hand a list to the generator one element at a time.)
    state = tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files)

    features = Features({"text": Value("large_string"), "starts": Value("bool")})

    def write(held_out: bool) -> Dataset:
        settings = {"state": state, "fraction": fraction, "held_out": held_out}
        if next(_generate_texts(**settings), None) is None:
            return Dataset.from_dict({"text": [], "starts": []}, features=features)
        return Dataset.from_generator(
            _generate_texts,
            gen_kwargs=settings,
            features=features,
            fingerprint=Hasher.hash(("texts", state, fraction, held_out)),
            split=NamedSplit("validation" if held_out else "training"),
        )

    try:
        kept = write(False)
        return kept, write(True) if fraction else kept
    except Exception as error:
        cause = error.__cause__ or error
        if isinstance(cause, UnicodeDecodeError):
            raise ValueError(f"data={data} is not UTF-8 text: {cause}.") from error
        raise


def _generate_texts(state: tuple, fraction: float, held_out: bool) -> Iterator[dict]:
    """Yield the pieces of each text on one side of the split; `starts` marks the first of each."""
    for name, *_ in state:
        pieces = _read_pieces(name)
        if len(state) >= _FEW:
            first = next(pieces, "")
            if _is_held_out(first, fraction) == held_out:
                yield {"text": first, "starts": True}
                yield from ({"text": piece, "starts": False} for piece in pieces)
            continue
        cut = math.floor(sum(map(len, _read_pieces(name))) * (1 - fraction))
        at, starts = 0, True
        for piece in pieces:
            split = max(0, min(cut - at, len(piece)))
            at += len(piece)
            if text := piece[split:] if held_out else piece[:split]:
                yield {"text": text, "starts": starts}
                starts = False


def _read_pieces(name: str) -> Iterator[str]:
    """Yield a text file in pieces that end at a line's end, every character as it stands."""
    with open(name, encoding="utf-8", newline="") as file:
        while piece := file.read(_PIECE):
            yield piece + file.readline()


def _is_held_out(text: str, fraction: float) -> bool:
    return zlib.crc32(text.encode("utf-8", "replace")) < fraction * 2**32


# Tables and the Hub


def _read_table(
    data: str, files: list[Path], args: DataArguments, fraction: float
) -> tuple[Documents, Documents]:
    try:
        if files:
            names = [str(p) for p in files]
            kind = _TABLES[files[0].suffix]
            table = load_dataset(kind, data_files=names, split="train", streaming=args.streaming)
        else:
            table = load_dataset(
                data, args.dataset_config, split=args.dataset_split, streaming=args.streaming
            )
    except (OSError, ValueError) as error:
        if files:
            raise ValueError(f"data={data} cannot be read as a table: {error}") from error
        if isinstance(error, OSError):
            raise ValueError(f"data={unreachable(data, 'file or folder')}") from error
        raise ValueError(f"data={data} cannot be loaded: {error}") from error
    except Exception as error:
        raise ValueError(f"data={data} cannot be read as a table: {error}") from error
    columns = table.column_names or list(next(iter(table), {}))
    if args.text_column not in columns:
        raise ValueError(
            f"text_column={args.text_column!r} is not in {data}; its columns are: "
            f"{', '.join(columns)}."
        )
    table = table.select_columns(args.text_column)
    if args.text_column != "text":
        table = table.rename_column(args.text_column, "text")
    table = table.filter(_has_text)
    if not fraction:
        return table, table
    if isinstance(table, Dataset) and len(table) < _FEW:
        kept = len(table) - math.ceil(len(table) * fraction)
        return table.select(range(kept)), table.select(range(kept, len(table)))
    train = table.filter(_keep, fn_kwargs={"fraction": fraction, "held_out": False})
    validation = table.filter(_keep, fn_kwargs={"fraction": fraction, "held_out": True})
    if isinstance(validation, IterableDataset):
        validation = Dataset.from_list(list(validation.take(args.validation_documents)))
    return train, validation


def _has_text(row: dict) -> bool:
    return bool(row["text"])


def _keep(row: dict, fraction: float, held_out: bool) -> bool:
    return _is_held_out(row["text"], fraction) == held_out


# Tokens and blocks


def load_tokenizer(args: DataArguments, documents: Documents) -> PreTrainedTokenizerBase:
    """Train the tokenizer that `args` names on `documents`, or load it from a folder or the Hub."""
    if args.tokenizer in ("bpe", "char", "byte"):
        texts = (row["text"] for row in documents)
        return train_tokenizer(
            _limit(texts), kind=cast(TokenizerKind, args.tokenizer), vocab_size=args.vocab_size
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    except (OSError, ValueError) as error:
        where = unreachable(
            args.tokenizer, "kind of tokenizer (bpe, char, byte) or folder with one"
        )
        raise ValueError(f"tokenizer={where}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer={args.tokenizer} has no eos_token, which separates documents.")
    return tokenizer


def _limit(texts: Iterable[str]) -> Iterator[str]:
    size = 0
    for text in texts:
        yield text
        if (size := size + len(text)) > _TOKENIZER_BYTES:
            return


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
    key = Hasher.hash((documents._fingerprint, tokenizer.backend_tokenizer.to_str(), eos))
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


def take_texts(documents: Documents, count: int) -> list[str]:
    """Return the first `count` texts."""
    return [row["text"] for row in islice(documents, count)]
