"""OpenAI's API as JSON: what a request may ask, each field checked, and what an answer looks like.

Fields are allowed by name. A field that is not implemented is refused, unless its value is the one
that changes nothing.
"""

import json
import secrets
import time
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from ..generation import SETTINGS
from ..untrusted import parse_json

_ROLES = ("system", "developer", "user", "assistant")
_COMMON = {"model", "max_tokens", "temperature", "top_p", "seed", "stop", "stream"}
_COMMON |= {"stream_options", "generation_config", "user"}
_TEXT, _CHAT = _COMMON | {"prompt"}, _COMMON | {"messages", "max_completion_tokens"}
# Fields that are not implemented, and the values that change nothing, which clients may send.
_NEUTRAL: dict[str, list[Any]] = {
    "n": [1],
    "best_of": [1],
    "echo": [False],
    "suffix": [""],
    "logprobs": [False],
    "top_logprobs": [0],
    "presence_penalty": [0],
    "frequency_penalty": [0],
    "logit_bias": [{}],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
    "store": [False],
}
_MAX_STOPS, _MAX_STOP_LENGTH = 4, 1000


@dataclass(frozen=True)
class CompletionRequest:
    """A checked request. `settings` are those of `stream_text` that the request sets."""

    prompt: str | list[dict[str, str]]  # a text, or the messages of a chat
    settings: dict[str, Any]
    stops: list[str]
    stream: bool
    include_usage: bool


def parse_body(raw: bytes, *, where: str = "The request") -> dict[str, Any]:
    """Return the JSON object in the body of a request.

    Raises:
        UserError: it is something else, or holds what JSON does not allow, such as NaN.
    """
    try:
        body = parse_json(raw.decode(), where=where)
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except UserError:
        raise
    except ValueError as error:  # bytes that are not UTF-8, NaN, or half of a surrogate pair
        raise UserError(f"{where} holds what JSON does not allow: {error}.") from error
    return body


def check_request(body: dict[str, Any], *, chat: bool) -> CompletionRequest:
    """Check all fields of a request but `model`.

    Raises:
        UserError: a field is unknown, not implemented or invalid.
    """
    fields = _without_nulls(body)
    known = _CHAT if chat else _TEXT
    for name in fields.keys() - known:
        if not any(_same(fields[name], value) for value in _NEUTRAL.get(name, [])):
            raise UserError(
                f"{name}={_show(fields[name])} is not supported: this server does not implement "
                f"{name[:80]}. The fields it knows are {', '.join(sorted(known))}."
            )
    settings = _check_generation_config(fields.get("generation_config", "{}"))
    for name in ("temperature", "top_p", "seed", "max_tokens", "max_completion_tokens"):
        if name in fields:
            setting = "max_new_tokens" if name.startswith("max") else name
            settings[setting] = _check_number(name, fields[name], setting)
    options = _check_type("stream_options", fields.get("stream_options", {}), dict)
    _check_names("stream_options", options, {"include_usage"})
    prompt = fields.get("messages" if chat else "prompt")
    return CompletionRequest(
        prompt=_check_messages(prompt) if chat else _check_type("prompt", prompt, str),
        settings=settings,
        stops=_check_stops(fields.get("stop", [])),
        stream=_check_type("stream", fields.get("stream", False), bool),
        include_usage=_check_type("include_usage", options.get("include_usage") or False, bool),
    )


def _without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _same(value: Any, other: Any) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _show(value: Any) -> str:
    return f"{value!r:.80}"


def _invalid(name: str, value: Any, rule: str) -> UserError:
    return UserError(f"{name}={_show(value)} is invalid: it must be {rule}.")


def _check_type(name: str, value: Any, type_: type) -> Any:
    if not isinstance(value, type_):
        rules = {str: "a string", bool: "true or false", dict: "an object"}
        raise _invalid(name, value, rules[type_])
    return value


def _check_names(where: str, fields: dict[str, Any], known: set[str]) -> None:
    if unknown := fields.keys() - known:
        names = ", ".join(sorted(known))
        raise UserError(f"{where}.{min(unknown)[:80]} is not supported: this server knows {names}.")


