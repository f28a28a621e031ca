"""From sources to documents, rows with a `text` or `messages`; and which of them are held out."""

import math
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, NamedSplit, Value
from datasets.fingerprint import Hasher

from ..errors import UserError, without_secrets
from .conversations import MESSAGES, Documents, check_chat_template, get_text
from .reading import VERSION, explain_cache_errors, find_format, hash_files, read_pieces
from .sources import STDLIB, find_files, name_file
from .tables import load_table, read_tables

_PIECE = 100_000  # characters of a long text that are handled at a time
_FEW = 20  # with fewer texts than this, each gives its end to validation


def setting(default: Any, help: str) -> Any:
    """Return a dataclass field with a help text, which a type checker takes for its value."""
    return field(default=default, metadata={"help": help})


@dataclass
class DataArguments:
    """Where the text comes from and how it becomes tokens."""

    data: str = setting(
        default=STDLIB,
        help="Text to train on: a file, folder, glob or URL of UTF-8 text; .jsonl, .csv, .tsv or "
        f".parquet tables (of texts, or of conversations in a column {MESSAGES}); the same as .gz, "
        f".bz2 or .zst; a Hub dataset id; {STDLIB} (the source code of Python's standard library); "
        "or tokens: a folder made by hf-nanogpt tokenize, or one with nanoGPT's train.bin and "
        "val.bin, or with datatrove's .ds files.",
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

    exact_vocab_size = True  # not where it was chosen: a text may give a BPE fewer tokens

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
        UserError: the source is missing, empty, not text, or too small to hold anything out; or
            the cache cannot be written.
    """
    if args.validation_data:
        train = _load_whole(args.data, args)
        with _named("validation_data"):
            # Never a stream: each evaluation reads all of it, and processes can share it evenly.
            return train, _load_whole(args.validation_data, replace(args, streaming=False))
    files, name = find_files(args.data), without_secrets(args.data)
    with explain_cache_errors():
        if _are_texts(files):
            train, validation = _split_texts(args.data, files, args.validation_fraction)
        else:
            train, validation = _split_table(open_table(args.data, files, args), args)
        if any(next(iter(side), None) is None for side in (train, validation)):
            raise UserError(f"data={name} {_explain_empty_side(train, validation, args)}")
    return train, validation


def load_text(data: str, *, text_column: str = "text") -> Documents:
    """Return all documents of `data` (see `DataArguments`); none are held out."""
    return _load_whole(data, DataArguments(text_column=text_column))


def _load_whole(data: str, args: DataArguments) -> Documents:
    files = find_files(data)
    with explain_cache_errors():
        if _are_texts(files):
            return _write_texts(data, files, hash_files(files))
        return open_table(data, files, args)


def _are_texts(files: list[Path]) -> bool:
    return bool(files) and not find_format(files[0])


def _explain_empty_side(train: Documents, validation: Documents, args: DataArguments) -> str:
    """Say why one of the sides is empty, and what to do."""
    texts = (get_text(row) for side in (train, validation) for row in side)
    if (first := next(texts, None)) is None:
        return f"holds no text in its column {args.text_column}."
    is_table, others = train.features and "starts" not in train.features, list(islice(texts, 1))
    if (is_table or others) and all(text == first for text in chain(others, texts)):
        return (
            f"has one {'row' if is_table else 'text'}, or one that is repeated, so nothing else "
            "can be held out: give more text, or validation_data."
        )
    return (
        f"is too small to hold out validation_fraction={args.validation_fraction}: give more text, "
        "another fraction, or validation_data."
    )


@contextmanager
def _named(setting: str) -> Iterator[None]:
    """Let errors about `data` name another setting, which was given the source in question."""
    try:
        yield
    except UserError as error:
        raise UserError(re.sub("^data=", f"{setting}=", str(error))) from error


def count_bytes(documents: Documents) -> int | None:
    """Return the bytes of all texts in UTF-8; None for conversations, where not all is learnt.

    Tokens do not tell them: a tokenizer may normalise a text, or put a space in front of it.
    """
    if "text" not in (documents.column_names or next(iter(documents), {"text": ""})):
        return None
    batches = documents.iter(batch_size=64)
    return sum(len(text.encode()) for batch in batches for text in batch["text"])


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


def _split_texts(data: str, files: list[Path], fraction: float) -> tuple[Dataset, Dataset]:
    contents = hash_files(files)
    train, validation = (
        _write_texts(data, files, contents, fraction, side) for side in (False, True)
    )
    return train, validation


def _write_texts(
    data: str,
    files: list[Path],
    contents: list[str],
    fraction: float = 0.0,
    held_out: bool = False,
) -> Dataset:
    """Write one side of the split, by default all, to an Arrow file in the cache, and map it."""
    # (A tuple: `from_generator` would pass a list to the generator one element at a time.)
    texts = tuple((path, name_file(data, path)) for path in files)
    settings: dict[str, Any] = {"held_out": held_out, "size": _PIECE}
    features = Features({"text": Value("large_string"), "starts": Value("bool")})
    if len(files) < _FEW:
        generate: Any = _generate_tails
        settings["fraction"] = fraction
    else:
        generate = _generate_whole_texts
        firsts = (next(read_pieces(*text, _PIECE), "") for text in texts)
        settings["threshold"] = _find_threshold(firsts, fraction) if fraction else 0
    if next(generate(texts, **settings), None) is None:  # from_generator cannot make an empty one
        return Dataset.from_dict({"text": [], "starts": []}, features=features)
    return Dataset.from_generator(
        generate,
        gen_kwargs={"texts": texts} | settings,
        features=features,
        # Only what decides the rows: the same text is read once, wherever it lies.
        fingerprint=Hasher.hash(("texts", VERSION, generate.__name__, contents, settings)),
        split=NamedSplit("validation" if held_out else "training"),
    )


def _generate_whole_texts(
    texts: tuple, size: int, threshold: int, held_out: bool
) -> Iterator[dict]:
    """Yield the pieces of each text on one side of the split; `starts` marks the first of each."""
    for path, name in texts:
        pieces = read_pieces(path, name, size)
        first = {"text": next(pieces, ""), "starts": True}
        if _is_on_side(first, threshold, held_out):
            yield first
            yield from ({"text": piece, "starts": False} for piece in pieces)


def _generate_tails(texts: tuple, size: int, fraction: float, held_out: bool) -> Iterator[dict]:
    """Yield either the last `fraction` of each text's characters, or what comes before it."""
    for path, name in texts:
        cut = math.floor(sum(map(len, read_pieces(path, name, size))) * (1 - fraction))
        position, starts = 0, True
        for piece in read_pieces(path, name, size):
            split = max(0, min(cut - position, len(piece)))
            position += len(piece)
            if text := piece[split:] if held_out else piece[:split]:
                yield {"text": text, "starts": starts}
                starts = False


# Tables


def take_characters(documents: Documents, most: int) -> Iterator[dict]:
    """Yield the first documents, which together have at most so many characters."""
    for row in documents:
        row = {**row, "text": row["text"][:most]}
        most -= len(row["text"])
        yield row
        if not most:
            break


def open_table(data: str, files: list[Path], args: DataArguments) -> Documents:
    """Return the rows of files, or of a dataset of the Hub, with `text` or `messages`."""
    column, streaming = args.text_column, args.streaming
    with explain_cache_errors():
        if files:
            return read_tables(data, files, text_column=column, streaming=streaming)
        place: dict[str, Any] = {"split": args.dataset_split, "streaming": streaming}
        return load_table(data, args.dataset_config, text_column=column, **place)


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
