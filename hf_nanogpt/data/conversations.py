"""Conversations: their template and special tokens, and how they become tokens to learn from.

A conversation is a list of messages, `{"role": "user", "content": "..."}`. The chat template, which
is saved with the tokenizer, turns it into one text.
"""

import re
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..errors import UserError, explain_errors
from .encoding import decode_ids, encode_unlearnt

logger = logging.get_logger(__name__)

MESSAGES = "messages"  # the column of a table that holds conversations
ROLES = ("system", "user", "assistant")
_FEATURES = Features(
    {MESSAGES: List({"role": Value("string"), "content": Value("string")}), "text": Value("string")}
)
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
        logger.warning_once(f"The tokenizer already has a chat template: {name} is not used.")
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


def read_conversations(table: Documents, columns: list[str], *, data: str) -> Documents:
    """Return the conversations of a table: rows with `messages` and, as `text`, all contents.

    Raises:
        UserError: a row has no messages, or a message has an unknown role or no text. A stream
            raises it when the row is read.
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
        if not isinstance(content, str):
            raise UserError(f"{place} has a message with content={content!r:.80}: give a text.")
    kept = [{name: message[name] for name in ("role", "content")} for message in messages]
    return {MESSAGES: kept, "text": "\n".join(message["content"] for message in kept)}


class ConversationEncoder:
    """Turn a batch of conversations into arrays of token ids, eos first.

    If the template marks the answers of the assistant, only these are to be learnt.
    """

    dtype = "int32"

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if tokenizer.chat_template is None:
            raise UserError(
                f"The data holds conversations ({MESSAGES}), but the tokenizer has no chat "
                "template: add --chat_template chatml to hf-nanogpt train."
            )
        self.tokenizer = tokenizer
        self.is_marked = bool(re.search(r"\{%-?\s*generation\b", tokenizer.get_chat_template()))
        if not self.is_marked:
            logger.warning(
                "The chat template does not mark the answers by {% generation %}, so all tokens "
                "are learnt, also those of the questions."
            )
        question = self._apply([{"role": "user", "content": "?"}], add_generation_prompt=True)
        if tokenizer.eos_token_id in question["input_ids"][1:]:
            raise UserError(
                f"The chat template ends each message with the eos_token {tokenizer.eos_token!r}, "
                "which separates documents here, so no answer would see its question: train with "
                "examples/trl/sft.py."
            )

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[np.ndarray]]:
        return {"input_ids": [self._encode(messages) for messages in batch[MESSAGES]]}

    def _apply(self, messages: list[dict[str, str]], **settings: Any) -> Any:
        with explain_errors(f"The chat template refuses the conversation {messages!r:.80}"):
            return self.tokenizer.apply_chat_template(
                messages,
                return_dict=True,
                return_assistant_tokens_mask=self.is_marked,
                # No warning for conversations longer than the context: they are cut into blocks.
                tokenizer_kwargs={"verbose": False},
                **settings,
            )

    def _encode(self, messages: list[dict[str, str]]) -> np.ndarray:
        encoded = self._apply(messages)
        ids, eos = np.array(encoded["input_ids"], dtype=self.dtype), self.tokenizer.eos_token_id
        if self.is_marked:
            ids = np.where(np.array(encoded["assistant_masks"]) == 1, ids, encode_unlearnt(ids))
        if eos is None or eos in decode_ids(ids[:1]):  # some templates begin with eos, as bos
            return ids
        first = np.array([eos], dtype=self.dtype)
        return np.concatenate((encode_unlearnt(first) if self.is_marked else first, ids))
