"""Tables of texts or of conversations: rows of files on this machine, or a dataset of the Hub."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, Json, Value, load_dataset
from datasets.exceptions import DatasetsError
from datasets.fingerprint import Hasher
from huggingface_hub.errors import HTTPError
from pyarrow import ArrowException
from transformers.utils import logging

from ..checkpoint.loading import unreachable
from ..errors import UserError, one_line, without_secrets
from .conversations import MESSAGES, Documents, are_conversations, get_text, read_conversations
from .reading import VERSION, hash_files, read_rows
from .sources import name_file

logger = logging.get_logger(__name__)

# A dataset that is a script raises RuntimeError, and one that needs another package ImportError.
_LIBRARY_ERRORS = (ArrowException, DatasetsError, HTTPError)
_TABLE_ERRORS = (*_LIBRARY_ERRORS, ImportError, RuntimeError, ValueError)


def read_tables(data: str, files: list[Path], *, text_column: str, streaming: bool) -> Documents:
    """Return the rows of files that have text, with `text` and, of conversations, `messages`.

    Raises:
        UserError: a file cannot be read, or a row has something else in that column. A stream
            raises it when the row is read.
    """
    columns = list(next(read_rows(files[0], name_file(data, files[0])), {}))
    if holds_conversations(columns, text_column):
        table = _read_column(data, files, MESSAGES, streaming)
        return _keep_conversations(table, [MESSAGES], data)
    return _read_column(data, files, text_column, streaming)


def load_table(
    data: str, name: str | None, *, text_column: str, split: str, streaming: bool
) -> Documents:
    """Return the same of a dataset of the Hub."""
    try:
        table = load_dataset(data, name, split=split, streaming=streaming)
        columns = table.column_names or list(next(iter(table), {}))
    except OSError as error:
        raise UserError(f"data={unreachable(data, 'file or folder', error)}") from error
    except _TABLE_ERRORS as error:
        why = one_line(error.__cause__ or error)  # `datasets` says only that something went wrong
        raise UserError(f"data={data} cannot be read as a table: {why}") from error
    if holds_conversations(columns, text_column):
        return _keep_conversations(table, columns, data)
    if text_column not in columns:
        raise UserError(_explain_missing_column(text_column, data, columns))
    table = table.select_columns(text_column)
    if text_column != "text":
        table = table.rename_column(text_column, "text")
    settings: Any = {"fn_kwargs": {"column": text_column, "name": data}}
    return table.filter(_has_checked_text, with_indices=True, **settings)


def holds_conversations(columns: list[str], text_column: str) -> bool:
    """Say whether a table with these columns is read as conversations."""
    asked = MESSAGES in columns and text_column == MESSAGES
    found = asked or (text_column == "text" and are_conversations(columns))
    if found and "tools" in columns:
        logger.warning(
            "The column tools is not read: the model learns the conversations without the "
            "descriptions of the tools."
        )
    return found


def _keep_conversations(table: Documents, columns: list[str], data: str) -> Documents:
    return read_conversations(table, columns, data=without_secrets(data)).filter(_has_text)


def _read_column(data: str, files: list[Path], column: str, streaming: bool) -> Documents:
    """Return the rows of files: as `text` those that have text, or all `messages` as they are."""
    is_chat = column == MESSAGES
    features = Features({MESSAGES: Json()} if is_chat else {"text": Value("large_string")})
    named = [(path, name_file(data, path)) for path in files]
    settings: Any = {"gen_kwargs": {"files": named, "column": column}, "features": features}
    if streaming:
        return IterableDataset.from_generator(_generate_rows, **settings)
    if next(_generate_rows(named, column), None) is None:  # from_generator cannot make an empty one
        return Dataset.from_dict({name: [] for name in features}, features=features)
    # Only what decides the rows: the same table is read once, wherever it lies.
    fingerprint = Hasher.hash(("rows", VERSION, hash_files(files), column))
    return Dataset.from_generator(_generate_rows, **settings, fingerprint=fingerprint)


def _generate_rows(files: list[tuple[Path, str]], column: str) -> Iterator[dict[str, Any]]:
    for path, name in files:
        found, columns = False, list[str]()
        for number, row in enumerate(read_rows(path, name, column), 1):
            found, columns = found or column in row, columns or list(row)
            value = row.get(column)
            if column == MESSAGES:
                written = json.dumps(value, ensure_ascii=False, default=str)
                _check_text(written, column, f"{name}: row {number}")
                yield {MESSAGES: value}
            elif column not in row and MESSAGES in row:
                raise UserError(
                    f"data={name}: row {number} has {MESSAGES}, but no {column} as those before: "
                    "put texts and conversations into files of their own."
                )
            elif _check_text(value, column, f"{name}: row {number}"):
                yield {"text": value}
        if not found:
            raise UserError(_explain_missing_column(column, name, columns))


def _explain_missing_column(column: str, name: str, columns: list[str]) -> str:
    known = ", ".join(columns)
    return f"text_column={column!r} is not in {name}; its columns are: {known or 'none'}."


def _check_text(value: Any, column: str, place: str) -> bool:
    """Say whether a value holds text; None and an empty text do not.

    Raises:
        UserError: it is something else, or no text that UTF-8 can hold.
    """
    if not isinstance(value, str | None):
        raise UserError(
            f"data={place} has {column}={value!r:.80}, which is not text: give a column of texts."
        )
    try:
        return bool(value and value.encode())
    except UnicodeEncodeError as error:
        what = f"{column}={value!a:.80}"
        raise UserError(f"data={place} has {what}, which is not valid Unicode.") from error


def _has_checked_text(row: dict, index: int, *, column: str, name: str) -> bool:
    return _check_text(row["text"], column, f"{name}: row {index + 1}")


def _has_text(row: dict) -> bool:
    return bool(get_text(row))
