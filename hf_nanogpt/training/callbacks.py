"""What one sees of a training run: the progress bar with its figures, samples, the loss plot."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerState,
)
from transformers.trainer_utils import unwrap_peft_model
from transformers.utils import logging

from ..analysis.plots import plot_losses, replace_file
from ..configuration_nanogpt import NanoGPTConfig
from ..errors import printable
from ..flops import count_flops, find_peak
from ..generation import generate_text

logger = logging.get_logger(__name__)


@contextmanager
def no_reason_to_stop(what: str) -> Iterator[None]:
    """Let training go on where something that only shows it cannot be written, with a warning."""
    try:
        yield
    except (OSError, UnicodeError) as error:
        logger.warning_once(f"{what} could not be written, and training goes on: {error}")


class SpeedCallback(TrainerCallback):
    """Count tokens and the time of training steps, without evaluation, checkpoints and samples.

    `context_length` is the length of the training blocks, by default the model's. MFU (model FLOPs
    utilisation) is the share of the device's peak that the model's own FLOPs use, see
    `count_flops` and `find_peak`; where one of them is not known there is none.
    """

    def __init__(self, *, context_length: int | None = None):
        self.context_length = context_length
        self.share: float | None = None
        self._restart(0)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.share = _share_per_token(args, model, self.context_length)
        self._restart(state.num_input_tokens_seen)

    def _restart(self, tokens: int) -> None:
        self.start, self.seconds, self.mark = tokens, 0.0, time.perf_counter()
        self.last_read = tokens, 0.0

    def on_step_end(self, args, state, control, **kwargs):
        self._count()

    def on_evaluate(self, args, state, control, **kwargs):
        self.mark = time.perf_counter()

    def on_save(self, args, state, control, **kwargs):
        self.mark = time.perf_counter()

    def _count(self) -> None:
        now = time.perf_counter()
        self.seconds, self.mark = self.seconds + now - self.mark, now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what runs in the block."""
        self._count()
        yield
        self.mark = time.perf_counter()

    def read(self, state: TrainerState) -> dict[str, float]:
        """Return `tokens_per_second` and `mfu` since the last reading."""
        self._count()
        since, self.last_read = self.last_read, (state.num_input_tokens_seen, self.seconds)
        return self._figures(*since, state)

    def summarize(self, state: TrainerState) -> dict[str, float]:
        """Return `tokens_per_second` and `mfu` since training was started or resumed."""
        return self._figures(self.start, 0.0, state)

    def _figures(self, tokens: int, seconds: float, state: TrainerState) -> dict[str, float]:
        if state.num_input_tokens_seen == tokens:  # not counted, or resumed at the end
            return {}
        speed = (state.num_input_tokens_seen - tokens) / max(self.seconds - seconds, 1e-9)
        mfu = {} if self.share is None else {"mfu": round(speed * self.share, 4)}
        return {"tokens_per_second": round(speed, 1), **mfu}


