"""A benchmark's report: the machine it ran on, its table, its plot, its file."""

import json
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from .. import __version__
from ..analysis.plots import BLUE, GREY
from ..checkpoint.folder import check_writable, staged_folder
from ..errors import UserError


def check_counts(settings: dict[str, int], num_threads: int | None) -> None:
    """Raise a `UserError` for a count below 1; then set torch's threads, if a number is given."""
    threads = {} if num_threads is None else {"num_threads": num_threads}
    for name, value in (settings | threads).items():
        if value < 1:
            raise UserError(f"{name}={value} is not possible: give 1 or more.")
    if num_threads is not None:
        torch.set_num_threads(num_threads)


def describe_machine() -> dict[str, Any]:
    """Return what a figure depends on besides the code: processor, threads, load and versions."""
    packages = ("torch", "transformers", "accelerate")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _name_cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "hf_nanogpt": __version__,
    }


def _name_cpu() -> str:
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def summarize(values: list[float]) -> list[float]:
    """Return the least, the median and the largest."""
    return [min(values), median(values), max(values)]


def format_report(report: dict[str, Any]) -> str:
    """Return the report of `benchmark_training` as a table to print."""
    lines = [f"{'':<32}{'tokens/s':>9}{'MFU':>6}   speed, ours of the shape = 1"]
    for row in report["rows"]:
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.0%}"
        least, middle, largest = row["speed_to_ours"]
        alone = row["name"] == row["compared_with"]
        ratio = "1" if alone else f"{middle:.3f} ({least:.3f} to {largest:.3f})"
        lines.append(f"{row['name']:<32}{row['tokens_per_second']:>9,.0f}{mfu:>6}   {ratio}")
    peak = report["peak_flops"]
    notes = {
        "settings": ", ".join(f"{name} {value}" for name, value in report["settings"].items()),
        "peak": "unknown" if peak is None else f"{peak / 1e9:,.0f} GFLOP/s in matrix products",
        "Trainer adds": _spread(report["trainer_overhead_ms"]),
        "a batch takes": _spread(report["batch_ms"]),
        "machine": ", ".join(f"{k} {v}" for k, v in report["machine"].items() if v is not None),
    }
    lines += ["", *(f"{name:<14} {note}" for name, note in notes.items())]
    if (load := report["machine"]["load_average"]) > 1:
        lines.append(f"Other programs ran too (load average {load}): repeat it when they do not.")
    return "\n".join(lines)


def _spread(milliseconds: list[float]) -> str:
    least, middle, largest = milliseconds
    return f"{middle:.2f} ms per step ({least:.2f} to {largest:.2f})"


def prepare_output(folder: str | Path, *, name: str) -> None:
    """Raise a `UserError` unless `save_report` can write there without replacing anything."""
    check_writable(Path(folder), name="output")
    if taken := [path for path in _name_files(Path(folder), name) if path.exists()]:
        raise UserError(f"output={folder} has {taken[0].name} already: choose another folder.")


def save_report(
    report: dict[str, Any], folder: str | Path, *, plot: Callable[[dict[str, Any], Path], None]
) -> list[Path]:
    """Write bench_NAME.json and bench_NAME.png, NAME being the benchmark's; return their paths."""
    folder, name = Path(folder), report["benchmark"]
    with staged_folder(folder) as staged:
        file, picture = _name_files(staged, name)
        file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        plot(report, picture)
    return _name_files(folder, name)


def _name_files(folder: Path, name: str) -> list[Path]:
    return [folder / f"bench_{name}.{kind}" for kind in ("json", "png")]


def plot_training(report: dict[str, Any], path: Path) -> None:
    """Draw tokens per second as bars, with the range of the rounds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    rows, settings, machine = report["rows"], report["settings"], report["machine"]
    tokens = settings["batch_size"] * settings["block_size"]
    speeds = [summarize([tokens / s for s in row["seconds_per_step"]]) for row in rows]
    below, above = [m - low for low, m, _ in speeds], [high - m for _, m, high in speeds]
    figure = Figure(figsize=(7.2, 1.2 + 0.45 * len(rows)), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.barh(
        [row["name"] for row in rows],
        [middle for _, middle, _ in speeds],
        xerr=[below, above],
        color=[BLUE if row["name"].startswith("ours") else GREY for row in rows],
        error_kw={"capsize": 3},
    )
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(xlabel="tokens per second in training steps")
    axes.set_title(f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
