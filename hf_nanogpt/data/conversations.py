"""Conversations: their template and special tokens, and how they become tokens to learn from.

A conversation is a list of messages, `{"role": "user", "content": "..."}`. The chat template, which
is saved with the tokenizer, turns it into one text.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

from ..errors import UserError, explain_errors
from .answers import Span, find_answers
from .chat_text import ChatTextEncoder
from .encoding import decode_ids, encode_inside, encode_unlearnt

logger = logging.get_logger(__name__)

MESSAGES = "messages"  # the column of a table that holds conversations
ROLES = ("system", "user", "assistant")
# Parts of what is said that templates write in ways of their own, and that are not read here.
_NOT_READ = (
    *("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking"),
    *("images", "videos", "audio"),
)
_MESSAGE = {"role": Value("string"), "content": Value("string"), "weight": Value("int8")}
_FEATURES = Features({MESSAGES: List(_MESSAGE)})
_CHATML = Path(__file__).parent.parent / "templates" / "chatml.jinja"
_START, _END = "<|im_start|>", "<|im_end|>"

Documents: TypeAlias = Dataset | IterableDataset


def add_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    name: str | None = "chatml",
    *,
    model: PreTrainedModel | None = None,
) -> None:
    """Give a tokenizer, and its model, a chat template and the special tokens of the template.

    The model's rows for the new tokens start as the mean of the others, and its `generate()` stops
    at the end of a message. A tokenizer with a template keeps its own; `None` does nothing.

    Raises:
        UserError: there is no template of this name.
    """
    check_chat_template(name)
    if name is None:
        return
    template = _CHATML.read_text(encoding="utf-8")
    if tokenizer.chat_template not in (None, template):
        logger.warning_once(
            f"chat_template={name} is not used, because the tokenizer has a template of its own, "
            "which its model may have learnt. To replace it, delete it from the tokenizer's folder."
        )
        return
    known, tokenizer.chat_template = len(tokenizer), template
    special: dict[str, Any] = {"extra_special_tokens": [_START, _END]}
    tokenizer.add_special_tokens(special, replace_extra_special_tokens=False)
    if model is not None:
        fit_model(model, tokenizer, known=known)


def check_chat_template(name: str | None) -> None:
    """Raise a `UserError` unless `name` is the name of a template, or None."""
    if name not in (None, "chatml"):
        raise UserError(f"chat_template={name!r} is unknown: give chatml, or leave it out.")


@torch.no_grad()
def fit_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, known: int) -> None:
    """Fit a model to a tokenizer that has got our template after its first `known` tokens.

    The model's rows for the new tokens start as the mean of the others, and its `generate()` stops
    at the end of a message. Nothing changes for a tokenizer with another template.
    """
    if tokenizer.chat_template != _CHATML.read_text(encoding="utf-8"):
        return
    size = len(tokenizer)
    if size > model.config.vocab_size:  # a padded vocabulary may have room already
        model.resize_token_embeddings(size, mean_resizing=False)
    if size > known:
        layers: tuple[Any, ...] = (model.get_input_embeddings(), model.get_output_embeddings())
        for layer in layers:
            if layer is not None:  # a classifier does not predict tokens
                layer.weight[known:size] = layer.weight[:known].mean(dim=0)
    if model.can_generate():
        eos = model.generation_config.eos_token_id
        stops = [*(eos if isinstance(eos, list) else [eos]), tokenizer.convert_tokens_to_ids(_END)]
        model.generation_config.eos_token_id = sorted({stop for stop in stops if stop is not None})


def are_conversations(columns: list[str]) -> bool:
    """Say whether a table with these columns holds conversations: it has `messages` and no text."""
    if MESSAGES in columns and "text" in columns:
        logger.warning(
            f"The data has the columns text and {MESSAGES}: the text is read. To read the "
            f"conversations, set text_column={MESSAGES}, or select this column of a Dataset."
        )
    return MESSAGES in columns and "text" not in columns


def get_text(row: Mapping[str, Any]) -> str:
    """Return the text of a document; of a conversation, what all have said."""
    if "text" in row:
        return row["text"]
    return "\n".join(message["content"] for message in row[MESSAGES])


def read_conversations(table: Documents, columns: list[str], *, data: str) -> Documents:
    """Return the conversations of a table: rows with `messages`.

    Raises:
        UserError: a row has no messages, or a message has an unknown role, no text, or a weight
            other than 0 and 1. A stream raises it when the row is read.
    """
    settings: Any = {"fn_kwargs": {"data": data}, "remove_columns": columns, "features": _FEATURES}
    return table.map(_check_row, with_indices=True, **settings)


def _check_row(row: dict[str, Any], index: int, *, data: str) -> dict[str, Any]:
    place, messages = f"data={data}: row {index + 1}", row[MESSAGES]
    if not messages or not all(isinstance(message, dict) for message in messages):
        raise UserError(
            f"{place} has {MESSAGES}={messages!r:.80}: give a list of messages, each with a role "
            "and a content."
        )
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UserError(
                f"{place} has a message with role={role!r}: it must be one of {', '.join(ROLES)}."
            )
        if unread := next((key for key in _NOT_READ if message.get(key)), None):
            raise UserError(
                f"{place} has a message with {unread}={message[unread]!r:.80}, which is not read "
                "and would be missing from what is learnt: write it into the content, as the "
                "model is to write it, or leave such conversations out."
            )
        if not isinstance(content, str):
            raise UserError(f"{place} has a message with content={content!r:.80}: give a text.")
        if message.get("weight") not in (None, 0, 1):
            raise UserError(
                f"{place} has a message with weight={message['weight']!r}: give 0 for an answer "
                "that is not to be learnt, or 1."
            )
    kept = [{name: message.get(name) for name in _MESSAGE} for message in messages]
    return {MESSAGES: kept}


class ConversationEncoder:
    """Turn a batch of conversations into arrays of token ids, eos first.

    Only the answers of the assistant are to be learnt, except those with `"weight": 0`. They are
    where the template marks them by `{% generation %}`, or else where `find_answers` finds them. An
    eos that the template writes inside of a conversation, for example after each answer, separates
    no documents. A tokenizer written in Python does not say where its tokens are in a text: with it
    every token is learnt.
    """

    dtype = "int32"

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if tokenizer.chat_template is None:
            raise UserError(
                f"The data holds conversations ({MESSAGES}), but the tokenizer has no chat "
                "template: add --chat_template chatml to hf-nanogpt train."
            )
        self.tokenizer, self.text_encoder = tokenizer, ChatTextEncoder(tokenizer)
        self.template = tokenizer.get_chat_template()
        self.is_marked = bool(re.search(r"\{%-?\s*generation\b", self.template))
        self.learns_answers = tokenizer.is_fast
        # Of several special tokens after an answer, eos is the one at which generation stops.
        special, eos = self.text_encoder.special.pattern, tokenizer.eos_token
        self.ends = re.compile(rf"(?:{special})*?{re.escape(eos)}|{special}" if eos else special)
        if not tokenizer.is_fast and self.is_marked:
            raise UserError(
                "The chat template marks the answers by {% generation %}, but a tokenizer written "
                "in Python does not say where they are: use a fast tokenizer."
            )
        if not tokenizer.is_fast:
            logger.warning(
                "A tokenizer written in Python does not say where the answers are, so all tokens "
                "are learnt, also those of the questions: use a fast tokenizer."
            )

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[np.ndarray]]:
        return {"input_ids": [self._encode(messages) for messages in batch[MESSAGES]]}

    def _encode(self, messages: list[dict[str, Any]]) -> np.ndarray:
        text, answers = self._find_learnt(messages)
        ids, spans = self.text_encoder.encode_with_spans(text)
        ids, eos = ids.astype(self.dtype), self.tokenizer.eos_token_id
        # A token is learnt if any of its characters is; the bytes of one character share a span.
        if self.learns_answers:
            is_answer = np.zeros(len(text) + 1, dtype=bool)
            for start, end in answers:
                is_answer[start:end] = True
            learnt = [is_answer[start : max(end, start + 1)].any() for start, end in spans]
            ids = np.where(learnt, ids, encode_unlearnt(ids))
        # Some templates begin with eos, as bos.
        if eos is not None and eos not in decode_ids(ids[:1]):
            first = np.array([eos], dtype=self.dtype)
            ids = np.concatenate((encode_unlearnt(first) if self.learns_answers else first, ids))
        return encode_inside(ids, eos)

    def _find_learnt(self, messages: list[dict[str, Any]]) -> tuple[str, list[Span]]:
        """Return the text of a conversation, and where in it are the answers to learn."""
        shown = [
            {name: value for name, value in m.items() if name != "weight" and value is not None}
            for m in self.text_encoder.hide(messages)
        ]
        with explain_errors(f"The chat template refuses the conversation {messages!r:.80}"):
            if self.is_marked:
                text, answers = self._apply_template(shown, return_assistant_tokens_mask=True)
            else:
                text, answers = self._render(shown), []
                if self.learns_answers:
                    answers = find_answers(shown, text, self._render, ends=self.ends)
        # If all is learnt, a weight of any message says something.
        weighed = [m for m in messages if m.get("role") == "assistant" or not self.learns_answers]
        weights = [m.get("weight") for m in weighed]
        if 0 not in weights:
            return text, answers
        if len(answers) != len(weights):
            raise UserError(
                f"A message has weight=0, but the chat template marks {len(answers)} of "
                f"{len(weights)} messages by {{% generation %}}: mark each answer, or leave weight "
                "out."
            )
        return text, [span for span, w in zip(answers, weights, strict=True) if w != 0]

    def _render(self, messages: list[dict[str, Any]], **settings: Any) -> str:
        return self._apply_template(messages, **settings)[0]

    def _apply_template(
        self, messages: list[dict[str, Any]], **settings: Any
    ) -> tuple[str, list[Span]]:
        """Return the text of hidden messages, and where the template marks answers if asked to."""
        settings |= {"chat_template": self.template} | self.tokenizer.special_tokens_map
        texts, marked = cast(Any, render_jinja_template([messages], **settings))
        return texts[0], marked[0] if marked else []
