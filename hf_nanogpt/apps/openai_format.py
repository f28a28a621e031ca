"""The answers of OpenAI's API as JSON, whole or as the events of a stream."""

import json
import secrets
import time
from typing import Any

from .scoring import Score


class ResponseFormat:
    """One answer as the JSON of `/v1/completions`, or of `/v1/chat/completions`."""

    def __init__(self, model_name: str, *, chat: bool, include_usage: bool):
        self.chat = chat
        self.whole = "chat.completion" if chat else "text_completion"
        self.chunk = "chat.completion.chunk" if chat else "text_completion"
        prefix = "chatcmpl" if chat else "cmpl"
        self.common: dict[str, Any] = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "model": model_name,
            "created": int(time.time()),
        }
        # In a stream with a chunk of the usage, the others say that they have none.
        self.no_usage = {"usage": None} if include_usage else {}

    def format_choice(
        self, index: int, text: str, logprobs: dict[str, Any] | None, reason: str
    ) -> dict[str, Any]:
        """Return one choice of a whole answer."""
        message = {"role": "assistant", "content": text, "refusal": None}
        content = {"message": message} if self.chat else {"text": text}
        return {"index": index, "logprobs": logprobs, "finish_reason": reason} | content

    def format_whole(self, choices: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        return self.common | {"object": self.whole, "choices": choices, "usage": usage}

    def format_start(self, index: int) -> str:
        """Return the event before the text of a chat, which names the role; for a text, nothing."""
        return self._format_chunk(index, {"role": "assistant", "content": ""}) if self.chat else ""

    def format_piece(self, index: int, text: str, logprobs: dict[str, Any] | None) -> str:
        return self._format_chunk(index, {"content": text}, text, logprobs)

    def format_end(self, index: int, reason: str) -> str:
        return self._format_chunk(index, {}, reason=reason)

    def format_usage(self, usage: dict[str, int]) -> str:
        return format_event(self.common | {"object": self.chunk, "choices": [], "usage": usage})

    def _format_chunk(
        self,
        index: int,
        delta: dict[str, Any],
        text: str = "",
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
    ) -> str:
        choice = {"index": index, "logprobs": logprobs, "finish_reason": reason}
        choice |= {"delta": delta} if self.chat else {"text": text}
        return format_event(
            self.common | {"object": self.chunk, "choices": [choice]} | self.no_usage
        )

    def format_logprobs(self, scores: list[Score], offsets: list[int]) -> dict[str, Any]:
        """Return the probabilities of tokens; `offsets` says where each begins in the text."""
        if self.chat:
            content = [
                _format_token(score.spelt, score.logprob)
                | {"top_logprobs": [_format_token(*token) for token in score.top]}
                for score in scores
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [_spell(score.spelt) for score in scores],
            "token_logprobs": [score.logprob for score in scores],
            # The token itself is always there, likely or not.
            "top_logprobs": [
                None
                if score.logprob is None
                else _format_top([*score.top, (score.spelt, score.logprob)])
                for score in scores
            ],
            "text_offset": offsets,
        }


def _format_token(spelt: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": _spell(spelt), "logprob": logprob, "bytes": list(spelt)}


def _format_top(tokens: list[tuple[bytes, float]]) -> dict[str, float]:
    """Return the probabilities by text; of tokens with the same text, the likeliest counts."""
    top: dict[str, float] = {}
    for spelt, logprob in tokens:
        text = _spell(spelt)
        top[text] = max(logprob, top.get(text, logprob))
    return top


def _spell(spelt: bytes) -> str:
    r"""Return the text of a token; bytes that are a part of a character are written as `\xe2`."""
    return spelt.decode(errors="backslashreplace")


def format_event(content: dict[str, Any]) -> str:
    """Return one event of a stream of server-sent events."""
    return f"data: {json.dumps(content)}\n\n"


def format_error(
    message: str, *, by_client: bool, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return an error; `param` is the field of the request that caused it."""
    error_type = "invalid_request_error" if by_client else "server_error"
    return {"error": {"message": message, "type": error_type, "param": param, "code": code}}
