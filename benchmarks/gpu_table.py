"""The table and the plot of what gpu.py has measured."""

from pathlib import Path
from statistics import median
from typing import Any

import gpu_decoding
import gpu_shakespeare
import gpu_training


def as_table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in [columns, *rows]]
    lines.insert(1, "|---" * len(columns) + "|")
    return "\n".join(lines) + "\n"


def explain(row: dict[str, Any]) -> str | None:
    """Return why a row has no figures, if it has none."""
    problem = row.get("absent") or row.get("error") or row.get("failed")
    return problem and problem.splitlines()[-1][:160].replace("|", "/")


def show_training(rows: dict[str, dict]) -> str:
    cells = []
    base = rows.get(gpu_training.BASE, {}).get("tokens_per_second")
    for name, row in rows.items():
        if problem := explain(row):
            cells.append([name, problem, "", "", "", "", ""])
            continue
        peak = row["peak_bytes"]
        cells.append(
            [
                name,
                f"{row['tokens_per_second']:,.0f}",
                f"{row['mfu']:.1%}",
                f"{row['tokens_per_second'] / base:.2f}" if base else "",
                f"{median(row['step_ms']):.2f} ({min(row['step_ms']):.2f} to "
                f"{max(row['step_ms']):.2f})",
                f"{median(row['optimizer_ms']):.2f}",
                f"{peak / 2**30:.1f} GiB" if peak else "",
            ]
        )
    columns = ["", "tokens/s", "share of 989 TFLOP/s", "speed, the first = 1", "step, ms"]
    return as_table([*columns, "of it optimizer, ms", "peak memory"], cells)


def show_decoding(rows: dict[str, dict]) -> str:
    base = rows.get(gpu_decoding.BASE, {}).get("tokens_per_second", {})
    batches = list(next((r["tokens_per_second"] for r in rows.values() if not explain(r)), {}))
    cells = []
    for name, row in rows.items():
        speeds = row.get("tokens_per_second", {})
        line = [name, *("" for _ in batches), explain(row) or ""]
        for i, batch in enumerate(batches):
            if batch in speeds:
                ratio = median(speeds[batch]) / median(base[batch]) if batch in base else 0
                line[1 + i] = f"{median(speeds[batch]):,.0f} ({ratio:.2f})"
        cells.append(line)
    headings = [f"{batch} text{'s' * (batch > 1)}: tokens/s (Qwen3 = 1)" for batch in batches]
    return as_table(["", *headings, "note"], cells)


def show_shakespeare(rows: dict[str, dict]) -> str:
    cells = []
    for name, row in rows.items():
        if problem := explain(row):
            cells.append([name, problem, "", "", "", ""])
            continue
        seconds = f"{row['seconds'] or 0:.1f} s"
        if name.startswith("nanoGPT") and not row["reached"]:
            seconds = f"not reached after {row['stopped_after']:.0f} s"
        reached = "yes" if row["loss"] <= gpu_shakespeare.TARGET else "no"
        note = f"{row['iteration_ms']:.1f} ms an iteration" if row.get("iteration_ms") else ""
        tokens = f"{row['steps']:,} / {row['tokens'] / 1e6:.1f} M"
        cells.append([name, f"{row['loss']:.4f}", reached, seconds, tokens, note])
    columns = ["", "loss", f"<= {gpu_shakespeare.TARGET}", "whole process", "steps / tokens"]
    return as_table([*columns, "note"], cells)


def show_others(run: Any) -> str:
    lines = []
    for part in ("muon_vs_adamw", "trainer_overhead", "data_loader", "gpu_tests"):
        for name, row in run.rows.get(part, {}).items():
            text = explain(row)
            if not text and part == "muon_vs_adamw":
                tokens, losses = row["tokens"], row["loss"]
                middle = len(losses) // 2
                text = f"loss {losses[middle]:.4f} after {tokens[middle]:,} tokens, "
                text += f"{losses[-1]:.4f} after {tokens[-1]:,}"
            elif not text and part == "trainer_overhead":
                text = ", ".join(f"{ms:+.2f}" for ms in row["added_ms"]) + " ms a step, by round"
            elif not text and part == "data_loader":
                speeds = row["tokens_per_second"].items()
                text = ", ".join(f"{n} workers {speed / 1e6:.1f} M tokens/s" for n, speed in speeds)
            elif not text:
                text = "; ".join([row["summary"], *row["failures"]])
            lines.append([part, name, text or ""])
    return as_table(["part", "", "result"], lines)


def show(run: Any) -> str:
    machine = ", ".join(f"{k} {v}" for k, v in run.machine.items() if v is not None)
    tokens = run.sizes.rows * run.sizes.accumulation * run.sizes.model["block_size"]
    parts = [f"{'REHEARSAL, no figures. ' * run.rehearse}{machine}\n"]
    if rows := run.rows.get("train_124m"):
        how = f"{run.sizes.rows} rows x {run.sizes.accumulation} = {tokens:,} tokens a step"
        parts += [f"**Training**, {how}; medians of {run.sizes.rounds} turns", show_training(rows)]
    if rows := run.rows.get("decoding"):
        parts += ["**Decoding**, greedy, prompts as long as what is new", show_decoding(rows)]
    if rows := run.rows.get("shakespeare"):
        parts += ["**Characters of Shakespeare**", show_shakespeare(rows)]
    parts += ["**Others**", show_others(run)]
    return "\n".join(parts)


def plot_optimizers(rows: dict[str, dict[str, Any]], path: Path, *, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name, row in rows.items():
        if not explain(row):
            axes.plot(row["tokens"], row["loss"], label=f"{name}: {row['loss'][-1]:.3f}")
    axes.set(xlabel="tokens", ylabel="validation loss, nats per token", title=title)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
