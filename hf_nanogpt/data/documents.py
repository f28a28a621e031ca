"""From sources to documents, rows with a `text` or `messages`; and which of them are held out."""

import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, NamedSplit, Value, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetsError
from datasets.fingerprint import Hasher
from huggingface_hub.errors import HTTPError
from pyarrow import ArrowException

from ..checkpoint.loading import unreachable
from ..errors import UserError, one_line, without_secrets
from .conversations import (
    MESSAGES,
    Documents,
    are_conversations,
    check_chat_template,
    get_text,
    read_conversations,
)
from .sources import STDLIB, TABLES, find_files

_PIECE = 100_000  # characters of a long text that are handled at a time
_FEW = 20  # with fewer texts than this, each gives its end to validation
# A dataset that is a script raises RuntimeError, and one that needs another package ImportError.
_LIBRARY_ERRORS = (ArrowException, DatasetsError, HTTPError)
_TABLE_ERRORS = (*_LIBRARY_ERRORS, ImportError, OSError, RuntimeError, ValueError)


def setting(default: Any, help: str) -> Any:
    """Return a dataclass field with a help text, which a type checker takes for its value."""
    return field(default=default, metadata={"help": help})


@dataclass
class DataArguments:
    """Where the text comes from and how it becomes tokens."""

    data: str = setting(
        default=STDLIB,
        help="Text to train on: a file, folder, glob or URL of UTF-8 text; .jsonl, .csv or "
        f".parquet tables (of texts, or of conversations in a column {MESSAGES}); a Hub dataset "
        f"id; {STDLIB} (the source code of Python's standard library); or tokens: a folder made by "
        "hf-nanogpt tokenize, or one with nanoGPT's train.bin and val.bin.",
    )
    validation_data: str | None = setting(
        default=None, help="Text to validate on; by default part of `data` is held out."
    )
    validation_fraction: float = setting(default=0.1, help="Fraction of `data` that is held out.")
    text_column: str = setting(default="text", help="Column of a table that holds the text.")
    dataset_config: str | None = setting(default=None, help="Configuration of a Hub dataset.")
    dataset_split: str = setting(default="train", help="Split of a Hub dataset.")
    streaming: bool = setting(default=False, help="Read a table or Hub dataset as a stream.")
    validation_documents: int = setting(default=200, help="Documents to hold out of a stream.")
    tokenizer: str = setting(
        default="bpe",
        help="bpe, char, byte, or the folder or Hub id of a tokenizer; tokens bring their own.",
    )
    vocab_size: int = setting(default=2048, help="Size of the vocabulary for tokenizer=bpe.")
    context_length: int | None = setting(
        default=None, help="Tokens in a block; by default the model's context."
    )
    chat_template: str | None = setting(
        default=None,
        help="chatml: add this template for conversations to a tokenizer that has no template.",
    )
    num_proc: int | None = setting(default=None, help="Number of processes that tokenise.")

    def __post_init__(self):
        check_chat_template(self.chat_template)
        check_fraction("validation_fraction", self.validation_fraction)
        if self.num_proc is not None and self.num_proc < 1:
            raise UserError(f"num_proc={self.num_proc} must be a whole number, at least 1.")


def check_fraction(name: str, fraction: float) -> None:
    """Raise a `UserError` unless the fraction, which is called `name`, is between 0 and 1."""
    if not 0 < fraction < 1:
        raise UserError(f"{name}={fraction} must be between 0 and 1, for example 0.1.")


def load_documents(args: DataArguments) -> tuple[Documents, Documents]:
    """Load `args.data` and return its training and validation documents.

    They are rows with a `text`; of conversations, with `messages`. A table with both columns is
    read as text, with a warning, unless `text_column="messages"`.

    Whether a document is held out depends only on a checksum of its text, not on the order. With
    fewer than 20 documents, the end is held out: the end of each text file, or the last rows of a
    table. Of a stream, only the first `validation_documents` of these are held out.

    Raises:
        UserError: the source is missing, empty, not text, or too small to hold anything out.
    """
    if args.validation_data:
        return _load_whole(args.data, args), _load_whole(args.validation_data, args)
    files, name = find_files(args.data), without_secrets(args.data)
    fraction = args.validation_fraction
    if _are_texts(files):
        train, validation = (_write_texts(name, files, fraction, side) for side in (False, True))
    else:
        train, validation = _split_table(_open_table(name, files, args), args)
    if any(next(iter(side), None) is None for side in (train, validation)):
        raise UserError(
            f"data={name} is too small to hold out validation_fraction={fraction}: give more text, "
            "another fraction, or validation_data."
        )
    return train, validation


def load_text(data: str, *, text_column: str = "text") -> Documents:
    """Return all documents of `data` (see `DataArguments`); none are held out."""
    return _load_whole(data, DataArguments(text_column=text_column))


def _load_whole(data: str, args: DataArguments) -> Documents:
    files, name = find_files(data), without_secrets(data)
    return _write_texts(name, files) if _are_texts(files) else _open_table(name, files, args)


def _are_texts(files: list[Path]) -> bool:
    return bool(files) and files[0].suffix not in TABLES


# Which documents are held out


def _checksum(text: str) -> int:
    return zlib.crc32(text.encode("utf-8", "replace"))


def _find_threshold(texts: Iterable[str], fraction: float) -> int:
    """Return the checksum below which texts are held out: about `fraction`, at least one."""
    threshold, lowest = int(fraction * 2**32), 2**32
    for text in texts:
        lowest = min(lowest, _checksum(text))
        if lowest < threshold:
            return threshold
    return lowest + 1


