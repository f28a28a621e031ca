"""Show that the short test suite finds faults: put each one in, and see a test of it fail.

Each fault is one that people have made, or that no generic test of transformers notices. It is put
into a copy of the package, and the file of tests named beside it runs as `make test` would run it.

Run: python tests/seeded_faults.py [NUMBER ...]
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
COPIED = ("hf_nanogpt", "tests", "examples", "benchmarks", "assets", "pyproject.toml", "README.md")


@dataclass(frozen=True)
class Fault:
    """One text of one file, what replaces it, and the tests that must notice."""

    what: str
    file: str
    right: str
    wrong: str
    tests: str


FAULTS = [
]


def finds(fault: Fault) -> str | None:
    """Return the first test that fails with the fault in place, or None."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source, target = ROOT / name, copy / name
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        path = copy / "hf_nanogpt" / fault.file
        text = path.read_text(encoding="utf-8")
        assert text.count(fault.right) == 1, f"{fault.file} does not have once: {fault.right}"
        path.write_text(text.replace(fault.right, fault.wrong), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, *(f"tests/{name}.py" for name in fault.tests.split())],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
            check=False,
        )
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0] if failed else None


def main() -> None:
    """Print a line for each fault; exit with 1 if one was not found."""
    chosen = [int(number) for number in sys.argv[1:]] or range(1, len(FAULTS) + 1)
    missed = 0
    for number in chosen:
        fault, started = FAULTS[number - 1], time.monotonic()
        found = finds(fault)
        missed += found is None
        seconds = time.monotonic() - started
        print(f"{number:2} {fault.what}: {found or 'NOT FOUND'} ({seconds:.0f} s)", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults were found.")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
