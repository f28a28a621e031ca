"""From texts to token ids, as fast as the tokenizer allows; and how ids say what is not learnt."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..errors import UserError, explain_errors

_CODE_POINTS = 0x110000  # of Unicode
_MOST_BYTES = 4  # of one character in UTF-8

# A token that the model reads but does not learn to predict, such as those of a question, is stored
# as its complement `~id`, which is negative. An eos inside a document, as some chat templates write
# it after each answer, is stored with one more bit. Only these functions know that.
_INSIDE = 1 << 30


def encode_unlearnt(ids: np.ndarray) -> np.ndarray:
    """Mark token ids of a signed dtype as not to be learnt; marking them twice changes nothing."""
    return np.minimum(ids, ~ids)


def is_learnt(ids: np.ndarray) -> np.ndarray:
    """Return where the tokens are to be learnt."""
    return ids >= 0


def decode_ids(ids: np.ndarray) -> np.ndarray:
    """Return the plain token ids, as int64."""
    ids = ids.astype(np.int64)
    return np.maximum(ids, ~ids) & ~_INSIDE


def decode_labels(ids: np.ndarray) -> np.ndarray:
    """Return the labels as int64: the token ids, and -100 where nothing is to be learnt."""
    return np.where(is_learnt(ids), decode_ids(ids), -100)


def encode_inside(ids: np.ndarray, eos_token_id: int | None) -> np.ndarray:
    """Mark each eos in int32 ids, but not the first id, as one that separates no documents."""
    inside = is_start(ids, eos_token_id)
    inside[:1] = False
    return np.where(inside, ids ^ _INSIDE, ids)


def is_start(ids: np.ndarray, eos_token_id: int | None) -> np.ndarray:
    """Return where documents start: at each eos that is not inside of one."""
    return np.maximum(ids.astype(np.int64), ~ids.astype(np.int64)) == eos_token_id


class DocumentEncoder:
    """Turn a batch of texts into arrays of token ids, with eos first where a document starts.

    If every token is a character or a part of one (`tokenizer="char"` and `"byte"`), the ids come
    from a table, which gives the same ids a hundred times faster than the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.dtype = "uint16" if count_ids(tokenizer) <= 2**16 else "int32"
        self.by_character = _is_by_character(tokenizer)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[np.ndarray]]:
        texts, eos = batch["text"], self.tokenizer.eos_token_id
        starts = batch.get("starts") or [True] * len(texts)
        first = np.array([] if eos is None else [eos], dtype=np.int32)
        by_character = self.by_character
        encoded = self._look_up(texts) if by_character else self._encode_pieces(texts, starts)
        return {
            "input_ids": [
                np.concatenate((first[:new], ids), dtype=self.dtype, casting="unsafe")
                for new, ids in zip(starts, map(np.asarray, encoded), strict=True)
            ]
        }

    def _encode_pieces(self, texts: list[str], starts: list[bool]) -> Iterator[list[int]]:
        # Many tokenizers put a space where a text begins. A piece that continues a text gets its
        # own first letter in front, as if it were the end of the piece before, and loses it again.
        fronts = ["" if new else _find_front(text) for text, new in zip(texts, starts, strict=True)]
        tokens_of = dict(zip(used := sorted(set(fronts)), self._encode(used), strict=True))
        joined = [front + text for front, text in zip(fronts, texts, strict=True)]
        for front, text, ids in zip(fronts, texts, self._encode(joined), strict=True):
            known = tokens_of[front]
            # A tokenizer that joins what is in front to the piece must encode the piece alone.
            yield ids[len(known) :] if ids[: len(known)] == known else self._encode([text])[0]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        # "<|endoftext|>" inside a text is text, not the end of a document.
        settings = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        with encoding_errors(self.tokenizer, *texts):
            if not self.tokenizer.is_fast:
                return self.tokenizer(texts, **settings)["input_ids"]
            backend = self.tokenizer.backend_tokenizer  # every call of the tokenizer resets these
            backend.encode_special_tokens = True
            backend.no_truncation()
            backend.no_padding()
            return [x.ids for x in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _look_up(self, texts: list[str]) -> Iterator[np.ndarray]:
        table, seen = self._table
        for text in texts:
            if new := sorted(set(text) - seen):
                for character, ids in zip(new, self._encode(new), strict=True):
                    table[: len(ids), ord(character)] = ids
                seen.update(new)
            points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
            spelt = table[:1, points] if text.isascii() else table[:, points]
            yield spelt.T[spelt.T >= 0]

    @cached_property
    def _table(self) -> tuple[np.ndarray, set[str]]:
        """The ids of each character, (4, code points), -1 if it has fewer; and those filled in."""
        return np.full((_MOST_BYTES, _CODE_POINTS), -1, dtype=np.int32), set()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_table"}


@contextmanager
def encoding_errors(
    tokenizer: PreTrainedTokenizerBase, *texts: str, what: str = "text"
) -> Iterator[None]:
    """Raise what a tokenizer raises for texts as a `UserError`.

    If every token is a character, as in nanoGPT's `meta.pkl`, it names the first one that is not.
    """
    with explain_errors(f"The tokenizer cannot encode the {what}"):
        try:
            yield
        except Exception as error:  # tokenizers has no narrower type
            if unknown := _describe_unknown(tokenizer, texts):
                raise UserError(unknown) from error
            raise


def _describe_unknown(tokenizer: PreTrainedTokenizerBase, texts: tuple[str, ...]) -> str:
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    known = tokenizer.get_vocab().keys() - added
    if any(len(token) != 1 for token in known):
        return ""
    for text in texts:
        for place, character in enumerate(text):
            if "\ud800" <= character <= "\udfff":  # half a character: no tokenizer takes it
                return ""
            if character not in known:
                where = f"after {text[max(0, place - 20) : place]!r}" if place else "at the start"
                return f"it has no token for {character!r} (U+{ord(character):04X}) {where}"
    return ""


def count_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return one more than the largest id; a vocabulary with holes has fewer tokens than that."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def _find_front(text: str) -> str:
    """Return what may stand before a piece of a text; `reading.read_pieces` says where it is cut.

    >>> _find_front(" and so on")
    'a'
    """
    return text[1:2] if text.startswith(" ") else text[:1] + "\n"


def _is_by_character(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Say whether a tokenizer is a byte-level BPE in which no token spans two characters."""
    if not tokenizer.is_fast:
        return False
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    splitter, model = parts["pre_tokenizer"] or {}, parts["model"]
    if (parts["normalizer"], model["type"], splitter.get("type")) != (None, "BPE", "ByteLevel"):
        return False
    if splitter["add_prefix_space"] or model.get("ignore_merges") or model.get("dropout"):
        return False
    if not all(token["special"] for token in parts["added_tokens"]):  # others match in a text
        return False
    byte_of = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
    merged = ([byte_of.get(symbol, 0) for symbol in "".join(pair)] for pair in model["merges"])
    # In UTF-8 the first byte of a longer character is 0xC0 or more, all others are 0x80 to 0xBF.
    return all(
        first >= 0xC0 and all(0x80 <= byte < 0xC0 for byte in rest) for first, *rest in merged
    )
