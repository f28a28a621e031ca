"""A conversation with a model: its messages, its settings, and the part that fits the context."""

import json
import sys
from collections.abc import Generator
from itertools import takewhile
from pathlib import Path
from time import thread_time
from typing import Any, cast

import torch
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..data.chat_text import ChatTextEncoder
from ..errors import UserError, did_you_mean, explain_errors
from ..generation import SETTINGS, check_settings, encode_prompt, stream_text

NO_TEMPLATE = (
    "This checkpoint has no chat template: teach it to chat with `hf-nanogpt train finetune --from "
    "CHECKPOINT --chat_template chatml --data ...`, or let it continue a text with `hf-nanogpt "
    "generate`."
)
HELP = """\
/reset            forget the conversation
/system TEXT      set the system prompt for the next answers; without TEXT, remove it
/set NAME VALUE   change a setting, such as /set temperature 0.5; /set alone shows them all
/save FILE        write the conversation to a new file, as a line of JSON to train on
/exit             end the chat, as Ctrl-D does; Ctrl-C ends an answer"""
_TEMPLATE_SECONDS = 2  # of processor time


def find_turn_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end an answer: the model's, the tokenizer's eos and `<|im_end|>`."""
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    ends |= {tokenizer.eos_token_id, tokenizer.get_vocab().get("<|im_end|>")}
    return sorted(ends - {None})


def render_messages(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """Return the text that the chat template makes of messages, up to where an answer begins.

    A template comes with the checkpoint, so it may be hostile. transformers runs it in a sandbox,
    and here its time is limited; a single step can still take much memory.

    Raises:
        UserError: the template rejects the messages, fails, or takes too long.
    """
    end = thread_time() + _TEMPLATE_SECONDS

    def check_time(frame, event, arg):  # Python calls it for each line that this thread runs
        if thread_time() > end:
            raise _OutOfTime(f"it takes more than {_TEMPLATE_SECONDS} seconds")
        return check_time

    with explain_errors("The chat template cannot render this conversation"):
        previous = sys.gettrace()
        sys.settrace(check_time)
        try:
            text = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
            return cast(str, text)  # tokenize=False
        finally:
            sys.settrace(previous)


class _OutOfTime(BaseException):
    """Not an `Exception`, which code on the way might catch."""


class Chat:
    """A conversation that answers messages; it drops the oldest ones when the context is full.

    `settings` are those of `stream_text`. In a small context an answer is shorter than
    `max_new_tokens`. The model itself is not changed.

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
        check_settings(**{name: self.settings.get(name) for name in SETTINGS})
        self.model, self.tokenizer = model, tokenizer
        self.text_encoder = ChatTextEncoder(tokenizer)
        self.system = system
        self._cache: Cache = DynamicCache(config=model.config)
        self.reset()

    def reset(self) -> None:
        """Forget all messages."""
        self.messages: list[dict[str, str]] = []
        self.forgotten = 0  # how many of the first messages no longer fit the context
        self._cached: list[int] = []  # the tokens that the cache holds

    def answer(self, text: str) -> Generator[str, None, None]:
        """Return the pieces of the answer to `text`; closing it keeps the part said so far.

        Raises:
            UserError: the message is too long for the context, or cannot be encoded. It is then not
                added to the conversation.
        """
        message = {"role": "user", "content": text}
        ids = self._fit_context(message)
        room = self.model.config.max_position_embeddings - len(ids)
        pieces = stream_text(
            self.model,
            self.tokenizer,
            torch.tensor([ids], device=self.model.device),
            past_key_values=self._reuse_cache(ids),
            eos_token_id=find_turn_ends(self.model, self.tokenizer) or None,
            **self.settings | {"max_new_tokens": min(self.settings["max_new_tokens"], room)},
        )
        return self._record(message, pieces, ids)

    def _record(self, message, pieces, ids) -> Generator[str, None, None]:
        answer = {"role": "assistant", "content": ""}
        self.messages += [message, answer]
        try:
            for piece in pieces:
                answer["content"] += piece
                yield piece
            self._cached = ids  # not after an answer cut short, when a step may still run
        finally:
            pieces.close()

    def _fit_context(self, message: dict[str, str]) -> list[int]:
        """Return the tokens of `message` and of the last turns that leave room for an answer."""
        limit = self.model.config.max_position_embeddings
        room = min(self.settings["max_new_tokens"], limit // 2)
        for first in range(self.forgotten, len(self.messages) + 1, 2):
            messages = [*self._system_message(), *self.messages[first:], message]
            text = render_messages(self.tokenizer, self.text_encoder.hide(messages))
            [ids] = encode_prompt(
                self.model, self.tokenizer, text, encode=self.text_encoder.encode
            ).tolist()
            if len(ids) + room <= limit:
                break
        if len(ids) >= limit:
            raise UserError(
                f"The message has {len(ids)} tokens with the text before it, and this model's "
                f"context is {limit}: shorten the message or the system prompt."
            )
        self.forgotten = first
        return ids

    def _system_message(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _reuse_cache(self, ids: list[int]) -> Cache:
        """Return a cache of the first of `ids`, as many as were cached for the last answer."""
        pairs = zip(self._cached, ids[:-1], strict=False)  # the model must read the last one
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        # A layer with a sliding window cannot be cropped: it has dropped the older tokens. And some
        # types of RoPE rotate the keys of a longer text by other frequencies.
        rope_type = (getattr(self.model.config, "rope_parameters", None) or {}).get("rope_type")
        by_length = rope_type in ("longrope", "dynamic")
        if not same or by_length or any(self._cache.is_sliding):
            self._cache = DynamicCache(config=self.model.config)
        else:
            self._cache.crop(same - self._cache.get_seq_length())
        self._cached = []
        return self._cache

    def run_command(self, line: str) -> str:
        """Run a command such as `/set temperature 0.5` and return its message for the user.

        Raises:
            UserError: there is no such command, or it fails. Then nothing has changed.
        """
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if name == "/help":
            return HELP
        if name == "/reset":
            self.reset()
            return "The conversation starts again."
        if name == "/system":
            self.system = rest
            return f"The system prompt is now {rest!r}."
        if name == "/set":
            return self._set(*rest.split())
        if name == "/save":
            return self._save(rest)
        raise UserError(f"{name!r} is not a command: /help lists them.")

    def _set(self, name: str = "", *values: str) -> str:
        if not name:
            return "\n".join(f"{name} = {self.settings.get(name)}" for name in SETTINGS)
        if name not in SETTINGS:
            raise UserError(
                f"{name!r} is not a setting: choose one of {', '.join(SETTINGS)}."
                + did_you_mean(name, SETTINGS)
            )
        try:
            [value] = map(SETTINGS[name][0], values)
        except ValueError as error:
            raise UserError(
                f"{name}={' '.join(values)} is invalid: give one number, as in "
                f"/set {name} {self.settings.get(name) or 1}."
            ) from error
        check_settings(**{name: value})
        self.settings[name] = value
        return f"{name} = {value}"

    def _save(self, name: str) -> str:
        conversation = {"messages": self._system_message() + self.messages}
        try:
            line = f"{json.dumps(conversation, ensure_ascii=False)}\n".encode()
            with Path(name).expanduser().open("xb") as file:
                file.write(line)
        # RuntimeError: no such user's home; ValueError: text that is not Unicode, or a null byte
        except (OSError, RuntimeError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise UserError(
                f"Cannot write {name!r} ({why}): give the name of a new file."
            ) from error
        return f"Conversation saved to {name}."
