"""The speed of a training run, and its plot."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerState
from transformers.trainer_utils import unwrap_peft_model
from transformers.utils import logging

from ..analysis.plots import plot_losses
from ..configuration_nanogpt import NanoGPTConfig
from ..flops import count_flops, find_peak

logger = logging.get_logger(__name__)


@contextmanager
def warn_if_unwritable(what: str) -> Iterator[None]:
    """Warn, and let training continue, if something that only shows it cannot be written."""
    try:
        yield
    except (OSError, UnicodeError) as error:
        logger.warning_once(f"{what} could not be written; training continues: {error}")


class SpeedCallback(TrainerCallback):
    """Count tokens and the time of training steps, without evaluation, checkpoints and samples.

    `context_length` is the length of the training blocks, by default the model's. MFU (model FLOPs
    utilisation) is the share of the device's peak that the model's own FLOPs use, see
    `count_flops` and `find_peak`; it is left out if one of them is unknown.
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
        """Leave out the time of the block."""
        self._count()  # the time until here is training
        yield
        self.mark = time.perf_counter()

    def read(self, state: TrainerState) -> dict[str, float]:
        """Return `tokens_per_second` and `mfu` since the last reading."""
        self._count()
        since, self.last_read = self.last_read, (state.num_input_tokens_seen, self.seconds)
        return self._measure(*since, state)

    def summarize(self, state: TrainerState) -> dict[str, float]:
        """Return `tokens_per_second` and `mfu` since training was started or resumed."""
        return self._measure(self.start, 0.0, state)

    def _measure(self, tokens: int, seconds: float, state: TrainerState) -> dict[str, float]:
        """Return the figures since a number of tokens and seconds."""
        if state.num_input_tokens_seen == tokens:  # not counted, or resumed at the end
            return {}
        speed = (state.num_input_tokens_seen - tokens) / max(self.seconds - seconds, 1e-9)
        mfu = {} if self.share is None else {"mfu": round(speed * self.share, 4)}
        if mfu and mfu["mfu"] > 1:  # the peak was measured while the machine was busy
            mfu = {}
        return {"tokens_per_second": round(speed, 1), **mfu}


def _share_per_token(args, model: PreTrainedModel, context_length: int | None) -> float | None:
    """Return the FLOPs of training on one token over the peak FLOP/s of all devices."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    model = unwrap_peft_model(model)
    # FLOPs are known for our models only, and the peak for some devices only.
    is_ours = getattr(getattr(model, "config", None), "model_type", "") == NanoGPTConfig.model_type
    peak = find_peak(args.device, dtype) if is_ours else None
    if peak is None:
        return None
    devices = args.world_size * max(1, args.n_gpu)
    # Each product takes a forward pass, the gradient of what comes in, and that of its weight if it
    # is trained: a frozen one saves a pass.
    frozen = sum(
        layer.weight.numel()
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear)
        and not layer.weight.requires_grad
        and not name.endswith(".original_module")  # of PEFT, which is not used
    )
    flops = 3 * count_flops(model, context_length=context_length) - 2 * frozen
    return flops / (peak * devices)


class PlotCallback(TrainerCallback):
    """Keep loss.png in the output folder up to date, in at most 2 % of the time."""

    def __init__(self, speed: SpeedCallback):
        self.speed = speed

    def on_train_begin(self, args, state, control, **kwargs):
        self.cost = 0.6  # seconds: the first time, matplotlib has to be imported
        self.drawn = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **kwargs):
        # A plot that took 1 second is followed by the next after 50 seconds.
        start = time.perf_counter()
        due = start - self.drawn > 50 * self.cost
        if not (due and state.is_world_process_zero and "loss" in (logs or {})):
            return
        with self.speed.paused():
            path = Path(args.output_dir) / "loss.png"
            with warn_if_unwritable(str(path)):
                plot_losses(state.log_history, path, title=f"{path.parent.name}: loss")
        self.drawn = time.perf_counter()
        self.cost = self.drawn - start