def _is_on_side(row: dict, threshold: int, held_out: bool) -> bool:
    return (_checksum(get_text(row)) < threshold) == held_out


def _is_not_among(row: dict, checksums: set[int]) -> bool:
    return _checksum(get_text(row)) not in checksums


# Text files


def _write_texts(
    data: str, files: list[Path], fraction: float = 0.0, held_out: bool = False
) -> Dataset:
    """Write one side of the split, by default all, to an Arrow file in the cache, and map it."""
    # Sizes and times are part of the fingerprint, so that a changed text is read again. (A tuple:
    # `from_generator` would pass a list to the generator one element at a time.)
    state = tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files)
    settings: dict[str, Any] = {"state": state, "held_out": held_out}
    features = Features({"text": Value("large_string"), "starts": Value("bool")})
    try:
        if len(files) < _FEW:
            generate: Any = _generate_tails
            settings["fraction"] = fraction
        else:
            generate = _generate_whole_texts
            firsts = (next(_read_pieces(name), "") for name, *_ in state)
            settings["threshold"] = _find_threshold(firsts, fraction) if fraction else 0
        if next(generate(**settings), None) is None:  # from_generator cannot make an empty dataset
            return Dataset.from_dict({"text": [], "starts": []}, features=features)
        return Dataset.from_generator(
            generate,
            gen_kwargs=settings,
            features=features,
            fingerprint=Hasher.hash(("texts", _PIECE, settings)),
            split=NamedSplit("validation" if held_out else "training"),
        )
    except (UnicodeDecodeError, DatasetGenerationError) as error:
        cause = error.__cause__ or error
        if not isinstance(cause, UnicodeDecodeError):
            raise
        raise UserError(f"data={data} is not UTF-8 text: {cause}.") from error


def _generate_whole_texts(state: tuple, threshold: int, held_out: bool) -> Iterator[dict]:
    """Yield the pieces of each text on one side of the split; `starts` marks the first of each."""
    for name, *_ in state:
        pieces = _read_pieces(name)
        first = {"text": next(pieces, ""), "starts": True}
        if _is_on_side(first, threshold, held_out):
            yield first
            yield from ({"text": piece, "starts": False} for piece in pieces)


def _generate_tails(state: tuple, fraction: float, held_out: bool) -> Iterator[dict]:
    """Yield either the last `fraction` of each text's characters, or what comes before it."""
    for name, *_ in state:
        cut = math.floor(sum(map(len, _read_pieces(name))) * (1 - fraction))
        position, starts = 0, True
        for piece in _read_pieces(name):
            split = max(0, min(cut - position, len(piece)))
            position += len(piece)
            if text := piece[split:] if held_out else piece[:split]:
                yield {"text": text, "starts": starts}
                starts = False


def _read_pieces(name: str) -> Iterator[str]:
    """Yield a text file in pieces that end at the end of a line, with no character changed."""
    with open(name, encoding="utf-8", newline="") as file:
        while piece := file.read(_PIECE):
            yield piece + file.readline()


# Tables and the Hub


def _open_table(data: str, files: list[Path], args: DataArguments) -> Documents:
    """Return the rows of a table that have text: `text`, or `messages` of conversations."""
    try:
        if files:
            paths = [str(p) for p in files]
            loader = TABLES[files[0].suffix]
            table = load_dataset(loader, data_files=paths, split="train", streaming=args.streaming)
        else:
            table = load_dataset(
                data, args.dataset_config, split=args.dataset_split, streaming=args.streaming
            )
        first: dict = next(iter(table), {})
    except _TABLE_ERRORS as error:
        if isinstance(error, OSError) and not files:
            raise UserError(f"data={unreachable(data, 'file or folder', error)}") from error
        why = one_line(error.__cause__ or error)  # `datasets` says only that something went wrong
        raise UserError(f"data={data} cannot be read as a table: {why}") from error
    columns = table.column_names or list(first)
    if isinstance(first.get(MESSAGES), list) and (
        args.text_column == MESSAGES or (args.text_column == "text" and are_conversations(columns))
    ):
        table = read_conversations(table, columns, data=data)
    else:
        _check_column(columns, first, args.text_column, data)
        table = table.select_columns(args.text_column)
        if args.text_column != "text":
            table = table.rename_column(args.text_column, "text")
    return table.filter(_has_text)


def _check_column(columns: list[str], first: dict, column: str, data: str) -> None:
    known = f"its columns are: {', '.join(columns)}."
    if column not in columns:
        raise UserError(f"text_column={column!r} is not in {data}; {known}")
    if not isinstance(first.get(column), str | None):
        raise UserError(
            f"text_column={column!r} of {data} does not hold text, but for example "
            f"{first[column]!r}; {known}"
        )


def _has_text(row: dict) -> bool:
    return bool(get_text(row))


def _split_table(table: Documents, args: DataArguments) -> tuple[Documents, Documents]:
    fraction = args.validation_fraction
    if isinstance(table, Dataset) and len(table) < _FEW:
        kept = len(table) - math.ceil(len(table) * fraction)
        return table.select(range(kept)), table.select(range(kept, len(table)))
    threshold = _find_threshold(map(get_text, table), fraction)
    train, validation = (
        table.filter(_is_on_side, fn_kwargs={"threshold": threshold, "held_out": held_out})
        for held_out in (False, True)
    )
    if isinstance(validation, IterableDataset):
        # The first few are enough to validate on; all others are trained on.
        validation = Dataset.from_list(list(validation.take(args.validation_documents)))
        known = {_checksum(text) for text in map(get_text, validation)}
        train = table.filter(_is_not_among, fn_kwargs={"checksums": known})
    return train, validation
