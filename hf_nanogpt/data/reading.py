"""The files of a source: their formats, and how texts and rows are read from them.

Tables are read here and not by `datasets.load_dataset`, which guesses types from the first rows: a
number, a date or the word "NA" would not stay the text that was written.
"""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import pyarrow as pa
from datasets import config
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from pyarrow import parquet

from ..errors import UserError, one_line
from ..untrusted import load_json

# What the end of a name says, in any case: `rows.JSONL`, `rows.csv.gz`, `book.txt.zst`.
TABLES = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
_COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}

VERSION = 4  # of what is read from a file; a new number ignores what is in the cache

_AT_ONCE = 2**20  # bytes
_LONGEST_FIELD = 2**31 - 1  # of a CSV file; Python's own limit is 131,072
# Where a long text is cut: before the blank between two letters; or, if there is none in `_REACH`
# characters, between a line and a letter. Tokenizers cut a text there too, so that the ids of the
# pieces are those of the whole.
_REACH = 10_000
_BLANKS = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")
_LINES = re.compile(r"(?<=\S\n)(?=[^\W\d_])")


def find_format(path: Path) -> str | None:
    """Return `json`, `csv` or `parquet` by the end of a file's name, or None for a text.

    >>> find_format(Path("rows.JSONL.gz")), find_format(Path("notes.txt.gz"))
    ('json', None)
    """
    return TABLES.get(_ending(path))


def _ending(path: Path) -> str:
    """Return the last ending of a name in lower case, without that of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def open_bytes(path: Path) -> BinaryIO:
    """Open a file to read its bytes, which are decompressed if its name says so."""
    if codec := _COMPRESSED.get(path.suffix.lower()):
        return pa.input_stream(str(path), compression=codec)
    return path.open("rb")


def count_file_bytes(path: Path) -> int:
    """Return the size of a file, as it is when it is decompressed."""
    if path.suffix.lower() not in _COMPRESSED:
        return path.stat().st_size
    with explain_read_errors(path), open_bytes(path) as file:
        return sum(map(len, iter(lambda: file.read(_AT_ONCE), b"")))


def open_text(path: Path) -> TextIO:
    """Open a file of UTF-8 text; no character is changed, but a byte-order mark is dropped."""
    return io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="")


@contextmanager
def explain_read_errors(name: object) -> Iterator[None]:
    """Raise what goes wrong with a file as a `UserError` that calls it `name`."""
    try:
        yield
    except UnicodeDecodeError as error:
        # Not where: the error counts from the start of what was decoded last.
        bad = f"it has the byte 0x{error.object[error.start]:02x} ({error.reason})"
        raise UserError(f"data={name} is not UTF-8 text: {bad}.") from error
    except (OSError, EOFError, pa.ArrowException) as error:
        raise UserError(f"data={name} cannot be read: {one_line(error)}.") from error


@contextmanager
def explain_cache_errors() -> Iterator[None]:
    """Raise an `OSError` as a `UserError` about the cache; sources have errors of their own."""
    try:
        yield
    except (OSError, DatasetGenerationError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, UserError):
            raise cause from error
        if not isinstance(cause, OSError):
            raise
        raise UserError(
            f"The cache {config.HF_DATASETS_CACHE} cannot be used: {one_line(cause)}. Make room "
            "there, or set HF_HOME to a folder that you can write to."
        ) from error


def hash_files(paths: list[Path]) -> list[str]:
    """Return a checksum of the content and the format of each file.

    Sizes and times do not tell an edited file: both may be equal, and the old text would be used.
    """
    return [_hash_file(path) for path in paths]


def _hash_file(path: Path) -> str:
    with explain_read_errors(path), path.open("rb") as file:
        content = iter(lambda: file.read(_AT_ONCE), b"")
        format = "".join(map(str.lower, path.suffixes[-2:])).encode()
        return Hasher.hash_bytes(chain([format, b"\0"], content))  # type: ignore[arg-type]


def read_pieces(path: Path, name: object, size: int) -> Iterator[str]:
    """Yield a text in pieces of `size` characters or a few more, which joined are the text.

    A run that offers no place to cut stays whole.

    Raises:
        UserError: calls the file `name`; it cannot be read, or is not UTF-8 text.
    """
    with explain_read_errors(name), open_text(path) as file:
        text, searched, line = "", size, None
        while more := file.read(size):
            if "\0" in more:
                raise UserError(
                    f"data={name} has NUL bytes in it, which no text has: remove them, for example "
                    "by tr -d '\\000' < FILE > NEW_FILE."
                )
            text += more
            while True:
                blank = _BLANKS.search(text, searched)
                line = line or _LINES.search(text, searched)
                if not (found := blank or (line if len(text) > size + _REACH else None)):
                    break
                yield text[: found.start()]
                text, searched, line = text[found.start() :], size, None
            searched = max(size, len(text) - 2)  # what was searched is not searched again
        if text:
            yield text


def read_rows(path: Path, name: object, column: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table; values of CSV are text, and those of others have their own type.

    With a `column`, the other columns of a Parquet file are not read.

    Raises:
        UserError: calls the file `name`; it cannot be read, or is not of the format of its ending.
    """
    with explain_read_errors(name):
        if find_format(path) == "parquet":
            yield from _read_parquet(path, name, column)
            return
        with open_text(path) as file:
            if find_format(path) == "csv":
                yield from _read_csv(file, name, "\t" if _ending(path) == ".tsv" else ",")
            else:
                yield from _read_json(file, name)


