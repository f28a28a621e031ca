"""What a measurement belongs to: the date, the commit, the versions and the processor."""

import datetime
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path


def describe_machine() -> dict[str, object]:
    """Return the header of a results file, as JSON has it."""
    names = ("torch", "transformers", "accelerate", "datasets", "tokenizers")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in names},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
