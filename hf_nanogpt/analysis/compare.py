"""Several checkpoints side by side: a table and a plot of how well they do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.loading import check_checkpoint, load_checkpoint
from ..evaluation import evaluate
from ..quantization import quantize_model
from .tasks import TaskScore, check_lm_eval, evaluate_tasks


@dataclass(frozen=True)
class Comparison:
    """The rows of a table, headings first, and what to plot: {"bits per byte": {"a": 1.41}}."""

    rows: list[list[str]]
    figures: dict[str, dict[str, float]]


def compare_on_text(
    checkpoints: Sequence[str], data: str, *, quantize: bool = False, **settings: Any
) -> Comparison:
    """Evaluate each checkpoint, with int8 weights if asked; `settings` are those of `evaluate`."""
    _check_all(checkpoints)
    rows = [["checkpoint", "loss", "perplexity", "bits per byte", "tokens", "bytes"]]
    bits = {}
    for name in checkpoints:
        model, tokenizer = _load(name, quantize)
        result = evaluate(model, data, tokenizer=tokenizer, **settings)
        losses = f"{result.loss:.4f}", f"{result.perplexity:.2f}", f"{result.bits_per_byte:.4f}"
        rows.append([name, *losses, f"{result.num_tokens:,}", f"{result.num_bytes:,}"])
        bits[name] = result.bits_per_byte
    if not settings.get("document_mask", True):  # say so: the figures are not those with the mask
        rows = [[*row, "see each other" if i else "documents"] for i, row in enumerate(rows)]
    return Comparison(rows, {"bits per byte, lower is better": bits})


def compare_on_tasks(
    checkpoints: Sequence[str], tasks: Sequence[str], *, quantize: bool = False, **settings: Any
) -> Comparison:
    """Evaluate each checkpoint on tasks; `settings` are those of `evaluate_tasks`."""
    check_lm_eval()
    _check_all(checkpoints)
    results = {}
    for name in checkpoints:
        model, tokenizer = _load(name, quantize)
        results[name] = evaluate_tasks(model, tasks, tokenizer=tokenizer, **settings)
    rows, figures = [["task", *results]], {}
    for scores in zip(*results.values(), strict=True):  # each checkpoint's score on one task
        name = f"{scores[0].task} {scores[0].metric}"
        figures[name] = {who: score.value for who, score in zip(results, scores, strict=True)}
        rows.append([name, *map(_format_score, scores)])
    return Comparison(rows, figures)


def _format_score(score: TaskScore) -> str:
    return f"{score.value:.4f}" + ("" if score.stderr is None else f" ± {score.stderr:.4f}")


def _check_all(checkpoints: Sequence[str]) -> None:
    """Refuse a wrong name before the first checkpoint has taken minutes."""
    for name in checkpoints:
        check_checkpoint(name)


def _load(checkpoint: str, quantize: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = load_checkpoint(checkpoint)
    return (quantize_model(model.float()) if quantize else model), tokenizer


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Align rows of cells, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *aligned]).rstrip())
    return "\n".join(lines)
