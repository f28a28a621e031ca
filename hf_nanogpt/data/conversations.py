"""Conversations: their template and special tokens, and how they become tokens to learn from.

A conversation is a list of messages, `{"role": "user", "content": "..."}`, and the chat template of
the tokenizer, which goes with the checkpoint, is what makes one text of it.
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
    """Give a tokenizer, and the model that goes with it, a chat template and its special tokens.

    The model's rows for the new tokens begin as the mean of the others, and its `generate()` stops
    where a message ends. A template that the tokenizer has already is kept; `None` does nothing.

    Raises:
        UserError: there is no template of this name.
    """
    check_chat_template(name)
    if name is None:
        return
    template = _CHATML.read_text(encoding="utf-8")
    if tokenizer.chat_template not in (None, template):
        logger.warning_once(f"The tokenizer keeps the chat template that it has: {name} is unused.")
        return
    known, tokenizer.chat_template = len(tokenizer), template
    tokenizer.add_special_tokens(
        {"extra_special_tokens": [_START, _END]}, replace_extra_special_tokens=False
    )
    if model is not None:
        fit_model(model, tokenizer, known=known)


def check_chat_template(name: str | None) -> None:
    """Raise a `UserError` unless `name` is that of a template, or None."""
    if name not in (None, "chatml"):
        raise UserError(f"chat_template={name!r} is unknown: give chatml, or leave it out.")


@torch.no_grad()
def fit_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, known: int) -> None:
    """Fit a model to a tokenizer that has got a chat template after its first `known` tokens.

    The model's rows for the new tokens start as the mean of the others, and its `generate()` stops
    at the end of a message. Nothing changes for a tokenizer with a template of its own.
    """
    if tokenizer.chat_template != _CHATML.read_text(encoding="utf-8"):
        return
    size = len(tokenizer)
    if size > model.config.vocab_size:  # a padded vocabulary may have room already
        model.resize_token_embeddings(size, mean_resizing=False)
    if size > known:
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if layer is not None:  # a classifier does not predict tokens
                layer.weight[known:size] = layer.weight[:known].mean(dim=0)
    if model.can_generate():
        eos = model.generation_config.eos_token_id
        stops = [*(eos if isinstance(eos, list) else [eos]), tokenizer.convert_tokens_to_ids(_END)]
        model.generation_config.eos_token_id = sorted({stop for stop in stops if stop is not None})


def read_conversations(table: Documents, columns: list[str], *, data: str) -> Documents:
    """Return the conversations of a table, rows with `messages` and, as `text`, what is said.

    Raises:
        UserError: one has no messages, or a message an unknown role or no text; of a stream that
            is known only when it is read.
    """
    return table.map(
        _check_row,
        with_indices=True,
        fn_kwargs={"data": data},
        remove_columns=columns,
        features=_FEATURES,
    )


def _check_row(row: dict[str, Any], index: int, *, data: str) -> dict[str, Any]:
    where, messages = f"data={data}: row {index + 1}", row[MESSAGES]
    if not messages or not all(isinstance(message, dict) for message in messages):
        raise UserError(
            f"{where} has {MESSAGES}={messages!r:.80}: give a list of messages, each with a role "
            "and a content."
        )
    for message in messages:
        if message.get("role") not in ROLES:
            raise UserError(
                f"{where} has a message with role={message.get('role')!r}: give each one of "
                f"{', '.join(ROLES)}."
            )
        if not isinstance(message.get("content"), str):
            raise UserError(
                f"{where} has a message with content={message.get('content')!r:.80}: give a text."
            )
    kept = [{name: message[name] for name in ("role", "content")} for message in messages]
    return {MESSAGES: kept, "text": "\n".join(message["content"] for message in kept)}


class ConversationEncoder:
    """Turn a batch of conversations into arrays of token ids, eos first.

    Only the answers of the assistant are learnt, where the template marks them. Any other token is
    written as its complement `~id`, which is negative, and `PackedCollator` takes that back.
    """

    kind = "int32"

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if tokenizer.chat_template is None:
            raise UserError(
                f"The data holds conversations ({MESSAGES}), and the tokenizer has no chat "
                "template: hf-nanogpt train gives it one by --chat_template chatml."
            )
        self.tokenizer = tokenizer
        self.is_marked = bool(re.search(r"\{%-?\s*generation\b", tokenizer.get_chat_template()))
        self.settings = {"return_dict": True, "return_assistant_tokens_mask": self.is_marked}
        if not self.is_marked:
            logger.warning(
                "The chat template does not mark the answers by {% generation %}, so all tokens "
                "are learnt, those of the questions too."
            )
        question = self._apply([{"role": "user", "content": "?"}], add_generation_prompt=True)
        if tokenizer.eos_token_id in question["input_ids"][1:]:
            raise UserError(
                f"The chat template ends each message by the eos_token {tokenizer.eos_token!r}, "
                "which ends a document here, so that no answer would see its question: train with "
                "examples/trl/sft.py."
            )

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[np.ndarray]]:
        return {"input_ids": [self._encode(messages) for messages in batch[MESSAGES]]}

    def _apply(self, messages: list[dict[str, str]], **settings: Any) -> Any:
        quiet = {"verbose": False}  # about conversations longer than the context, which are cut
        settings = self.settings | settings
        with explain_errors(f"The chat template refuses the conversation {messages!r:.80}"):
            return self.tokenizer.apply_chat_template(messages, tokenizer_kwargs=quiet, **settings)

    def _encode(self, messages: list[dict[str, str]]) -> np.ndarray:
        out = self._apply(messages)
        ids, eos = np.array(out["input_ids"], dtype=self.kind), self.tokenizer.eos_token_id
        if self.is_marked:
            ids = np.where(np.array(out["assistant_masks"]) == 1, ids, ~ids)
        if eos is None or max(ids[0], ~ids[0]) == eos:  # the template may begin with it, as bos
            return ids
        return np.insert(ids, 0, ~eos if self.is_marked else eos)
