"""What a request to the server may ask: an allow-list of fields of OpenAI's API, each checked.

A field that is not implemented is refused by its name, unless its value asks for nothing.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError
from ..generation import check_settings
from ..untrusted import parse_json

ROLES = ("system", "developer", "user", "assistant")
_COMMON = {"model", "max_tokens", "temperature", "top_p", "seed", "stop", "stream"}
_COMMON |= {"stream_options", "generation_config", "user"}
_TEXT, _CHAT = _COMMON | {"prompt"}, _COMMON | {"messages", "max_completion_tokens"}
# Fields that are not implemented, and the values by which clients leave them out.
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
# What `transformers chat` sends in `generation_config`, by the names of `generate()`.
_NUMBERS: dict[str, type] = {
    "max_new_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "seed": int,
}
_MOST_STOPS, _LONGEST_STOP = 4, 1000


@dataclass(frozen=True)
class Request:
    """A request that has been checked. `settings` are those of `stream_text` that it gives."""

    prompt: str | list[dict[str, str]]  # a text, or the messages of a chat
    settings: dict[str, Any] = field(default_factory=dict)
    stops: list[str] = field(default_factory=list)
    stream: bool = False
    include_usage: bool = False


def read_body(raw: bytes, *, where: str = "The request") -> dict[str, Any]:
    """Return the JSON object that a request brings.

    Raises:
        UserError: it is something else, or holds what JSON has not, such as NaN.
    """
    try:
        body = parse_json(raw.decode(), where=where)
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeError as error:  # also for half a character
        raise UserError(f"{where} holds text that is not Unicode: {error}.") from None
    return body


def read_request(body: dict[str, Any], *, chat: bool) -> Request:
    """Check the fields of a request, whose model has been checked already.

    Raises:
        UserError: a field is unknown, not implemented, or has a value that is not possible.
    """
    given = {name: value for name, value in body.items() if value is not None}
    known = _CHAT if chat else _TEXT
    for name in given.keys() - known:
        if not any(_is(given[name], value) for value in _NEUTRAL.get(name, [])):
            raise UserError(
                f"{name}={_show(given[name])} is not possible: this server does not implement "
                f"{name[:80]}. The fields that it knows are {', '.join(sorted(known))}."
            )
    settings = _read_generation_config(given.get("generation_config", "{}"))
    settings |= {
        name: _number(name, given[name]) for name in _NUMBERS.keys() & given.keys() & known
    }
    for name in ("max_tokens", "max_completion_tokens"):
        if name in given:
            settings["max_new_tokens"] = _length(name, given[name])
    options = _of_type("stream_options", given.get("stream_options", {}), dict)
    if unknown := options.keys() - {"include_usage"}:
        raise UserError(
            f"stream_options.{min(unknown)[:80]} is not a field that this server knows."
        )
    prompt = given.get("messages" if chat else "prompt")
    return Request(
        prompt=_read_messages(prompt) if chat else _of_type("prompt", prompt, str),
        settings=settings,
        stops=_read_stops(given.get("stop", [])),
        stream=_of_type("stream", given.get("stream", False), bool),
        include_usage=_of_type("include_usage", options.get("include_usage") or False, bool),
    )


def _is(value: Any, other: Any) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _show(value: Any) -> str:
    return f"{value!r:.80}"


def _of_type(name: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        words = {str: "a string", bool: "true or false", dict: "an object"}
        raise UserError(f"{name}={_show(value)} is not possible: it must be {words[kind]}.")
    return value


def _number(name: str, value: Any) -> int | float:
    """Return a number in the range that `check_settings` knows for its name."""
    kind = _NUMBERS[name]
    if isinstance(value, bool) or not isinstance(value, int | kind):
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"{name}={_show(value)} is not possible: it must be {what}.")
    check_settings(**{name: value})
    return kind(value)


def _length(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name}={_show(value)} is not possible: it must be a number from 1 on.")
    return value


def _read_stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    fine = isinstance(stops, list) and len(stops) <= _MOST_STOPS
    if not fine or not all(isinstance(s, str) and 0 < len(s) <= _LONGEST_STOP for s in stops):
        raise UserError(
            f"stop={_show(value)} is not possible: it must be a string or a list of at most "
            f"{_MOST_STOPS} strings, each of 1 to {_LONGEST_STOP} characters."
        )
    return stops


def _read_generation_config(value: Any) -> dict[str, Any]:
    name = "generation_config"
    config = read_body(_of_type(name, value, str).encode(), where=name)
    config = {name: value for name, value in config.items() if value is not None}
    config.pop("transformers_version", None)
    sampling = _of_type("generation_config.do_sample", config.pop("do_sample", True), bool)
    if unknown := config.keys() - _NUMBERS.keys():
        raise UserError(
            f"generation_config.{min(unknown)[:80]} is not possible: this server knows do_sample, "
            f"{', '.join(_NUMBERS)}."
        )
    settings = {name: _number(name, config[name]) for name in config}
    return settings if sampling else settings | {"temperature": 0.0}


def _read_messages(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f"messages={_show(messages)} is not possible: it must be a list of messages."
        )
    return [_read_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _read_message(message: Any, where: str) -> dict[str, str]:
    message = _of_type(where, message, dict)
    message = {name: value for name, value in message.items() if value is not None}
    if unknown := message.keys() - {"role", "content"}:
        raise UserError(f"{where}.{min(unknown)[:80]} is not a field that this server knows.")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise UserError(
            f"{where}.role={_show(role)} is not possible: it must be one of {', '.join(ROLES)}."
        )
    if isinstance(content, list):  # of parts, as some clients write a text
        content = "".join(
            _read_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)
        )
    content = _of_type(f"{where}.content", content, str)
    return {"role": "system" if role == "developer" else role, "content": content}


def _read_part(part: Any, where: str) -> str:
    part = _of_type(where, part, dict)
    if part.keys() != {"type", "text"} or part["type"] != "text":
        raise UserError(f'{where} is not possible: it must be {{"type": "text", "text": "..."}}.')
    return _of_type(f"{where}.text", part["text"], str)
