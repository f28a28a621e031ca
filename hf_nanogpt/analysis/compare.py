"""Several checkpoints side by side: a table and a picture of their figures."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.folder import check_checkpoint, load_checkpoint
from ..evaluation import evaluate
from ..quantization import quantize_model
from .plots import BLUE, GREY, check_picture, replace_file
from .tasks import check_lm_eval, evaluate_tasks


@dataclass(frozen=True)
class Comparison:
    """The rows of a table, heads first, and what to draw: {"bits per byte": {"runs/a": 1.41}}."""

    rows: list[list[str]]
    figures: dict[str, dict[str, float]]


def compare_on_text(
    checkpoints: Sequence[str], data: str, *, quantize: bool = False, **settings: Any
) -> Comparison:
    """Measure each checkpoint, if asked with int8 weights; `settings` are those of `evaluate`."""
    for name in checkpoints:  # before the first has taken its minutes
        check_checkpoint(name)
    rows = [["checkpoint", "loss", "perplexity", "bits per byte", "tokens", "bytes"]]
    bits = {}
    for name in checkpoints:
        model, tokenizer = _load(name, quantize)
        result = evaluate(model, data, tokenizer=tokenizer, **settings)
        losses = f"{result.loss:.4f}", f"{result.perplexity:.2f}", f"{result.bits_per_byte:.4f}"
        rows.append([name, *losses, f"{result.num_tokens:,}", f"{result.num_bytes:,}"])
        bits[name] = result.bits_per_byte
    return Comparison(rows, {"bits per byte, lower is better": bits})


def compare_on_tasks(
    checkpoints: Sequence[str], tasks: Sequence[str], *, quantize: bool = False, **settings: Any
) -> Comparison:
    """Measure each checkpoint on tasks; `settings` are those of `evaluate_tasks`."""
    check_lm_eval()
    for name in checkpoints:
        check_checkpoint(name)
    results = {}
    for name in checkpoints:
        model, tokenizer = _load(name, quantize)
        results[name] = evaluate_tasks(model, tasks, tokenizer=tokenizer, **settings)
    rows, figures = [["task", *results]], {}
    for scores in zip(*results.values(), strict=True):  # the same ones in the same order
        name = f"{scores[0].task} {scores[0].metric}"
        figures[name] = {who: x.value for who, x in zip(results, scores, strict=True)}
        errors = ("" if x.stderr is None else f" ± {x.stderr:.4f}" for x in scores)
        rows.append([name, *(f"{x.value:.4f}{e}" for x, e in zip(scores, errors, strict=True))])
    return Comparison(rows, figures)


def _load(checkpoint: str, quantize: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = load_checkpoint(checkpoint)
    return (quantize_model(model.float()) if quantize else model), tokenizer


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Align rows of cells, the first of which are the heads: the first column to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def plot_comparison(figures: dict[str, dict[str, float]], path: str | Path) -> None:
    """Draw one panel of bars for each figure, those of a `Comparison`.

    Raises:
        UserError: `path` does not end in .png, .svg or .pdf.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    check_picture(path)
    bars = sum(len(values) for values in figures.values())
    size = (7.2, 0.3 + 0.7 * len(figures) + 0.38 * bars)
    figure = Figure(figsize=size, dpi=144, layout=ConstrainedLayoutEngine(h_pad=0.1))
    FigureCanvasAgg(figure)
    heights = [1.6 + len(values) for values in figures.values()]
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
    picture = io.BytesIO()
    figure.savefig(picture, format=Path(path).suffix[1:])
    replace_file(Path(path), picture.getvalue())
