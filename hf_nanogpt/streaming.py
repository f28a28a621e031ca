"""Tokens as `generate` makes them, and the text that they add."""

from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from typing import cast

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class TokenStreamer(BaseStreamer):
    """Yields the token ids that `generate` makes, without those of the prompt."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[int | None] = SimpleQueue()
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen:
            for token in value.flatten().tolist():
                self.queue.put(token)
        self.prompt_seen = True

    def end(self) -> None:
        self.queue.put(None)

    def __iter__(self) -> Iterator[int]:
        return iter(self.queue.get, None)


class TextDecoder:
    """Decodes tokens as they come; the pieces joined are what the tokens add to the context's text.

    No token has a text of its own: it may hold a part of a character, and SentencePiece drops the
    space of the first one. So each is decoded together with some that came before it. If the
    context ends within a character, the pieces begin with that character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self.ids = self._drop_whole_characters(list(context))
        # The tokens before `done` are decoded, those from `first` on were the last ones.
        self.first, self.done = 0, len(self.ids)

    def add(self, token: int) -> str:
        """Return the text that is now certain."""
        self.ids.append(token)
        text = self.finish()
        # Wait for the rest of a character, and keep what precedes a token without a text. The text
        # of LLaMA's bytes depends on those after them: one that is invalid spoils them all.
        if not text or self._is_byte(token) or text.endswith(_UNKNOWN):
            return ""
        self.first, self.done = self.done, len(self.ids)
        return text

    def finish(self) -> str:
        """Return the rest of the text, if no more tokens come."""
        before = self._decode(self.ids[self.first : self.done])
        text = self._decode(self.ids[self.first :])
        # What stood for a part of a character is replaced by the character.
        while not text.startswith(before):
            before = before[:-1]
        return text[len(before) :]

    def _drop_whole_characters(self, ids: list[int]) -> list[int]:
        """Return a context without LLaMA's bytes at its end, unless they end within a character.

        Their text is known, and a byte that comes after them must not spoil it.
        """
        rest = list(ids)
        while rest and self._is_byte(rest[-1]):
            rest.pop()
        if rest == ids or not self._decode(rest) or self._decode(ids).endswith(_UNKNOWN):
            return ids
        return rest

    def _is_byte(self, token: int) -> bool:
        return str(self.tokenizer.convert_ids_to_tokens(token)).startswith("<0x")

    def _decode(self, ids: list[int]) -> str:
        return cast(str, self.tokenizer.decode(ids, skip_special_tokens=True))  # a list for a batch
