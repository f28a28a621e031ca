"""The log probabilities of tokens, and what a request may change about those of the next one."""

import asyncio
import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from itertools import chain
from typing import Any, NamedTuple

import torch
from transformers import (
    DynamicCache,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SequenceBiasLogitsProcessor,
)

from ..data.tokenization import token_speller
from ..errors import UserError
from ..modeling_nanogpt import CACHE

_AT_ONCE = 256  # tokens that are read in one step, as logits take much memory
_LOWEST = -9999.0  # of an impossible token, as JSON has no infinity


def share_weights(model: PreTrainedModel) -> Any:
    """Return a model of its own with the same weights, for work that changes a model's state."""
    weights = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in weights})


# Probabilities


class Score(NamedTuple):
    """A token: what it spells, its log probability (of the first: None), the likeliest tokens."""

    spelt: bytes
    logprob: float | None
    top: list[tuple[bytes, float]]


class Scorer:
    """Computes log probabilities for the requests of one event loop.

    They are the model's own, in nats: before a bias, a penalty or the temperature changes them. So
    the tokens are read once more, after they are written, which also gives those of the prompt.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self._source = model
        self.spell: Callable[[int], bytes] = cache(token_speller(tokenizer))
        # Some types of RoPE keep a state in the model, so one text is read at a time.
        self._thread = ThreadPoolExecutor(1)

    @cached_property
    def model(self) -> Any:
        return share_weights(self._source)

    async def score(self, reading: "Reading", tokens: list[int]) -> list[Score]:
        """Return the scores of tokens that follow those read so far."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, reading.read, tokens)

    async def close(self) -> None:
        """Wait until no thread uses the model any more."""
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)


class Reading:
    """One text that a `Scorer` reads; each score has `top` alternatives."""

    def __init__(self, scorer: Scorer, top: int):
        self.scorer, self.top = scorer, top
        self.cache = DynamicCache(config=scorer.model.config)
        self.next: torch.Tensor | None = None  # log probabilities of the next token, (V,)

    def read(self, tokens: list[int]) -> list[Score]:
        """Return the scores of the next tokens.

        Raises:
            UserError: the model's probabilities are NaN.
        """
        parts = (tokens[n : n + _AT_ONCE] for n in range(0, len(tokens), _AT_ONCE))
        return [score for part in parts for score in self._read_part(part)]

    @torch.inference_mode()
    def _read_part(self, tokens: list[int]) -> list[Score]:
        model = self.scorer.model
        ids = torch.tensor([tokens], device=model.device)
        logits = model(input_ids=ids, use_cache=True, **{CACHE: self.cache}).logits[0]  # (T, V)
        after = logits.float().log_softmax(-1).clamp(min=_LOWEST)
        if after.isnan().any():  # also of infinite logits
            raise UserError("The model's probabilities are NaN: its training has diverged.")
        scores = []
        if self.next is None:  # nothing precedes the first token, so it has no probability
            scores, before = [Score(self.scorer.spell(tokens[0]), None, [])], after[:-1]
        else:
            before = torch.cat((self.next[None], after[:-1]))
        self.next = after[-1]
        ids = ids[0, len(scores) :]
        own = before.gather(1, ids[:, None])[:, 0].tolist()
        top, tops = before.topk(min(self.top, before.shape[1]))
        for token, logprob, *best in zip(
            ids.tolist(), own, tops.tolist(), top.tolist(), strict=True
        ):
            others = [(self.scorer.spell(i), value) for i, value in zip(*best, strict=True)]
            scores.append(Score(self.scorer.spell(token), logprob, others))
        return scores


# What a request changes

CHANGES = {"logit_bias", "presence_penalty", "frequency_penalty"}


def build_processors(settings: dict[str, Any], prompt_tokens: int) -> list[LogitsProcessor]:
    """Return what applies a request's `logit_bias`, `presence_penalty` and `frequency_penalty`."""
    processors: list[LogitsProcessor] = []
    if bias := settings.get("logit_bias"):
        processors.append(SequenceBiasLogitsProcessor([[[token], b] for token, b in bias.items()]))
    penalties = [settings.get(f"{name}_penalty", 0.0) for name in ("presence", "frequency")]
    if any(penalties):
        processors.append(_Penalties(*penalties, prompt_tokens=prompt_tokens))
    return processors


class _Penalties(LogitsProcessor):
    """Lower the logits of tokens that the answer holds: once, and for each time they occur."""

    def __init__(self, presence: float, frequency: float, *, prompt_tokens: int):
        self.presence, self.frequency, self.prompt_tokens = presence, frequency, prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        written = input_ids[:, self.prompt_tokens :]
        ones = torch.ones_like(written, dtype=scores.dtype)
        counts = torch.zeros_like(scores).scatter_add_(1, written, ones)
        return scores - self.presence * (counts > 0) - self.frequency * counts
