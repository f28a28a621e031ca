"""Samples of what a model writes while it learns."""

import json
import math
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import regex
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.utils import logging

from ..analysis.plots import replace_file
from ..data.documents import DataArguments
from ..data.encoding import decode_ids, is_learnt, is_start
from ..data.sources import STDLIB
from ..errors import UserError, printable
from ..generation import encode_prompt, find_ends, generate_text
from .arguments import NanoGPTTrainingArguments
from .callbacks import SpeedCallback, warn_if_unwritable
from .progress import show

logger = logging.get_logger(__name__)

_LONGEST_PROMPT = 40  # characters
# Of 15 settings of temperature, top-p, top-k and min-p, this one writes text as likely as held-out
# text, and as repetitive. Bits per byte by an n-gram model and share of 8 characters that the text
# had before, of a model of Shakespeare's characters: held-out text 2.98 and 0.1 %; temperature 1.0
# 3.23, 0.9 3.02, 0.8 2.71; top-p 0.95 2.81; min-p 0.05 2.75, all 0.0 %; greedy 2.00 and 69 %. Of
# Python's library with BPE: held-out 3.48 and 19 %; 1.0 3.86 and 16 %, 0.9 3.56 and 20 %, 0.8 3.27
# and 25 %; top-p 0.95 3.65 and 19 %; greedy 3.54 and 76 %. (top_k=0 means all tokens.)
SAMPLING: dict[str, Any] = {"temperature": 0.9, "top_k": 0}
_LONGEST_TEXT = 256  # new tokens by default, as many as `pipeline("text-generation")` takes


