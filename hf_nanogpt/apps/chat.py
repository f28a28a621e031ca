"""A conversation with a model: its turns, its settings, and what of it fits the context."""

import json
import sys
from collections.abc import Generator
from itertools import takewhile
from pathlib import Path
from time import thread_time
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from ..generation import check_settings, encode_prompt, stream_text

NO_TEMPLATE = (
    "This checkpoint has no chat template: teach it to chat with `hf-nanogpt train finetune --from "
    "CHECKPOINT --chat_template chatml --data ...`, or let it go on from a text with `hf-nanogpt "
    "generate`."
)
HELP = """\
/reset            forget the conversation
/system TEXT      tell the model what to be, from the next answer on; without TEXT nothing
/set NAME VALUE   change a setting, such as /set temperature 0.5; /set shows them all
/save FILE        write the conversation to a new file, as a line of JSON that can be trained on
/exit             end, as Ctrl-D does; Ctrl-C ends an answer"""
_TEMPLATE_SECONDS = 2  # of one processor
_KINDS: dict[str, type] = {
    "max_new_tokens": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "seed": int,
}


def find_turn_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end an answer: those of the model, the tokenizer's eos, `<|im_end|>`."""
    own = model.generation_config.eos_token_id
    ends = {*([own] if isinstance(own, int) else own or []), tokenizer.eos_token_id}
    return sorted((ends | {tokenizer.get_vocab().get("<|im_end|>")}) - {None})


