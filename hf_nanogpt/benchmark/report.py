"""A benchmark's report: the machine it ran on, its table and its files."""

import json
import os
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from .. import __version__
from ..analysis.compare import format_table
from ..analysis.plots import replace_file
from ..checkpoint.writing import check_writable
from ..errors import UserError
from ..flops import name_processor


def describe_machine() -> dict[str, Any]:
    """Return what a figure depends on: processor, threads, load and versions."""
    packages = ("torch", "transformers", "accelerate")
    return {
        "cpu": name_processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "hf_nanogpt": __version__,
    }


def format_report(report: dict[str, Any]) -> str:
    """Return the report of `benchmark_training` as a table to print."""
    rows = [["", "tokens/s", "MFU", "speed, ours of the shape = 1"]]
    for row in report["rows"]:
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.0%}"
        ratio = _format_ratio(row, is_base=row["name"] == row["compared_with"])
        rows.append([row["name"], f"{row['tokens_per_second']:,.0f}", mfu, ratio])
    peak = report["peak_flops"]
    notes = {
        "peak": "unknown" if peak is None else f"{peak / 1e9:,.0f} GFLOP/s in matrix products",
        "Trainer adds": _format_spread(report["trainer_overhead_ms"]),
        "a batch takes": _format_spread(report["batch_ms"]),
    }
    return _format(report, rows, notes)


def format_generation(report: dict[str, Any]) -> str:
    """Return the report of `benchmark_generation` as a table to print."""
    first = report["rows"][0]
    lengths = list(first["tokens_per_second"])
    rows = [["", *map(str, lengths), "bandwidth", "same tokens", "speed, ours = 1"]]
    for row in report["rows"]:
        speeds = [f"{row['tokens_per_second'][length]:,.1f}" for length in lengths]
        share, same = row["bandwidth_share"], row["same_tokens"]
        used = "" if share is None else f"{median(share.values()):.0%}"
        ratio = _format_ratio(row, is_base=row is first)
        rows.append([row["name"], *speeds, used, "" if same is None else f"{same:.0%}", ratio])
    notes = {
        "bandwidth": f"{report['bytes_per_second'] / 1e9:,.1f} GB/s in matrix-vector products",
        "warm-up": ", ".join(f"{r['name']} {r['warm_up_seconds']:.1f} s" for r in report["rows"]),
    }
    size = f"{report['parameters'] / 1e6:,.1f} M parameters"
    title = f"Tokens per second, by length of the text ({report['model']}, {size}):"
    return f"{title}\n{_format(report, rows, notes)}"


def _format(report: dict[str, Any], rows: Sequence[Sequence[str]], notes: dict[str, str]) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items())
    machine = ", ".join(f"{k} {v}" for k, v in report["machine"].items() if v is not None)
    notes = {"settings": settings, **notes, "machine": machine}
    lines = [format_table(rows), "", *(f"{name:<14} {note}" for name, note in notes.items())]
    if (load := report["machine"]["load_average"]) > 1:
        lines.append(f"Other programs were running (load average {load}): repeat it without them.")
    return "\n".join(lines)


def _format_ratio(row: dict[str, Any], *, is_base: bool) -> str:
    lowest, middle, highest = row["speed_to_ours"]
    return "1" if is_base else f"{middle:.3f} ({lowest:.3f} to {highest:.3f})"


def _format_spread(milliseconds: Sequence[float]) -> str:
    lowest, middle, highest = milliseconds
    return f"{middle:.2f} ms per step ({lowest:.2f} to {highest:.2f})"


def prepare_output(folder: str | Path, *, name: str) -> None:
    """Raise a `UserError` unless `save_report` can write there without replacing a file."""
    check_writable(Path(folder), name="output")
    if taken := [path for path in _name_files(Path(folder), name) if path.exists()]:
        raise UserError(f"output={folder} already has {taken[0].name}: choose another folder.")


def save_report(
    report: dict[str, Any], folder: str | Path, *, plot: Callable[[dict[str, Any], Path], None]
) -> list[Path]:
    """Write bench_NAME.json and bench_NAME.png, where NAME is the benchmark; return their paths."""
    file, picture = _name_files(Path(folder), report["benchmark"])
    plot(report, picture)
    replace_file(file, f"{json.dumps(report, indent=2)}\n".encode())
    return [file, picture]


def _name_files(folder: Path, name: str) -> list[Path]:
    return [folder / f"bench_{name}.{extension}" for extension in ("json", "png")]