class SampleCallback(TrainerCallback):
    """Show how the model continues a prompt as it learns, and collect the texts in samples.jsonl.

    A sample comes at each evaluation, or every `args.sample_steps`. It does not change training by
    a bit. Do not use it where weights are sharded: one process alone cannot gather them. If a
    sample at an evaluation took more than 2 % of the time until the next, that goes without.
    """

    # Before a training begins, an evaluation may come.
    active = False
    every: float | None = None
    drawn, cost = -math.inf, 0.0  # when the last sample came, and the seconds that it took

    def __init__(self, prompt: str, speed: SpeedCallback):
        self.prompt, self.speed = prompt, speed

    def on_train_begin(self, args, state, control, **kwargs):
        self.path = Path(args.output_dir) / "samples.jsonl"
        self.active = state.is_world_process_zero
        every = args.sample_steps
        self.every = math.ceil(every * state.max_steps) if every and every < 1 else every
        # From an earlier run, keep the samples up to the checkpoint that it resumes from.
        rows: list[str] = []
        with warn_if_unwritable(f"The former content of {self.path}"):
            if self.path.is_file():
                rows = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        self.rows = [row for row in rows if _read_step(row) <= state.global_step]

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        is_due = time.perf_counter() - self.drawn >= 50 * self.cost
        if self.every is None and is_due and "eval_loss" in (metrics or {}):
            self._sample(args, state, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        if self.every and state.global_step % self.every == 0:
            self._sample(args, state, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        self.active = False

    def _sample(self, args, state, *, model, processing_class, **kwargs) -> None:
        if not self.active:
            return
        start = time.perf_counter()
        # The time that a sample takes is not training.
        with self.speed.paused():
            text = draw_sample(
                model, processing_class, self.prompt, max_new_tokens=40, seed=args.seed
            )
            self.active = bool(text)  # what did not work once will not work later
            if not text:
                return
            # Rewrite the whole file: it may hold samples after the step of a resumed run.
            self.rows.append(json.dumps({"step": state.global_step, "text": text}) + "\n")
            with warn_if_unwritable(str(self.path)):
                replace_file(self.path, "".join(self.rows).encode())
            if not args.disable_tqdm:
                with warn_if_unwritable("A sample"):
                    shown = read_prompt(self.prompt, processing_class)
                    text = shown + text.removeprefix(self.prompt)
                    show(printable(_shorten(text, shown)))
        self.drawn = time.perf_counter()
        self.cost = self.drawn - start


def _read_step(row: str) -> float:
    """Return the step in a line of samples.jsonl, or infinity if it is not such a line."""
    try:
        return float(json.loads(row)["step"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf


def _shorten(text: str, prompt: str) -> str:
    """Return three lines of a text, starting with the last two of a longer prompt."""
    lines, asked = ([line for line in part.splitlines() if line.strip()] for part in (text, prompt))
    first = max(0, len(asked) - 2)
    return "\n".join(f"  | {line}" for line in lines[first : first + 3])


def choose_prompt(
    args: NanoGPTTrainingArguments,
    data_args: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    held_out: np.ndarray,
    *,
    context_length: int,
) -> str:
    """Return the prompt of the samples: the user's, or words of the held-out text.

    It is the first words of a document or of a line in it: at most three, and at most half of it,
    as after a whole document the model ends the text; or a conversation until its first answer. It
    takes at most a quarter of the context, so that the model has room to write. `held_out` is the
    first block, (T,).
    """
    if args.sample_prompt is not None:
        return args.sample_prompt
    most = context_length // 4
    if not is_learnt(held_out).all():
        return _choose_question(tokenizer, held_out, most)
    if data_args.data == STDLIB:
        return _shorten_prompt("def main(", tokenizer, most)
    parts = np.split(held_out, np.flatnonzero(is_start(held_out, tokenizer.eos_token_id)))
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    documents = [cast(str, decode(decode_ids(part))) for part in parts]
    return _shorten_prompt(_begin_document(documents), tokenizer, most)


def _begin_document(documents: list[str]) -> str:
    """Return the beginning of the first document of more than three words, or of the longest."""
    text = next((t for t in documents if len(t.split()) > 3), max(documents, key=len))
    # The end of a text is held out, which may begin within a word: prefer the next line.
    after = text.partition("\n")[2].split()
    words = after if len(after) > 3 else text.split()
    if len(words) > 1:
        return " ".join(words[: min(3, len(words) // 2)])
    characters = regex.findall(r"\X", text.strip())
    return "".join(characters[: (len(characters) + 1) // 2])


def _choose_question(tokenizer: PreTrainedTokenizerBase, held_out: np.ndarray, most: int) -> str:
    """Return a conversation until its first answer: the first that fits, or else the shortest.

    A question is not cut: only behind its end has the model learnt to write.
    """
    starts = np.flatnonzero(is_start(held_out, tokenizer.eos_token_id))
    conversations = [part for part in np.split(held_out, starts) if is_learnt(part).any()]
    questions = [part[: is_learnt(part).argmax()] for part in conversations]
    fitting = [question for question in questions if 0 < len(question) <= most]
    if whole := fitting or sorted((q for q in questions if len(q)), key=len):
        return cast(str, tokenizer.decode(decode_ids(whole[0])))
    # No answer begins in the block.
    text = tokenizer.decode(decode_ids(held_out), skip_special_tokens=True)
    return _shorten_prompt(cast(str, text), tokenizer, most)


def _shorten_prompt(text: str, tokenizer: PreTrainedTokenizerBase, most: int) -> str:
    r"""Return the first words of a text that fit, or else the first characters of its first word.

    A character is what a reader takes for one (`\X`, Unicode's extended grapheme cluster), such as
    a letter with the marks behind it.
    """
    for unit in (r"\S+", r"\X"):
        ends = [part.end() for part in regex.finditer(unit, text) if part.end() <= _LONGEST_PROMPT]
        for end in reversed(ends):
            if len(tokenizer(text[:end], add_special_tokens=False)["input_ids"]) <= most:
                return text[:end]
    return ""


def read_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a prompt as people read it: that of a chat without the template's special tokens."""
    if tokenizer.chat_template is None:
        return prompt
    return cast(str, tokenizer.decode(tokenizer(prompt)["input_ids"], skip_special_tokens=True))


def set_sampling(model: PreTrainedModel) -> None:
    """Let `generate()` of the checkpoint sample as here, and stop before it leaves the context.

    A prompt may fill half of the context.
    """
    new_tokens = min(_LONGEST_TEXT, model.config.max_position_embeddings // 2)
    assert model.generation_config is not None
    model.generation_config.update(do_sample=True, max_new_tokens=new_tokens, **SAMPLING)


def draw_sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    seed: int,
) -> str:
    """Return the prompt with what the model writes after it, shorter if the context is short.

    The model writes at least one token: an end at once would show nothing. If the prompt fills the
    context or the weights have become NaN, a warning says so and the result is empty: training does
    not fail because of a sample.
    """
    was_training = model.training
    try:
        # Leave at least one token of the context to write into.
        used = encode_prompt(model, tokenizer, prompt).shape[1]
        room = model.config.max_position_embeddings - used
        ends, not_at_once = find_ends(model, tokenizer), []
        if ends is not None:
            not_at_once = [MinNewTokensLengthLogitsProcessor(used, 1, ends, str(model.device))]
        [text] = generate_text(
            model.eval(),
            tokenizer,
            prompt,
            max_new_tokens=max(1, min(max_new_tokens, room)),
            seed=seed,
            logits_processor=not_at_once,
            **SAMPLING,
        )
        return text
    except (UserError, RuntimeError) as error:
        logger.warning_once(f"The model cannot write a sample: {error}")
        return ""
    finally:
        model.train(was_training)
