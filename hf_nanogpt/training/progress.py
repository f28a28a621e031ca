"""What a training run prints: a bar in a terminal, and a line now and then anywhere else."""

import sys
import time
from datetime import timedelta

from tqdm import tqdm
from transformers import TrainerCallback

from .callbacks import warn_if_unwritable

_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
_SECONDS = 10  # between two lines in a file, a pipe or a notebook


def show(text: str) -> None:
    """Print lines above the bar, if there is one."""
    tqdm.write(text)
    sys.stdout.flush()  # keep the lines of a file in order


class ProgressCallback(TrainerCallback):
    """Show the running loss, the speed and the time that is left; and a line per evaluation.

    In a terminal this is one bar. A file, a pipe or a notebook gets lines, which can be read later.
    """

    # Before a training begins, an evaluation may log, and a failure may end it.
    active = False
    bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.active = state.is_world_process_zero
        self.started = self.printed = time.perf_counter()
        self.first_step = state.global_step
        self.figures = ""
        self.bar = None
        if self.active and sys.stderr.isatty():
            with warn_if_unwritable("The progress bar"):
                self.bar = tqdm(
                    total=state.max_steps,
                    initial=state.global_step,
                    desc="Training",
                    delay=0,  # show it from the start, whatever the command line has set
                    dynamic_ncols=True,
                    bar_format=_BAR,
                )

    def on_step_end(self, args, state, control, **kwargs):
        if not self.active:
            return
        with warn_if_unwritable("The progress"):
            if self.bar is not None:
                self.bar.set_postfix_str(self._describe(state), refresh=False)
                self.bar.update(state.global_step - self.bar.n)
            elif time.perf_counter() - self.printed >= _SECONDS:
                self.printed = time.perf_counter()
                show(f"step {state.global_step:,} of {state.max_steps:,}, {self._describe(state)}")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not self.active or not logs:
            return
        if "loss" in logs:
            figures = [f"loss {logs['loss']:.3f}"]
            if "tokens_per_second" in logs:
                figures.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
            if "mfu" in logs:
                figures.append(f"MFU {logs['mfu']:.0%}")
            self.figures = ", ".join(figures) + ", "
        if "eval_loss" in logs:
            tokens = tqdm.format_sizeof(state.num_input_tokens_seen)  # such as 1.43M
            bits = logs.get("eval_bits_per_byte")
            with warn_if_unwritable("The progress"):
                show(
                    f"step {state.global_step:>6,} | {tokens:>7} tokens | "
                    f"validation loss {logs['eval_loss']:.4f}"
                    + (f" | {bits:.4f} bits per byte" if bits is not None else "")
                    + f" | {time.perf_counter() - self.started:,.0f} s"
                )

    def on_train_end(self, args, state, control, **kwargs):
        self.active = False  # what comes now is not progress
        if self.bar is not None:
            with warn_if_unwritable("The progress"):
                self.bar.close()
            self.bar = None

    def _describe(self, state) -> str:
        """Return the running figures and the time left, evaluations and samples included."""
        elapsed = time.perf_counter() - self.started
        done = max(1, state.global_step - self.first_step)
        left = elapsed / done * (state.max_steps - state.global_step)
        return f"{self.figures}{timedelta(seconds=round(left))} left"
