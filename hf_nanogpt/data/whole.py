"""Blocks in which conversations stay whole: an answer is learnt together with what it answers.

Conversations are put into rows of `context_length - 1` tokens, the rest of which is padding. Cut
into blocks, such rows give one row a block: a block also holds the first token of the next one.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from datasets import Features, IterableDataset, List, Value
from datasets.fingerprint import Hasher

from .conversations import Documents
from .encoding import encode_unlearnt

_VERSION = 1  # of the rows; a new number makes `datasets` ignore those in its cache
_GROUP = 1000  # conversations that are put into rows together, a stream reads so many at a time


@dataclass(frozen=True)
class Conversations:
    """The tokens of conversations: rows with `input_ids`, eos first; only answers are learnt."""

    rows: Documents
    eos_token_id: int | None

    def fill_rows(self, context_length: int) -> Documents:
        """Return rows of whole blocks, of `context_length - 1` tokens or a multiple of that.

        No conversation begins in one block and ends in another unless it is longer than one. The
        padding is eos, not to be learnt.
        """
        fill = partial(_fill_rows, size=context_length - 1, eos=self.eos_token_id)
        settings: dict[str, Any] = {"batched": True, "batch_size": _GROUP}
        if isinstance(self.rows, IterableDataset):
            return self.rows.map(fill, **settings)
        key = (_VERSION, _GROUP, self.rows._fingerprint, context_length, self.eos_token_id)
        return self.rows.map(
            fill,
            **settings,
            features=Features({"input_ids": List(Value("int32"))}),
            new_fingerprint=Hasher.hash(key),
            desc="Filling blocks",
        )


def _fill_rows(batch: dict[str, Any], *, size: int, eos: int | None) -> dict[str, list[np.ndarray]]:
    conversations = [np.asarray(ids, dtype=np.int32) for ids in batch["input_ids"]]
    rows = []
    for chosen in fit_rows([len(ids) for ids in conversations], size):
        ids = np.concatenate([conversations[i] for i in chosen])
        padding = encode_unlearnt(np.full(-len(ids) % size, eos or 0, dtype=np.int32))
        rows.append(np.concatenate((ids, padding)))
    return {"input_ids": rows}


def fit_rows(lengths: list[int], size: int) -> list[list[int]]:
    """Return the indices of the conversations that each row holds.

    The longest come first, and each goes into the fullest row that has room ("best fit
    decreasing", Johnson et al., doi:10.1137/0203025). One that is longer than `size` gets as many
    times `size` as it needs.

    >>> fit_rows([3, 7, 5, 12], size=10)
    [[0, 2], [1, 3]]
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # in order: the room that is left in a row, and the row
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(rooms, (lengths[i], 0))
        if place < len(rooms):
            room, row = rooms.pop(place)
        else:
            room, row = -(-lengths[i] // size) * size, len(rows)
            rows.append([])
        rows[row].append(i)
        insort(rooms, (room - lengths[i], row))
    return sorted(map(sorted, rows))
