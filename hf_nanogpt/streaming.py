"""Tokens as `generate` makes them, and the text that they add."""

from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from typing import cast

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation import BaseStreamer


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
    space of the first one. So each is decoded together with some that came before it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self.ids = list(context)
        # The tokens before `done` are decoded, those from `first` on were the last ones.
        self.first, self.done = 0, len(self.ids)

    def add(self, token: int) -> str:
        """Return the text that is now certain."""
        self.ids.append(token)
        text = self.finish()
        # Wait for the rest of a character, and keep what precedes a token without a text. The text
        # of LLaMA's bytes depends on those after them: one that is invalid spoils them all.
        is_byte = str(self.tokenizer.convert_ids_to_tokens(token)).startswith("<0x")
        if not text or is_byte or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self.first, self.done = self.done, len(self.ids)
        return text

    def finish(self) -> str:
        """Return the rest of the text, if no more tokens come."""
        before = self._decode(self.ids[self.first : self.done])
        return self._decode(self.ids[self.first :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return cast(str, self.tokenizer.decode(ids, skip_special_tokens=True))  # a list for a batch
