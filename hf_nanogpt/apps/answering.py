"""The answer to one request: text from tokens, up to a stop text, in the form of OpenAI's API."""

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from json import dumps
from typing import Any

from transformers import PreTrainedTokenizerBase

from .api_requests import Request
from .batching import EndedError, Writer

FAILED = "The server ends, or has failed: ask again later."


def write_event(content: dict[str, Any]) -> str:
    """Return an event of a stream of server-sent events."""
    return f"data: {dumps(content)}\n\n"


class Answer:
    """The text of one answer as it is written, why it ended, and what it took."""

    def __init__(self, writer: Writer, asked: Request, prompt: list[int]):
        self.writer, self.asked, self.prompt = writer, asked, prompt
        self.count, self.reason = 0, "length"

    @property
    def usage(self) -> dict[str, int]:
        read, written = len(self.prompt), self.count
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
        }

    async def pieces(self) -> AsyncGenerator[str, None]:
        text = _Text(self.writer.tokenizer, self.asked.stops)
        async with aclosing(self.writer.write(self.prompt, self.asked.settings)) as tokens:
            async for token in tokens:
                self.count += 1
                if token in self.writer.ends:
                    self.reason = "stop"
                yield text.add(token)
                if text.stopped:
                    break
        yield text.finish()
        if text.stopped:
            self.reason = "stop"

    async def collect(self) -> str:
        return "".join([piece async for piece in self.pieces()])

    async def stream(self, form: "TextForm") -> AsyncGenerator[str, None]:
        try:
            if start := form.write_start():
                yield start
            async with aclosing(self.pieces()) as pieces:
                async for piece in pieces:
                    if piece:
                        yield form.write_piece(piece)
            yield form.write_end(self.reason)
            if self.asked.include_usage:
                yield form.write_usage(self.usage)
            yield "data: [DONE]\n\n"
        except (EndedError, ValueError) as error:
            message = FAILED if isinstance(error, EndedError) else str(error)
            yield write_event({"error": {"message": message, "type": "server_error"}})


class _Text:
    """Makes text of tokens, and ends it before the first stop text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: list[str]):
        self.tokenizer, self.stops, self.stopped = tokenizer, stops, False
        self.ids: list[int] = []
        self.first = self.done = 0  # the tokens from `first` to `done` have become text
        self.held = ""  # which may be the beginning of a stop text

    def add(self, token: int) -> str:
        """Return the text that is certain now."""
        self.ids.append(token)
        text = self._read()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character whose other bytes may come
            return ""
        self.first, self.done = self.done, len(self.ids)
        return self._release(text)

    def finish(self) -> str:
        """Return what is left when no further token comes."""
        rest = "" if self.stopped else self._release(self._read() if self._unread() else "")
        return rest + self.held

    def _unread(self) -> bool:
        return self.done < len(self.ids)

    def _read(self) -> str:
        """Return the text of the tokens after `done`, in the light of some before them."""
        before = self._decode(self.ids[self.first : self.done])
        return self._decode(self.ids[self.first :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _release(self, text: str) -> str:
        text, self.held = self.held + text, ""
        if places := [text.index(stop) for stop in self.stops if stop in text]:
            self.stopped = True
            return text[: min(places)]
        for start in range(max(0, len(text) - max(map(len, self.stops), default=0)), len(text)):
            if any(stop.startswith(text[start:]) for stop in self.stops):
                text, self.held = text[:start], text[start:]
                break
        return text


class TextForm:
    """The JSON of `/v1/completions`."""

    is_chat = False
    _prefix, _whole, _part = "cmpl", "text_completion", "text_completion"

    def __init__(self, name: str):
        self.common = {"id": f"{self._prefix}-{secrets.token_hex(12)}", "model": name}
        self.common["created"] = int(time.time())  # type: ignore[assignment]

    def write_whole(self, text: str, reason: str, usage: dict[str, int]) -> dict[str, Any]:
        choice = {"index": 0, "logprobs": None, "finish_reason": reason} | self._content(text)
        return self.common | {"object": self._whole, "choices": [choice], "usage": usage}

    def write_start(self) -> str:
        return ""

    def write_piece(self, text: str) -> str:
        return self._chunk(self._delta(text), None)

    def write_end(self, reason: str) -> str:
        return self._chunk(self._delta(None), reason)

    def write_usage(self, usage: dict[str, int]) -> str:
        return write_event(self.common | {"object": self._part, "choices": [], "usage": usage})

    def _chunk(self, content: dict[str, Any], reason: str | None) -> str:
        choice = {"index": 0, "logprobs": None, "finish_reason": reason} | content
        return write_event(self.common | {"object": self._part, "choices": [choice]})

    def _content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _delta(self, text: str | None) -> dict[str, Any]:
        return {"text": text or ""}


class ChatForm(TextForm):
    """The JSON of `/v1/chat/completions`."""

    is_chat = True
    _prefix, _whole, _part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def write_start(self) -> str:
        return self._chunk({"delta": {"role": "assistant", "content": ""}}, None)

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def _delta(self, text: str | None) -> dict[str, Any]:
        return {"delta": {} if text is None else {"content": text}}