def _check_number(name: str, value: Any, setting: str) -> int | float:
    type_, is_allowed, rule = SETTINGS[setting]
    is_number = isinstance(value, int | type_) and not isinstance(value, bool)
    if not is_number or not is_allowed(value):
        raise _invalid(name, value, rule)
    return type_(value)


def _check_stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    right_size = isinstance(stops, list) and len(stops) <= _MAX_STOPS
    if not right_size or not all(
        isinstance(stop, str) and 0 < len(stop) <= _MAX_STOP_LENGTH for stop in stops
    ):
        rule = f"a string or a list of at most {_MAX_STOPS} strings"
        raise _invalid("stop", value, f"{rule}, each of 1 to {_MAX_STOP_LENGTH} characters")
    return stops


def _check_generation_config(text: Any) -> dict[str, Any]:
    """Return the settings in a field that `transformers chat` sends: JSON in a string."""
    name = "generation_config"
    config = _without_nulls(parse_body(_check_type(name, text, str).encode(), where=name))
    config.pop("transformers_version", None)
    do_sample = _check_type(f"{name}.do_sample", config.pop("do_sample", True), bool)
    _check_names(name, config, {*SETTINGS, "do_sample"})
    settings = {key: _check_number(f"{name}.{key}", value, key) for key, value in config.items()}
    return settings if do_sample else settings | {"temperature": 0.0}


def _check_messages(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise _invalid("messages", messages, "a list of at least one message")
    return [_check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _check_message(message: Any, where: str) -> dict[str, str]:
    message = _without_nulls(_check_type(where, message, dict))
    _check_names(where, message, {"role", "content"})
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise _invalid(f"{where}.role", role, f"one of {', '.join(_ROLES)}")
    if isinstance(content, list):  # some clients send a text as a list of parts
        content = "".join(_check_part(part, f"{where}.content") for part in content)
    content = _check_type(f"{where}.content", content, str)
    return {"role": "system" if role == "developer" else role, "content": content}


def _check_part(part: Any, where: str) -> str:
    is_text = isinstance(part, dict) and part.keys() == {"type", "text"}
    if not is_text or part["type"] != "text" or not isinstance(part["text"], str):
        raise _invalid(where, part, 'a string or a list of {"type": "text", "text": "..."}')
    return part["text"]


# answers


class ResponseFormat:
    """One answer as the JSON of `/v1/completions`, or of `/v1/chat/completions`."""

    def __init__(self, model_name: str, *, chat: bool):
        self.chat = chat
        self.whole = "chat.completion" if chat else "text_completion"
        self.chunk = "chat.completion.chunk" if chat else "text_completion"
        prefix = "chatcmpl" if chat else "cmpl"
        self.common: dict[str, Any] = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "model": model_name,
            "created": int(time.time()),
        }

    def format_whole(self, text: str, reason: str, usage: dict[str, int]) -> dict[str, Any]:
        content = (
            {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        )
        return self._format(self.whole, content, reason) | {"usage": usage}

    def format_start(self) -> str:
        """Return the event before the text of a chat, which names the role; for a text, nothing."""
        role = {"delta": {"role": "assistant", "content": ""}}
        return self._format_chunk(role) if self.chat else ""

    def format_piece(self, text: str) -> str:
        return self._format_chunk({"delta": {"content": text}} if self.chat else {"text": text})

    def format_end(self, reason: str) -> str:
        return self._format_chunk({"delta": {}} if self.chat else {"text": ""}, reason)

    def format_usage(self, usage: dict[str, int]) -> str:
        return format_event(self.common | {"object": self.chunk, "choices": [], "usage": usage})

    def _format_chunk(self, content: dict[str, Any], reason: str | None = None) -> str:
        return format_event(self._format(self.chunk, content, reason))

    def _format(self, object_: str, content: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "logprobs": None, "finish_reason": reason} | content
        return self.common | {"object": object_, "choices": [choice]}


def format_event(content: dict[str, Any]) -> str:
    """Return one event of a stream of server-sent events."""
    return f"data: {json.dumps(content)}\n\n"
