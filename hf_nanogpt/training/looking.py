"""What a text is like, by its beginning: its size, its characters, the length of conversations."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ..data.conversations import MESSAGES
from ..data.documents import DataArguments, open_table
from ..data.reading import count_file_bytes, find_format, read_pieces
from ..data.sources import find_files, name_file
from ..data.stored import holds_tokens

_LOOK = 4_000_000  # characters that are read


@dataclass(frozen=True)
class Text:
    """The size of a text, which is a guess if it is long, and how many units it is made of."""

    num_bytes: int
    bytes_per_character: float
    num_characters: int  # different ones
    num_words: int  # different ones, between blanks
    conversation: int = 0  # characters that nine of ten conversations have at most; 0 of other text
    num_common: int = 0  # different characters that make up 99 % of the text


def look_at(data: DataArguments) -> Text | None:
    """Return what the text of `data` is like, by its beginning; None if there is none to look at.

    Raises:
        UserError: the source cannot be read.
    """
    if data.streaming or holds_tokens(Path(data.data)):
        return None
    files = find_files(data.data)
    texts: Iterable[str]
    are_chats = False
    if files and not find_format(files[0]):
        size = sum(map(count_file_bytes, files))
        named = ((file, name_file(data.data, file)) for file in files)
        texts = (piece for file, name in named for piece in read_pieces(file, name, 100_000))
    else:
        table = open_table(data.data, files, data)
        size = table.data.nbytes if isinstance(table, Dataset) else 0
        are_chats = "text" not in (table.column_names or [])
        texts = (_spell(row[MESSAGES]) if are_chats else row["text"] for row in table)
    return _measure(texts, size, are_chats)


def _spell(messages: list[dict[str, Any]]) -> str:
    """Return a conversation as chatml writes it, with a blank for each of its two tokens."""
    return "".join(f" {m['role']}\n{m['content']} \n" for m in messages)


def _measure(texts: Iterable[str], size: int, are_chats: bool) -> Text | None:
    """Count what texts are made of. If they are long, take `size` for their bytes."""
    characters, words, lengths = Counter[str](), set[str](), list[int]()
    bytes_read = length = 0  # bytes and characters of what is read
    for text in texts:
        characters.update(text)
        words.update(text.split())
        lengths.append(len(text))
        bytes_read, length = bytes_read + len(text.encode()), length + len(text)
        if length > _LOOK:
            break
    if not length:
        return None
    num_bytes = max(bytes_read, size) if length > _LOOK else bytes_read
    longest = int(np.quantile(lengths, 0.9)) if are_chats else 0
    counts = np.sort(list(characters.values()))[::-1]
    num_common = 1 + int(np.searchsorted(np.cumsum(counts), 0.99 * length))
    per_character = bytes_read / length
    return Text(num_bytes, per_character, len(characters), len(words), longest, num_common)
