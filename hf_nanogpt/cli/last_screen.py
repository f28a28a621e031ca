"""The last screen of a training: its figures in words, samples, and what to do next."""

import itertools
import shlex
import shutil
import textwrap
from typing import Any

_FIGURES = [
    ("validation loss", "eval_loss", ".4f", "nats per token"),
    ("perplexity", "perplexity", ".2f", ""),
    ("bits per byte", "bits_per_byte", ".4f", ""),
]
_LINES = 3  # of each sample


def render_last_screen(result: Any, program: str) -> str:
    """Return what `train` prints at the end; `program` is how it was called."""
    folder, metrics = result.output_dir, result.metrics
    start = f"generate {folder} {_quote(result.prompt)}"
    if metrics["is_chat"]:
        start = f"chat {folder}"
    width = min(shutil.get_terminal_size().columns, 100)
    words = textwrap.fill(" ".join(_tell(metrics)), width, break_on_hyphens=False)
    return f"""
{folder} is ready:
{_tabulate(metrics)}

{words}

{_show_samples(result)}Next:
  {program} {start}
  {program} eval {folder} --data YOUR_TEXT
  {program} info {folder}"""


def _tabulate(metrics: dict[str, Any]) -> str:
    rows = {
        "parameters": f"{metrics['num_parameters']:,}",
        "tokens": f"{metrics['train_tokens']:,}",
        "time": f"{metrics['train_seconds']:,.0f} s",
    }
    if "tokens_per_second" in metrics:
        mfu = f" (MFU {metrics['mfu']:.0%})" if "mfu" in metrics else ""
        rows["tokens/s"] = f"{metrics['tokens_per_second']:,.0f}{mfu}"
    before = metrics.get("before")  # when training started from a checkpoint
    if before:
        rows["held-out text"] = f"{'before':>12} {'after':>12}"
    for name, key, form, unit in _FIGURES:
        value = metrics[key]
        figure = f"{before[key]:>12{form}} {value:>12{form}}" if before else f"{value:{form}}"
        rows[name] = f"{figure} {unit}".rstrip()
    return "\n".join(f"  {name:<16} {value}" for name, value in rows.items())


def _tell(metrics: dict[str, Any]) -> list[str]:
    """Return the figures as sentences."""
    told = [f"It needs {metrics['bits_per_byte']:.2f} bits per byte of text that it has not seen."]
    if fresh := metrics.get("fresh_half"):
        told[0] = told[0].removesuffix(".") + (
            f", {fresh['bits_per_byte']:.2f} on the half of it that did not choose the weights."
        )
    if ngram := metrics.get("ngram"):
        told += _compare(metrics, ngram)
    if forgotten := metrics.get("old_text"):
        told.append(
            f"On the text it was trained on before ({forgotten['data']}), it needs "
            f"{forgotten['after']:.2f} bits per byte, and needed {forgotten['before']:.2f}."
        )
    return [*told, *_tell_choice(metrics)]


def _compare(metrics: dict[str, Any], ngram: dict[str, Any]) -> list[str]:
    kept, last = metrics["kept_step"], metrics["train_steps"]
    counted, measured = (ngram[f"{name}_characters"] for name in ("counted", "measured"))
    told = [
        f"A {ngram['order']}-gram model, which counts {_count(counted)} of the same text, needs "
        f"{ngram['bits_per_byte']:.2f} (on {_count(measured)} of the held-out text)."
    ]
    if metrics["bits_per_byte"] < ngram["bits_per_byte"]:
        return told
    advice = [] if kept < last else ["train longer (--max_steps)"]
    advice.append("give it more text")
    if not metrics["start_from"]:
        advice.append("start from a trained checkpoint (train finetune --from CHECKPOINT)")
    return [*told, f"So the model is worse than counting: {', or '.join(advice)}."]


def _count(characters: int) -> str:
    if characters < 1_000_000:
        return f"{characters:,} characters"
    return f"{characters / 1e6:.1f} million characters"


def _tell_choice(metrics: dict[str, Any]) -> list[str]:
    """Say which weights were kept, and whether they were chosen by the text that measures them."""
    kept, last, planned = (metrics[n] for n in ("kept_step", "train_steps", "planned_steps"))
    told = []
    if last < planned:
        told.append(f"Training stopped early, after step {last:,} of {planned:,}.")
    if kept == 0:
        told.append("No step made the held-out loss lower: the weights are those of the start.")
    elif kept < last:
        told.append(f"The weights are those of step {kept:,}, where the held-out loss was lowest.")
    if kept < last and "fresh_half" not in metrics:
        told.append("The held-out text took part in this choice, which favours them.")
    return told


def _quote(text: str) -> str:
    """Return text as an argument of a shell, in the quotes that are easier to read.

    >>> print(_quote("that's"), _quote("for $5"))
    "that's" 'for $5'
    """
    if "'" in text and not set(text) & set('"$`\\!'):
        return f'"{text}"'
    return shlex.quote(text)


def _show_samples(result: Any) -> str:
    if not result.sample:
        return ""
    asked, cut = f"from {result.prompt!r}:\n", ""
    if result.question:  # of a chat: it comes once, above the answers
        question = _mark(_wrap(result.question)[-_LINES:], ">")
        asked, cut = f"in answer to:\n{question}\n\n", result.prompt
    samples = [text.removeprefix(cut) for text in result.metrics["samples"]]
    if before := result.metrics.get("before"):
        columns = _lay_side_by_side(before["sample"].removeprefix(cut), samples[0])
        return f"Samples before and after, {asked}{columns}\n\n"
    shown = "\n\n".join(_mark(_wrap(text)[:_LINES]) for text in samples)
    return f"Samples, {asked}{shown}\n\n"


def _wrap(text: str, width: int = 90) -> list[str]:
    return [row for line in text.splitlines() for row in textwrap.wrap(line, width)]


def _mark(lines: list[str], mark: str = "|") -> str:
    return "\n".join(f"  {mark} {line}" for line in lines)


def _lay_side_by_side(left: str, right: str) -> str:
    width = (min(shutil.get_terminal_size().columns, 120) - 7) // 2
    rows = itertools.zip_longest(_wrap(left, width), _wrap(right, width), fillvalue="")
    return "\n".join(f"  | {a:<{width}} | {b}" for a, b in rows)
