"""The files in results/: measurements with their date, commit and machine."""

import datetime
import json
import subprocess
from pathlib import Path
from typing import Any

from hf_nanogpt.benchmark.report import describe_machine

FOLDER = Path(__file__).parent / "results"


def describe_commit() -> dict[str, str]:
    """Return today's date and the commit."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=True)
    return {"date": datetime.date.today().isoformat(), "commit": done.stdout.strip()}


def write_results(name: str, content: dict[str, Any]) -> None:
    report = describe_commit() | {"machine": describe_machine()} | content
    (FOLDER / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def read_results(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
