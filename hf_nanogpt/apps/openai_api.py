"""The requests of OpenAI's API: each field is implemented, or refused by its name.

A field that is not implemented is accepted with the value that changes nothing, as clients may send
it. The fields are those of OpenAI's reference for `/v1/completions` and `/v1/chat/completions`;
`generation_config` is that of `transformers chat`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..errors import UserError
from ..generation import SETTINGS
from ..untrusted import parse_json

Rule: TypeAlias = tuple[type, Callable[[Any], bool], str]  # as in `SETTINGS`

_MAX_CHOICES = 128  # in the answer to one request
_MAX_STOPS, _MAX_STOP_LENGTH = 4, 1000
_DEFAULT_LENGTH = 16  # of a completion, in tokens; an answer of a chat is as long as fits
_ROLES = ("system", "developer", "user", "assistant")
_PENALTY: Rule = (float, lambda p: -2 <= p <= 2, "a number from -2 to 2")
_COUNT: Rule = (
    int,
    lambda n: 1 <= n <= _MAX_CHOICES,
    f"a whole number from 1 to {_MAX_CHOICES}",
)
# Fields that set a number of `Writer`: the name there, and what is allowed.
_SETTINGS: dict[str, tuple[str, Rule]] = {
    "temperature": ("temperature", SETTINGS["temperature"]),
    "top_p": ("top_p", (float, lambda p: 0 <= p <= 1, "a number from 0 to 1")),
    "seed": ("seed", (int, lambda s: -(2**63) <= s < 2**63, "a whole number of at most 64 bits")),
    "max_tokens": ("max_new_tokens", SETTINGS["max_new_tokens"]),
    "max_completion_tokens": ("max_new_tokens", SETTINGS["max_new_tokens"]),
    "presence_penalty": ("presence_penalty", _PENALTY),
    "frequency_penalty": ("frequency_penalty", _PENALTY),
}
# Labels for the owner of a server, which change no answer.
_LABELS = {"user": str, "safety_identifier": str, "prompt_cache_key": str, "metadata": dict}
_COMMON = {"model", "stop", "stream", "stream_options", "n", "logprobs", "logit_bias"}
_COMMON |= {"generation_config", "user"} | _SETTINGS.keys()
_TEXT = (_COMMON - {"max_completion_tokens"}) | {"prompt", "echo", "best_of"}
_CHAT = _COMMON | {"messages", "top_logprobs"} | _LABELS.keys()
# Fields that are not implemented, and the values that change nothing.
_NEUTRAL: dict[str, list[Any]] = {
    "best_of": [1],
    "echo": [False],
    "suffix": [""],
    "top_logprobs": [0],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "parallel_tool_calls": [False, True],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
    "service_tier": ["auto", "default"],
    "reasoning_effort": ["none"],
    "verbosity": ["medium"],
    "store": [False],
}
# Clients send these in the answers that they repeat.
_EMPTY: list[tuple[str, Any]] = [("tool_calls", []), ("annotations", [])]


class RequestError(UserError):
    """A mistake in a request: `param` is the field, `code` OpenAI's name of the error, if any."""

    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, status: int = 400
    ):
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


@dataclass(frozen=True)
class CompletionRequest:
    """A checked request. `settings` are those of `Writer` that the request sets."""

    prompts: list[Any]  # each a text, a list of token ids, or the messages of a chat
    settings: dict[str, Any]
    stops: list[str]
    stream: bool
    include_usage: bool
    n: int  # answers to each prompt
    echo: bool
    top_logprobs: int | None  # how many alternatives to each token; None: no probabilities


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