def _share_per_token(args, model: PreTrainedModel, context_length: int | None) -> float | None:
    """Return the FLOPs of training on one token over the peak FLOP/s of all devices."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    model = unwrap_peft_model(model)
    is_ours = getattr(getattr(model, "config", None), "model_type", "") == NanoGPTConfig.model_type
    peak = find_peak(args.device, dtype) if is_ours else None
    if peak is None:
        return None
    devices = args.world_size * max(1, args.n_gpu)
    # Forward, back through the layers, and back to those weights that are trained.
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    passes = 2 + sum(n for n, trained in sizes if trained) / sum(n for n, _ in sizes)
    return passes * count_flops(model, context_length=context_length) / (peak * devices)


class ProgressCallback(TrainerCallback):
    """Show one bar with the running loss and speed, and one line for each evaluation."""

    def __init__(self):
        self.bar: Any = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()
        if state.is_world_process_zero:
            with no_reason_to_stop("The progress bar"):
                self.bar = tqdm(
                    total=state.max_steps,
                    initial=state.global_step,
                    desc="Training",
                    delay=0,  # shown from the start, whatever the command line has set
                    dynamic_ncols=True,
                )

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            with no_reason_to_stop("The progress bar"):
                self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is not None and logs:
            with no_reason_to_stop("The progress bar"):
                self._show(state, logs)

    def _show(self, state, logs: dict[str, float]) -> None:
        if "loss" in logs:
            figures = [f"loss {logs['loss']:.3f}"]
            if "tokens_per_second" in logs:
                figures.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
            if "mfu" in logs:
                figures.append(f"MFU {logs['mfu']:.0%}")
            self.bar.set_postfix_str(", ".join(figures))
        if "eval_loss" in logs:
            bits = logs.get("eval_bits_per_byte")
            self.bar.write(
                f"step {state.global_step:>6,} | {_count(state.num_input_tokens_seen):>7} tokens | "
                f"validation loss {logs['eval_loss']:.4f}"
                + (f" | {bits:.4f} bits per byte" if bits is not None else "")
                + f" | {time.perf_counter() - self.started:,.0f} s"
            )

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            with no_reason_to_stop("The progress bar"):
                self.bar.close()
            self.bar = None


def _count(number: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:.0f}"


class SampleCallback(TrainerCallback):
    """Show how the model goes on from a prompt, as it learns, and collect it in samples.jsonl.

    At each evaluation, or every `args.sample_steps`. Training is the same to the bit with it and
    without. It must not be used where weights are sharded: one process alone could not gather them.
    """

    def __init__(self, prompt: str, speed: SpeedCallback):
        self.prompt, self.speed = prompt, speed

    def on_train_begin(self, args, state, control, **kwargs):
        self.path = Path(args.output_dir) / "samples.jsonl"
        self.active = state.is_world_process_zero
        every = args.sample_steps
        self.every = math.ceil(every * state.max_steps) if every and every < 1 else every
        # Of an earlier run, keep what the checkpoint that goes on had seen.
        rows: list[str] = []
        with no_reason_to_stop(f"What {self.path} had"):
            if self.path.is_file():
                rows = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        self.rows = [row for row in rows if _step_of(row) <= state.global_step]

    def on_evaluate(self, args, state, control, **kwargs):
        if self.every is None:
            self._show(args, state, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        if self.every and state.global_step % self.every == 0:
            self._show(args, state, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        self.active = False

    def _show(self, args, state, *, model, processing_class, **kwargs) -> None:
        if not self.active:
            return
        with self.speed.paused():
            text = draw_sample(
                model, processing_class, self.prompt, max_new_tokens=40, seed=args.seed
            )
            self.active = bool(text)  # what did not work once will not later
            if not text:
                return
            self.rows.append(json.dumps({"step": state.global_step, "text": text}) + "\n")
            with no_reason_to_stop(str(self.path)):
                replace_file(self.path, "".join(self.rows).encode())
            if not args.disable_tqdm:
                lines, asked = (
                    [line for line in part.splitlines() if line.strip()]
                    for part in (text, self.prompt)
                )
                first = max(0, len(asked) - 2)  # of a prompt of many lines only the last
                with no_reason_to_stop("A sample"):
                    shown = "\n".join(f"  | {line}" for line in lines[first : first + 3])
                    tqdm.write(printable(shown))


def _step_of(row: str) -> float:
    """Return the step of a line of samples.jsonl; of what is not such a line, infinity."""
    try:
        return float(json.loads(row)["step"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf


def draw_sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    seed: int,
) -> str:
    """Return the prompt with what the model makes of it, in fewer tokens where room is short.

    Where it cannot be done, because the prompt fills the context or the weights have become NaN, a
    warning says why and the result is empty: no training fails for it. No random number generator
    moves.
    """
    was_training, devices = model.training, [] if model.device.type == "cpu" else [model.device]
    try:
        room = model.config.max_position_embeddings - max(1, len(tokenizer(prompt)["input_ids"]))
        with torch.random.fork_rng(devices, device_type=model.device.type):
            torch.manual_seed(seed)
            [text] = generate_text(
                model.eval(),
                tokenizer,
                prompt,
                max_new_tokens=max(1, min(max_new_tokens, room)),
                temperature=0.7,
            )
        return text
    except (ValueError, RuntimeError) as error:
        logger.warning_once(f"There is no sample of what the model writes: {error}")
        return ""
    finally:
        model.train(was_training)


class PlotCallback(TrainerCallback):
    """Keep loss.png in the output folder up to date, for at most 2 % of the time."""

    def __init__(self, speed: SpeedCallback):
        self.speed = speed

    def on_train_begin(self, args, state, control, **kwargs):
        self.cost = 0.6  # seconds; the first time matplotlib has to be imported too
        self.drawn = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **kwargs):
        start = time.perf_counter()
        due = start - self.drawn > 50 * self.cost
        if not (due and state.is_world_process_zero and "loss" in (logs or {})):
            return
        with self.speed.paused():
            path = Path(args.output_dir) / "loss.png"
            with no_reason_to_stop(str(path)):
                plot_losses(state.log_history, path, title=f"{path.parent.name}: loss")
        self.drawn = time.perf_counter()
        self.cost = self.drawn - start
