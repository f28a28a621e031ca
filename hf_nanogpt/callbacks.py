"""What one sees of a training run: the progress bar with its figures, and the plot of the loss."""

import time
from pathlib import Path

from tqdm.auto import tqdm
from transformers import TrainerCallback

BLUE, ORANGE, GREY = "#2563eb", "#ea580c", "#6b7280"


class ProgressCallback(TrainerCallback):
    """Show one bar with the running loss, and one line for each evaluation."""

    def __init__(self):
        self.bar = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc="Training",
                delay=0,  # shown from the start, whatever the command line has set
                dynamic_ncols=True,
            )
            self.started, self.tokens_before = time.perf_counter(), state.num_input_tokens_seen

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is None or not logs:
            return
        seconds = time.perf_counter() - self.started
        tokens = state.num_input_tokens_seen
        speed = (tokens - self.tokens_before) / seconds
        if "loss" in logs:
            self.bar.set_postfix_str(f"loss {logs['loss']:.3f}, {speed:,.0f} tokens/s")
        if "eval_loss" in logs:
            bits = logs.get("eval_bits_per_byte")
            self.bar.write(
                f"step {state.global_step:>6,} | {_count(tokens):>7} tokens | "
                f"validation loss {logs['eval_loss']:.4f}"
                + (f" | {bits:.4f} bits per byte" if bits is not None else "")
                + f" | {seconds:,.0f} s"
            )

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _count(number: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:.0f}"


def plot_losses(log_history: list[dict], path: str | Path, *, title: str = "") -> None:
    """Draw training and validation loss against tokens seen, from `TrainerState.log_history`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    def series(key: str) -> tuple[list[float], list[float]]:
        rows = [row for row in log_history if key in row]
        tokens = [row.get("num_input_tokens_seen", row["step"]) for row in rows]
        return tokens, [row[key] for row in rows]

    figure = Figure(figsize=(7.2, 4.2), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    train, validation = series("loss"), series("eval_loss")
    axes.plot(*train, color=BLUE, alpha=0.55, linewidth=1.3, label="training")
    axes.plot(*validation, color=ORANGE, linewidth=2, marker="o", markersize=4, label="validation")
    if validation[1]:
        axes.annotate(
            f"{validation[1][-1]:.3f}",
            (validation[0][-1], validation[1][-1]),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            color=ORANGE,
            weight="bold",
        )
    axes.set(xlabel="tokens seen", ylabel="loss (nats per token)", title=title)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.04)
    axes.grid(color=GREY, alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