def check_request(body: dict[str, Any], *, chat: bool, vocab_size: int) -> CompletionRequest:
    """Check all fields of a request but `model`.

    Raises:
        RequestError: a field is unknown, not implemented or invalid.
    """
    fields = _without_nulls(body)
    _check_known(fields, _CHAT if chat else _TEXT)
    for name in _LABELS.keys() & fields.keys():
        _check_type(name, fields[name], _LABELS[name])
    echo = _check_type("echo", fields.get("echo", False), bool)
    stream = _check_type("stream", fields.get("stream", False), bool)
    n = int(_check_number("n", fields.get("n", 1), _COUNT))
    if _check_number("best_of", fields.get("best_of", n), _COUNT) != n:
        raise _invalid("best_of", fields["best_of"], f"equal to n, which is {n}; leave it out")
    prompts: list[Any] = (
        [_check_messages(fields.get("messages"))]
        if chat
        else _check_prompts(fields.get("prompt", ""), vocab_size)  # none begins a document
    )
    if n * len(prompts) > _MAX_CHOICES:
        raise _invalid("n", n, f"at most {_MAX_CHOICES // len(prompts)} for {len(prompts)} prompts")
    return CompletionRequest(
        prompts=prompts,
        settings=_check_settings(fields, chat, vocab_size, may_be_empty=echo),
        stops=_check_stops(fields.get("stop", [])),
        stream=stream,
        include_usage=_check_stream_options(fields, stream),
        n=n,
        echo=echo,
        top_logprobs=_check_logprobs(fields, chat),
    )


def _check_known(fields: dict[str, Any], known: set[str]) -> None:
    for name in sorted(fields.keys() - known):
        neutral = _NEUTRAL.get(name, [])
        if not any(_same(fields[name], value) for value in neutral):
            others = "".join(f", or send {json.dumps(value)}" for value in neutral)
            raise RequestError(
                f"{name[:80]}={_show(fields[name])} is not supported: this server does not "
                f"implement {name[:80]}. Leave it out{others}. The fields it knows are "
                f"{', '.join(sorted(known))}.",
                name[:80],
                "unsupported_parameter",
            )


def _check_settings(
    fields: dict[str, Any], chat: bool, vocab_size: int, *, may_be_empty: bool
) -> dict[str, Any]:
    if {"max_tokens", "max_completion_tokens"} <= fields.keys():
        raise RequestError(
            "max_tokens and max_completion_tokens are the same setting: send only one of them.",
            "max_tokens",
        )
    settings: dict[str, Any] = {} if chat else {"max_new_tokens": _DEFAULT_LENGTH}
    settings |= _check_generation_config(fields.get("generation_config", "{}"))
    for name, (setting, rule) in _SETTINGS.items():
        if name == "max_tokens" and may_be_empty:  # for the probabilities of the prompt alone
            rule = (int, lambda n: n >= 0, "a whole number, at least 0")
        if name in fields:
            settings[setting] = _check_number(name, fields[name], rule)
    if "seed" in settings:
        settings["seed"] %= 2**32
    if settings.get("top_p") == 0:  # leaves one token, as greedy search does
        settings |= {"temperature": 0.0, "top_p": 1.0}
    if bias := _check_logit_bias(fields.get("logit_bias", {}), vocab_size):
        settings["logit_bias"] = bias
    neutral = {"presence_penalty": 0, "frequency_penalty": 0}
    return {name: value for name, value in settings.items() if neutral.get(name) != value}


def _check_logit_bias(value: Any, vocab_size: int) -> dict[int, float]:
    rule: Rule = (float, lambda bias: -100 <= bias <= 100, "a number from -100 to 100")
    biases = {}
    for token, bias in _check_type("logit_bias", value, dict).items():
        is_token = token.isascii() and token.isdigit() and len(token) <= len(str(vocab_size))
        if not is_token or int(token) >= vocab_size:
            known = f"token ids from 0 to {vocab_size - 1}"
            raise _invalid("logit_bias", value, f"an object from {known} to numbers")
        biases[int(token)] = float(_check_number(f"logit_bias.{token}", bias, rule))
    return biases


