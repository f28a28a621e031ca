"""The most likely next tokens, how a token is written on one line, and text token by token."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from threading import get_ident
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.generation import BaseStreamer

from ..errors import UserError
from ..generation import encode_prompt, stream_text

_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
_VISIBLE = str.maketrans({" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"})


@dataclass(frozen=True)
class Candidate:
    """A token and its probability, the softmax of the model's logits."""

    id: int
    text: str
    probability: float


@dataclass(frozen=True)
class Step:
    """The token that came, its rank among all tokens (1 is the most likely), and the alternatives.

    The probabilities are the model's own, before temperature, top-k, top-p and penalties.
    """

    came: Candidate
    rank: int
    likeliest: list[Candidate]
    chosen: bool = False  # by a person


def stream_steps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    steps: Sequence[Step] = (),
    max_new_tokens: int = 100,
    num_likeliest: int = 10,
    **settings: Any,
) -> Iterator[Step]:
    """Yield a `Step` for each token that follows `prompt` and the tokens of `steps`.

    The tokens are those of `stream_text` with the same settings. Generation stops early if the
    model's context is full.

    Raises:
        UserError: as `stream_text`.
    """
    ids = encode_prompt(model, tokenizer, prompt)
    ids = torch.cat([ids, ids.new_tensor([[step.came.id for step in steps]])], dim=1)
    room = max(1, model.config.max_position_embeddings - ids.shape[1])
    streamer = _StepStreamer(tokenizer, num_likeliest)
    hook = model.register_forward_hook(streamer.keep_logits)
    try:
        settings |= {"max_new_tokens": min(max_new_tokens, room), "streamer": streamer}
        yield from stream_text(model, tokenizer, ids, **settings)
    finally:
        hook.remove()


def choose_candidate(steps: Sequence[Step], place: int, choice: int) -> list[Step]:
    """Return the steps up to `place`, with `likeliest[choice]` there instead of what came."""
    step = steps[place]
    chosen = replace(step, came=step.likeliest[choice], rank=choice + 1, chosen=True)
    return [*steps[:place], chosen]


class _StepStreamer(BaseStreamer):
    """Pairs each token that `generate` hands over with the logits that a hook saw before it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, num_likeliest: int):
        self.tokenizer = tokenizer
        self.num_likeliest = num_likeliest
        self.thread: int | None = None
        self.logits: list[torch.Tensor] = []  # (positions, V) of each run since the last token
        self.steps: SimpleQueue[Step | None] = SimpleQueue()

    def keep_logits(self, module, args, output) -> None:
        if get_ident() == self.thread:  # another thread may use the same model at the same time
            self.logits.append(output.logits[0].float().cpu())

    def put(self, ids: torch.Tensor) -> None:
        if self.thread is None:  # the prompt comes first
            self.thread = get_ident()
            return
        if ids.numel() != 1 or [len(rows) for rows in self.logits] != [1]:
            raise UserError(
                "The probabilities of these tokens are not known: with a setting in "
                "generation_config.json, such as guidance_scale, prefill_chunk_size or "
                "prompt_lookup_num_tokens, the model does not run once for each token. Remove it."
            )
        [row] = self.logits.pop()
        self.steps.put(self._make_step(int(ids), row.log_softmax(dim=-1)))

    def end(self) -> None:
        self.steps.put(None)

    def __iter__(self) -> Iterator[Step]:
        while (step := self.steps.get()) is not None:
            yield step

    def _make_step(self, token: int, log_probabilities: torch.Tensor) -> Step:
        order = rank_tokens(log_probabilities)
        ids = [token, *order[: self.num_likeliest]]
        came, *likeliest = make_candidates(self.tokenizer, ids, log_probabilities)
        return Step(came, order.index(token) + 1, likeliest)


def rank_tokens(log_probabilities: torch.Tensor) -> list[int]:
    """Return all token ids, the most likely first; equally likely ones by their id."""
    return log_probabilities.argsort(descending=True, stable=True).tolist()


def make_candidates(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], log_probabilities: torch.Tensor
) -> list[Candidate]:
    """Return the tokens with these ids; `log_probabilities` (V,) are those of all tokens."""
    probabilities = log_probabilities[ids].exp().tolist()
    return list(map(Candidate, ids, spell_tokens(tokenizer, ids), probabilities))


def spell_tokens(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Return the text of each token, and bytes that are not text on their own as <E2><82>."""
    texts, added = [], tokenizer.added_tokens_decoder
    for raw, i in zip(tokenizer.convert_ids_to_tokens(ids), ids, strict=True):
        text = cast(str, tokenizer.decode([i], clean_up_tokenization_spaces=False))
        if raw is None:  # the embedding may have more rows than there are tokens
            text = f"<{i}>"
        elif i in added:  # a byte-level decoder would take its characters for bytes
            text = added[i].content
        elif "\ufffd" in text and (byte := re.fullmatch("<0x([0-9A-F]{2})>", raw)):  # LLaMA's
            text = f"<{byte[1]}>"
        elif "\ufffd" in text and all(character in _BYTES for character in raw):
            text = "".join(f"<{_BYTES[character]:02X}>" for character in raw)
        elif raw.startswith("\u2581"):  # SentencePiece's space, which decoding drops at the start
            text = raw.replace("\u2581", " ")
        texts.append(text)
    return texts


def show_token(text: str) -> str:
    """Return `text` on one line: white space is visible and nothing moves a cursor."""
    shown = text.translate(_VISIBLE)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
