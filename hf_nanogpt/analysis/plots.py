"""Plots: losses of a training run, comparisons and benchmarks, and how a plot is saved."""

import io
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from ..errors import UserError

BLUE, ORANGE, GREY = "#2563eb", "#ea580c", "#6b7280"
_FORMATS = (".png", ".svg", ".pdf")


def plot_losses(
    log_history: list[dict],
    path: str | Path,
    *,
    title: str = "",
    final: tuple[int, float] | None = None,
) -> None:
    """Draw training and validation loss against tokens seen, from `TrainerState.log_history`.

    `final` is what the whole held-out text gave, drawn as one filled point: tokens seen and loss.
    All others are then marked as estimates.
    """
    from matplotlib.ticker import EngFormatter

    def series(key: str) -> tuple[list[float], list[float]]:
        rows = [row for row in log_history if key in row]
        tokens = [row.get("num_input_tokens_seen", row["step"]) for row in rows]
        return tokens, [row[key] for row in rows]

    figure = _new_figure(4.2)
    axes = figure.subplots()
    train, validation = map(series, ("loss", "eval_loss"))
    # A curve without points has no label. A short run may have logged no training loss.
    label = "training" if train[0] else ""
    axes.plot(*train, color=BLUE, alpha=0.55, linewidth=1.3, label=label)
    label = ("validation, estimated" if final else "validation") if validation[0] else ""
    open_circles = {"marker": "o", "markersize": 4, "markerfacecolor": "white"}
    axes.plot(*validation, color=ORANGE, linewidth=2, label=label, **open_circles)
    if final:
        tokens, loss = final
        label = f"validation, all of it: {loss:.3f}"
        axes.plot([tokens], [loss], color=ORANGE, marker="D", linestyle="none", label=label)
    axes.set(xlabel="tokens seen", ylabel="loss (nats per token)", title=title)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.04)
    axes.grid(color=GREY, alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower center", ncols=3)  # clear of the curves
    save_figure(figure, path)


def plot_comparison(figures: dict[str, dict[str, float]], path: str | Path) -> None:
    """Draw a `Comparison`: one panel for each figure, one bar for each checkpoint.

    Raises:
        UserError: `path` does not end in .png, .svg or .pdf.
    """
    check_picture(path)
    bars = [len(values) for values in figures.values()]
    figure = _new_figure(0.3 + 0.7 * len(figures) + 0.38 * sum(bars), h_pad=0.1)
    heights = [1.6 + count for count in bars]
    panels = figure.subplots(len(figures), squeeze=False, height_ratios=heights)
    for axes, (name, values) in zip(panels[:, 0], figures.items(), strict=True):
        drawn = axes.barh(range(len(values)), list(values.values()), color=BLUE, height=0.7)
        axes.bar_label(drawn, fmt="%.3f", padding=4, color=GREY)
        axes.set_yticks(range(len(values)), list(values))
        axes.invert_yaxis()
        axes.set_title(name, fontsize=10, loc="left", weight="bold")
        axes.margins(x=0.12)
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    save_figure(figure, path)


def plot_training(report: dict[str, Any], path: str | Path) -> None:
    """Draw the report of `benchmark_training`: tokens per second, with the range of the rounds."""
    from matplotlib.ticker import EngFormatter

    rows, settings = report["rows"], report["settings"]
    tokens = settings["batch_size"] * settings["block_size"]
    speeds = [_rank_speeds(tokens, row["seconds_per_step"]) for row in rows]
    middle = [median(speed) for speed in speeds]
    below = [m - speed[0] for m, speed in zip(middle, speeds, strict=True)]
    above = [speed[-1] - m for m, speed in zip(middle, speeds, strict=True)]
    colors = [BLUE if row["name"].startswith("ours") else GREY for row in rows]
    figure = _new_figure(1.2 + 0.45 * len(rows))
    axes = figure.subplots()
    names = [row["name"] for row in rows]
    axes.barh(names, middle, xerr=[below, above], color=colors, error_kw={"capsize": 3})
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(xlabel="tokens per second in training steps")
    axes.set_title(_name_machine(report), fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def plot_generation(report: dict[str, Any], path: str | Path) -> None:
    """Draw the report of `benchmark_generation`: tokens per second against the text's length."""
    from matplotlib.ticker import ScalarFormatter

    figure, batch = _new_figure(4.2), report["settings"]["batch_size"]
    axes = figure.subplots()
    for row in report["rows"]:
        lengths = [int(length) for length in row["seconds_per_token"]]
        speeds = [_rank_speeds(batch, seconds) for seconds in row["seconds_per_token"].values()]
        axes.plot(lengths, [median(speed) for speed in speeds], marker="o", label=row["name"])
        lowest, highest = ([speed[end] for speed in speeds] for end in (0, -1))
        axes.fill_between(lengths, lowest, highest, alpha=0.15)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_ylim(bottom=0)
    axes.set(xlabel="tokens of text, prompt included", ylabel="tokens per second")
    axes.set_title(f"{_name_machine(report)}, batch {batch}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, path)


def _rank_speeds(tokens: int, seconds: Sequence[float]) -> list[float]:
    return sorted(tokens / taken for taken in seconds)


def _name_machine(report: dict[str, Any]) -> str:
    machine = report["machine"]
    gpu = machine["gpu"] if report["benchmark"] == "train" else None  # generation runs on the CPU
    return f"{gpu or machine['cpu']}, {machine['threads']} threads"


def _new_figure(height: float, h_pad: float | None = None) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=(7.2, height), dpi=144, layout=ConstrainedLayoutEngine(h_pad=h_pad))


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a matplotlib figure in the format that the file's extension names."""
    picture = io.BytesIO()
    figure.savefig(picture, format=Path(path).suffix[1:])
    replace_file(Path(path), picture.getvalue())


def replace_file(path: Path, content: bytes) -> None:
    """Write or replace a file at once, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except OSError:
        with suppress(OSError):  # the half-written file only takes up space
            part.unlink(missing_ok=True)
        raise


def check_picture(path: str | Path) -> None:
    """Raise a `UserError` unless a plot can be written to `path`."""
    path = Path(path)
    if path.suffix not in _FORMATS:
        raise UserError(f"plot={path} must end in one of {', '.join(_FORMATS)}.")
    # os.path: Path.is_dir raises an error if a name is too long.
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