def _check_columns(columns: Sequence[str], name: object) -> None:
    if twice := [column for column in columns if column and columns.count(column) > 1]:
        raise UserError(
            f"data={name} has several columns of the name {twice[0]!r}: rename all but one."
        )


def _read_parquet(path: Path, name: object, column: str | None) -> Iterator[dict[str, Any]]:
    with parquet.ParquetFile(path) as file:
        _check_columns(file.schema_arrow.names, name)
        columns = [column] if column in file.schema_arrow.names else None
        for batch in file.iter_batches(batch_size=1000, columns=columns):
            yield from batch.to_pylist()


def _read_csv(file: TextIO, name: object, delimiter: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(_LONGEST_FIELD)
    rows = csv.DictReader(file, delimiter=delimiter, strict=True)
    try:
        _check_columns(rows.fieldnames or [], name)
        for number, row in enumerate(rows, 1):
            if None in row or None in row.values():
                what = "more" if None in row else "fewer"
                raise UserError(
                    f"data={name}: row {number} has {what} fields than the header, "
                    f"{list(row.values())!r:.80}: put quotes around a text that holds the "
                    "separator or several lines."
                )
            yield row
    except csv.Error as error:
        raise UserError(f"data={name}: line {rows.line_num} is not CSV: {error}.") from error


def _read_json(file: TextIO, name: object) -> Iterator[dict[str, Any]]:
    """Yield the rows of JSON Lines, of one list of rows, or of one object of columns."""
    lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
    first = next(lines, (1, "[]"))
    rows: Iterable[tuple[int, Any]]
    try:
        parsed = json.loads(first[1])
    except (ValueError, RecursionError):
        parsed = None
    if isinstance(parsed, dict):
        rows = ((number, _parse(line, number, name)) for number, line in chain([first], lines))
    else:
        rows = enumerate(_read_document(first[1] + file.read(), name), 1)
    for number, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"data={name}: row {number} is {row!r:.80}, not an object of columns.")
        yield row


def _parse(text: str, line: int, name: object) -> Any:
    try:
        return load_json(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"data={name}: line {line} cannot be read as JSON: {one_line(error)}."
        ) from error


def _read_document(text: str, name: object) -> list[Any]:
    """Return the rows in a document over several lines; a text alone is a row with a `text`."""
    document = _parse(text, 1, name)
    if isinstance(document, dict) and all(isinstance(x, list) for x in document.values()):
        columns = zip(*document.values(), strict=True)
        document = [dict(zip(document, row, strict=True)) for row in columns]
    rows = document if isinstance(document, list) else [document]
    return [{"text": row} if isinstance(row, str) else row for row in rows]