def _check_logprobs(fields: dict[str, Any], chat: bool) -> int | None:
    """Return how many alternatives to each token are wanted, or None."""
    if not chat:
        value = fields.get("logprobs", False)  # False, as chats have it, is what some clients send
        rule: Rule = (int, lambda k: 0 <= k <= 5, "a whole number from 0 to 5")
        return None if value is False else int(_check_number("logprobs", value, rule))
    wanted = _check_type("logprobs", fields.get("logprobs", False), bool)
    rule = (int, lambda k: 0 <= k <= 20, "a whole number from 0 to 20")
    top = int(_check_number("top_logprobs", fields.get("top_logprobs", 0), rule))
    if top and not wanted:
        raise _invalid("top_logprobs", top, "0 or absent unless logprobs is true")
    return top if wanted else None


def _check_stream_options(fields: dict[str, Any], stream: bool) -> bool:
    """Say whether the usage is wanted at the end of a stream."""
    name = "stream_options"
    options = _without_nulls(_check_type(name, fields.get(name, {}), dict))
    _check_names(name, options, {"include_usage", "include_obfuscation"})
    if name in fields and not stream:
        raise _invalid(name, options, "absent unless stream is true")
    if _check_type(f"{name}.include_obfuscation", options.get("include_obfuscation", False), bool):
        raise _invalid(f"{name}.include_obfuscation", True, "false: this server adds no padding")
    return _check_type(f"{name}.include_usage", options.get("include_usage", False), bool)


def _check_prompts(value: Any, vocab_size: int) -> list[str | list[int]]:
    """Return one or more prompts, each a text or token ids."""
    if isinstance(value, str) or _is_ids(value, vocab_size):
        return [value]
    prompts = value if isinstance(value, list) else []
    alike = all(isinstance(one, str) for one in prompts) or all(
        _is_ids(one, vocab_size) for one in prompts
    )
    if not 1 <= len(prompts) <= _MAX_CHOICES or not alike:
        rule = f"a string or a list of token ids from 0 to {vocab_size - 1}; or 1 to {_MAX_CHOICES}"
        raise _invalid("prompt", value, f"{rule} strings, or as many such lists, in a list")
    return prompts


def _is_ids(value: Any, vocab_size: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(type(token) is int and 0 <= token < vocab_size for token in value)
    )


def _without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _same(value: Any, other: Any) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _show(value: Any) -> str:
    return f"{value!r:.80}"


def _invalid(name: str, value: Any, rule: str) -> RequestError:
    param = name.partition(".")[0].partition("[")[0]
    return RequestError(f"{name}={_show(value)} is invalid: it must be {rule}.", param)


def _check_type(name: str, value: Any, type_: type) -> Any:
    if not isinstance(value, type_):
        rules = {str: "a string", bool: "true or false", dict: "an object"}
        raise _invalid(name, value, rules[type_])
    return value


def _check_names(where: str, fields: dict[str, Any], known: set[str]) -> None:
    if unknown := fields.keys() - known:
        names, param = ", ".join(sorted(known)), where.partition("[")[0]
        raise RequestError(
            f"{where}.{min(unknown)[:80]} is not supported: this server knows {names}.", param
        )


def _check_number(name: str, value: Any, rule: Rule) -> int | float:
    type_, is_allowed, words = rule
    is_number = isinstance(value, int | type_) and not isinstance(value, bool)
    if not is_number or not is_allowed(value):
        raise _invalid(name, value, words)
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
    settings = {
        key: _check_number(f"{name}.{key}", value, SETTINGS[key]) for key, value in config.items()
    }
    return settings if do_sample else settings | {"temperature": 0.0}


def _check_messages(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise _invalid("messages", messages, "a list of at least one message")
    return [_check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _check_message(message: Any, where: str) -> dict[str, str]:
    message = _without_nulls(_check_type(where, message, dict))
    message = {name: value for name, value in message.items() if (name, value) not in _EMPTY}
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
