"""Text step by step: each token with the probability that it had, and what might have come."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from threading import get_ident
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from ..generation import encode_prompt, stream_text
from .explain import spell_tokens


@dataclass(frozen=True)
class Candidate:
    """A token and its probability, the softmax of the model's logits."""

    id: int
    text: str
    probability: float


@dataclass(frozen=True)
class Step:
    """The token that came, its place among all (1 for the likeliest), and the likeliest ones.

    The probabilities are the model's own: before temperature, top-k, top-p and penalties.
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

    The tokens are those of `stream_text` with the same settings; they end early where the model's
    context does.

    Raises:
        UserError: as `stream_text`.
    """
    ids = encode_prompt(model, tokenizer, prompt)
    ids = torch.cat([ids, ids.new_tensor([[step.came.id for step in steps]])], dim=1)
    room = max(1, model.config.max_position_embeddings - ids.shape[1])
    streamer = _StepStreamer(tokenizer, num_likeliest)
    hook = model.register_forward_hook(streamer.see)
    try:
        settings |= {"max_new_tokens": min(max_new_tokens, room), "streamer": streamer}
        yield from stream_text(model, tokenizer, ids, **settings)
    finally:
        hook.remove()


def choose_candidate(steps: Sequence[Step], place: int, choice: int) -> list[Step]:
    """Return the steps up to `place`, where `likeliest[choice]` comes instead of what came."""
    step = steps[place]
    chosen = replace(step, came=step.likeliest[choice], rank=choice + 1, chosen=True)
    return [*steps[:place], chosen]


class _StepStreamer(BaseStreamer):
    """Joins the tokens that `generate` hands over with the logits seen by a hook on the model."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, num_likeliest: int):
        self.tokenizer = tokenizer
        self.num_likeliest = num_likeliest
        self.thread: int | None = None
        self.logits: deque[torch.Tensor] = deque()
        self.steps: SimpleQueue[Step | None] = SimpleQueue()

    def see(self, module, args, output) -> None:
        if get_ident() == self.thread:  # and not one that uses the same model at the same time
            self.logits.append(output.logits[0, -1].float().cpu())

    def put(self, ids: torch.Tensor) -> None:
        if self.thread is None:  # the prompt comes first
            self.thread = get_ident()
        else:
            self.steps.put(self._step(int(ids), self.logits.popleft().softmax(dim=-1)))

    def end(self) -> None:
        self.steps.put(None)

    def __iter__(self) -> Iterator[Step]:
        while (step := self.steps.get()) is not None:
            yield step

    def _step(self, came: int, shares: torch.Tensor) -> Step:
        ids = [came, *shares.topk(min(self.num_likeliest, len(shares))).indices.tolist()]
        texts = spell_tokens(self.tokenizer, ids)
        first, *others = map(Candidate, ids, texts, shares[ids].tolist())
        return Step(first, int((shares > shares[came]).sum()) + 1, others)
