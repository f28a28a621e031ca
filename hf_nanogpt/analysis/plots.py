"""Plots: their colours, the loss of a training run, and how a picture reaches its file."""

import io
import os
from contextlib import suppress
from pathlib import Path

from ..errors import UserError

BLUE, ORANGE, GREY = "#2563eb", "#ea580c", "#6b7280"
_PICTURES = (".png", ".svg", ".pdf")


def plot_losses(log_history: list[dict], path: str | Path, *, title: str = "") -> None:
    """Draw training and validation loss against tokens seen, from `TrainerState.log_history`.

    `path` is replaced at once: a reader never sees half a picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    def series(key: str) -> tuple[list[float], list[float]]:
        rows = [row for row in log_history if key in row]
        tokens = [row.get("num_input_tokens_seen", row["step"]) for row in rows]
        return tokens, [row[key] for row in rows]

    figure = Figure(figsize=(7.2, 4.2), dpi=144, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    train, validation, bits = map(series, ("loss", "eval_loss", "eval_bits_per_byte"))
    axes.plot(*train, color=BLUE, alpha=0.55, linewidth=1.3, label="training")
    label = f"validation, at last {bits[1][-1]:.3f} bits per byte" if bits[1] else "validation"
    axes.plot(*validation, color=ORANGE, linewidth=2, marker="o", markersize=4, label=label)
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
    axes.legend(frameon=False, loc="upper right")
    picture = io.BytesIO()
    canvas.print_png(picture)
    replace_file(Path(path), picture.getvalue())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that nobody ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except OSError:
        with suppress(OSError):  # what is half written would only take room
            part.unlink(missing_ok=True)
        raise


def check_picture(path: str | Path) -> None:
    """Raise a `UserError` unless a picture can be written to `path`."""
    path = Path(path)
    if path.suffix not in _PICTURES:
        raise UserError(f"plot={path} must end in one of {', '.join(_PICTURES)}.")
    # os.path: Path.is_dir raises where a name is too long.
    if not os.path.isdir(path.parent):
        raise UserError(f"plot={path} cannot be written: there is no folder {path.parent}.")
    if os.path.isdir(path):
        raise UserError(f"plot={path} is a folder: give the path of a file.")
    part = path.with_name(f"{path.name}.part")  # as `replace_file` will write it
    try:
        part.touch()
        part.unlink()
    except OSError as error:
        raise UserError(f"plot={path} cannot be written: {error.strerror}.") from error
