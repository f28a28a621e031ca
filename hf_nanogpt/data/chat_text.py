"""The text of a conversation as token ids, where only the chat template writes special tokens.

A person may write `<|im_end|>` too. That is text, and must not end a turn. So such words are hidden
before the template is applied, and the special tokens that are then found are the template's.
"""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from .encoding import encoding_errors

# The first character of a special token is moved to the last plane of Unicode, which is for private
# use, and back. So texts keep their length, and positions in them stay right. Other characters of
# that plane, such as Apple's symbols, stay what they are.
_HIDDEN = 0x100000


class ChatTextEncoder:
    """Encode the text that a chat template makes of messages, without the template's own code.

    Use it in three steps: `hide` the special tokens in messages, apply the template, `encode`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        special = {t.content: t for t in tokenizer.added_tokens_decoder.values() if t.special}
        longest_first = sorted(special.values(), key=lambda token: -len(token.content))
        words = [re.escape(token.content) for token in longest_first]
        self.special = self._words = re.compile("|".join(words) or "(?!)")
        hidden = [re.escape(self._words.sub(_hide_first, t.content)) for t in longest_first]
        self._hidden = re.compile("|".join(hidden) or "(?!)")
        # Some tokens include the blanks beside them.
        pairs = zip(longest_first, words, strict=True)
        spaced = (r"\s*" * t.lstrip + f"({word})" + r"\s*" * t.rstrip for t, word in pairs)
        self._tokens = re.compile("|".join(spaced) or "(?!)")
        self._backends = _copy_backends(tokenizer) if tokenizer.is_fast else None

    def hide(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return messages for the template: what looks like a special token is no longer one."""
        return [
            message | {"content": self._words.sub(_hide_first, content)}
            if isinstance(content := message.get("content"), str)
            else message
            for message in messages
        ]

    def encode(self, text: str) -> list[int]:
        """Return the token ids of the text that the template has made of hidden messages.

        Raises:
            UserError: the tokenizer cannot encode the text.
        """
        return [token for ids, _ in self._encode_parts(text) for token in ids]

    def encode_with_spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the token ids, (T,), and the first and last + 1 character of each, (T, 2)."""
        ids, spans = zip(*self._encode_parts(text), strict=True)
        return np.concatenate(ids), np.concatenate(spans)

    def _encode_parts(self, text: str) -> Iterator[tuple[Any, Any]]:
        """Yield the ids and spans of each special token, and of each text between them."""
        end = 0
        with encoding_errors(self.tokenizer, self._hidden.sub(_show_first, text)):
            for found in self._tokens.finditer(text):
                if found.start() > end:
                    yield self._encode_plain(text[end : found.start()], end)
                token, end = next(filter(None, found.groups())), found.end()
                yield [self.tokenizer.convert_tokens_to_ids(token)], [found.span()]
            if end < len(text):
                yield self._encode_plain(text[end:], end)

    def _encode_plain(self, text: str, start: int) -> tuple[list[int], np.ndarray]:
        text = self._hidden.sub(_show_first, text)
        if self._backends is None:  # a tokenizer in Python knows no positions
            settings = {"add_special_tokens": False, "split_special_tokens": True}
            ids = self.tokenizer(text, verbose=False, **settings)["input_ids"]
            return ids, np.full((len(ids), 2), start)
        encoded = self._backends[start > 0].encode(text, add_special_tokens=False)
        return encoded.ids, np.array(encoded.offsets, dtype=np.int64).reshape(-1, 2) + start


def _hide_first(found: re.Match[str]) -> str:
    code = ord(found[0][0])
    return chr(_HIDDEN + code) + found[0][1:] if code <= 0xFFFF else found[0]


def _show_first(found: re.Match[str]) -> str:
    code = ord(found[0][0])
    return chr(code - _HIDDEN) + found[0][1:] if code >= _HIDDEN else found[0]


def _copy_backends(tokenizer: Any) -> tuple[Tokenizer, Tokenizer]:
    """Return tokenizers for the first part of a text and for the others; in both, text is text."""
    # The spaces of a token belong to its span.
    first = tokenizer.backend_tokenizer.to_str().replace(
        '"trim_offsets":true', '"trim_offsets":false'
    )
    # Some tokenizers put a space before a text, but not after a special token.
    other = first.replace('"prepend_scheme":"first"', '"prepend_scheme":"never"')
    backends = [_load_plain(parts) for parts in dict.fromkeys((first, other))]
    return backends[0], backends[-1]


def _load_plain(parts: str) -> Tokenizer:
    backend = Tokenizer.from_str(parts)
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend
