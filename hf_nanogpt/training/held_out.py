"""Which part of the held-out text a training looks at, and which half is left to judge it by.

While training, the loss is only estimated, on blocks spread evenly over the held-out text. They are
chosen from counts of tokens, never from a clock, so that they are the same from the first step to
the last, on every machine and after a resume. Every second block is left out of them: it chooses
nothing, neither the weights that are kept nor the moment to stop, so the loss there tells how good
the model is on new text. The final figures are those of all blocks, because only these can be
repeated by `hf-nanogpt eval`; the loss of the half that chose nothing stands next to them.
"""

import math
from dataclasses import dataclass

from torch.utils.data import Subset

from ..data.encoding import is_learnt
from ..data.packing import PackedBlocks, PackedStream
from .arguments import NanoGPTTrainingArguments

# Of the cost of all steps. Samples may take 0.02 more, see `SampleCallback`.
_SHARE = 0.08
_STEP = 3  # a token costs so many forward passes in a step: one forward and twice that backward
_FEWEST = 4096  # tokens that make two halves


@dataclass(frozen=True)
class Estimate:
    """What is measured while training.

    Attributes:
        blocks: rows of the held-out text.
        has_halves: whether every second row of the held-out text is left out, as there are enough.
    """

    blocks: Subset
    has_halves: bool


def choose_estimate(
    held_out: PackedBlocks | PackedStream,
    args: NanoGPTTrainingArguments,
    blocks: PackedBlocks | PackedStream,
    *,
    context_length: int,
    count: int | None = None,
) -> Estimate | None:
    """Return what a training on `blocks` evaluates on until its end; None for all of a stream.

    `count` blocks if they are known, as in a resumed run, or those of `args.eval_tokens`, or as
    many as the budget allows.
    """
    if not isinstance(held_out, PackedBlocks):
        return None
    if not count:
        tokens = args.eval_tokens or _afford(args, blocks, context_length)
        count = max(1, tokens // (context_length - 1))
    # The last block may have one token only, and would be the second half of two blocks.
    has_halves = held_out.num_tokens >= _FEWEST and len(held_out) > 2
    candidates = range(0, len(held_out), 2 if has_halves else 1)
    while count < len(candidates):
        part = Subset(held_out, [candidates[i * len(candidates) // count] for i in range(count)])
        if _have_targets(part):
            return Estimate(part, has_halves)
        count *= 2  # of conversations, a few blocks may hold no answer
    half = Subset(held_out, candidates)
    if _have_targets(half):
        return Estimate(half, has_halves)
    return Estimate(Subset(held_out, range(len(held_out))), False)


def _afford(
    args: NanoGPTTrainingArguments, blocks: PackedBlocks | PackedStream, context_length: int
) -> int:
    """Return the tokens of one evaluation that keep all of them within `_SHARE`."""
    rows: float = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    per_epoch = args.max_steps
    if isinstance(blocks, PackedBlocks):
        per_epoch = math.ceil(len(blocks) / rows)
        rows = len(blocks) / per_epoch  # fewer in the last step of an epoch, perhaps the only one
    steps = args.max_steps if args.max_steps > 0 else per_epoch * args.num_train_epochs
    interval = per_epoch if args.eval_strategy == "epoch" else args.eval_steps or steps
    evaluations = math.ceil(1 / interval if interval < 1 else steps / interval)
    evaluations += bool(args.eval_on_start)
    return int(_SHARE * _STEP * steps * rows * context_length / evaluations)


def count_tokens(blocks: Subset | PackedBlocks) -> int:
    """Return the tokens of blocks that are learnt, and so are measured."""
    rows = (blocks[i]["input_ids"] for i in range(len(blocks)))
    return sum(int(is_learnt(row)[1:].sum()) for row in rows)


def _have_targets(blocks: Subset) -> bool:
    return any(is_learnt(blocks[i]["input_ids"])[1:].any() for i in range(len(blocks)))