def render_messages(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """Return the text that the chat template makes of messages, up to where an answer begins.

    A template comes with the checkpoint and may be anybody's: transformers runs it where it reaches
    nothing else, and here it has a few seconds. A single step of it can still take much memory.

    Raises:
        UserError: the template refuses the messages, or fails, or takes too long.
    """
    end = thread_time() + _TEMPLATE_SECONDS

    def watch(frame, event, arg):  # called at each line that this thread runs
        if thread_time() > end:
            raise _TooLong
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except _TooLong:
        raise UserError(
            f"The chat template has not written this conversation within {_TEMPLATE_SECONDS} "
            "seconds: take a checkpoint with another."
        ) from None
    except TemplateError as error:
        raise UserError(f"The chat template refuses this conversation: {error}.") from error
    except Exception as error:  # a template can fail like any program
        raise UserError(f"The chat template fails on this conversation: {error}.") from error
    finally:
        sys.settrace(before)


class _TooLong(BaseException):
    """Goes through any `except Exception` on its way."""


class Chat:
    """Answers messages in turn; the oldest turns are left out when the context is full.

    `settings` are those of `stream_text`; an answer has room for `max_new_tokens`, or less in a
    small context. The model's `generation_config` then ends at each of `find_turn_ends`.

    Raises:
        UserError: the checkpoint has no chat template, or a setting is out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str = "",
        max_new_tokens: int = 256,
        **settings: Any,
    ):
        if not tokenizer.chat_template:
            raise UserError(NO_TEMPLATE)
        self.settings = {"max_new_tokens": max_new_tokens, **settings}
        given = {name: self.settings.get(name) for name in _KINDS}
        check_settings(**{name: value for name, value in given.items() if value is not None})
        model.generation_config.eos_token_id = find_turn_ends(model, tokenizer) or None
        self.model, self.tokenizer = model, tokenizer
        self.system = system
        self._cache: Cache = DynamicCache(config=model.config)
        self.reset()

    def reset(self) -> None:
        """Forget all turns."""
        self.messages: list[dict[str, str]] = []
        self.forgotten = 0  # so many of the first messages no longer fit the context
        self._known: list[int] = []  # the tokens of which the cache holds keys and values

    def answer(self, text: str) -> Generator[str, None, None]:
        """Return the pieces of the answer to `text`; what was said until closed is remembered.

        Raises:
            UserError: the message is too long for the context, or cannot be encoded; then it is
                no part of the conversation.
        """
        message = {"role": "user", "content": text}
        ids = self._fit(message)
        room = self.model.config.max_position_embeddings - len(ids)
        settings = self.settings | {"max_new_tokens": min(self.settings["max_new_tokens"], room)}
        cache = self._recall(ids)
        prompt = torch.tensor([ids], device=self.model.device)
        pieces = stream_text(self.model, self.tokenizer, prompt, past_key_values=cache, **settings)
        return self._say(message, pieces, ids)

    def _say(self, message, pieces, ids) -> Generator[str, None, None]:
        answer = {"role": "assistant", "content": ""}
        self.messages += [message, answer]
        try:
            for piece in pieces:
                answer["content"] += piece
                yield piece
            self._known = ids  # after an answer cut short, the last step may still run
        finally:
            pieces.close()

    def _fit(self, message: dict[str, str]) -> list[int]:
        """Return the tokens of the last turns that leave room for an answer, and of `message`."""
        limit = self.model.config.max_position_embeddings
        room = min(self.settings["max_new_tokens"], limit // 2)
        for first in range(self.forgotten, len(self.messages) + 1, 2):
            ids = self._encode([*self.messages[first:], message])
            if len(ids) + room <= limit:
                break
        if len(ids) >= limit:
            raise UserError(
                f"The message has {len(ids)} tokens with what stands before it, and this model's "
                f"context is {limit}: shorten it, or the system prompt."
            )
        self.forgotten = first
        return ids

    def _begin(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _encode(self, messages: list[dict[str, str]]) -> list[int]:
        text = render_messages(self.tokenizer, self._begin() + messages)
        ids = encode_prompt(self.model, self.tokenizer, text, add_special_tokens=False)
        return ids[0].tolist()

    def _recall(self, ids: list[int]) -> Cache:
        """Return a cache with keys and values of the first of `ids`, as many as are known."""
        pairs = zip(self._known, ids[:-1], strict=False)  # the last is to be computed in any case
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        # A layer with a sliding window cannot go back: it has dropped what came before.
        if not same or any(self._cache.is_sliding):
            self._cache = DynamicCache(config=self.model.config)
        else:
            self._cache.crop(same - self._cache.get_seq_length())
        self._known = []
        return self._cache

    def run_command(self, line: str) -> str:
        """Do what a line such as `/set temperature 0.5` says; return what to tell the user.

        Raises:
            UserError: there is no such command, or it cannot be done; nothing has changed.
        """
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if name == "/help":
            return HELP
        if name == "/reset":
            self.reset()
            return "The conversation starts anew."
        if name == "/system":
            self.system = rest
            return f"The system prompt is {rest!r} now."
        if name == "/set":
            return self._set(*rest.split())
        if name == "/save":
            return self._save(rest)
        raise UserError(f"{name!r} is no command: /help lists them.")

    def _set(self, name: str = "", *values: str) -> str:
        if not name:
            return "\n".join(f"{name} = {self.settings.get(name)}" for name in _KINDS)
        if name not in _KINDS:
            raise UserError(f"{name!r} is no setting: choose one of {', '.join(_KINDS)}.")
        try:
            [value] = map(_KINDS[name], values)
        except ValueError as error:
            raise UserError(
                f"{name}={' '.join(values)} is not possible: give one number, as in "
                f"/set {name} {self.settings.get(name) or 1}."
            ) from error
        check_settings(**{name: value})
        self.settings[name] = value
        return f"{name} = {value}"

    def _save(self, name: str) -> str:
        conversation = json.dumps({"messages": self._begin() + self.messages}, ensure_ascii=False)
        try:
            with Path(name).expanduser().open("x", encoding="utf-8") as file:
                file.write(conversation + "\n")
        except (OSError, RuntimeError) as error:  # RuntimeError: of `expanduser`, no such user
            why = getattr(error, "strerror", None) or error
            raise UserError(
                f"{name!r} cannot be written ({why}): give the name of a new file."
            ) from error
        return f"{name} has the conversation."
