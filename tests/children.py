"""Processes of their own that start at once: forked from one that has imported everything.

A fresh interpreter takes five seconds of a processor to import torch and transformers. It is needed
only where imports or the installed command are what is tested. What sends signals, limits memory or
closes streams runs in one of these instead.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PROCESSES = multiprocessing.get_context("forkserver")
# Also what training imports only when it begins.
PROCESSES.set_forkserver_preload(
    [
        "hf_nanogpt.training.run",
        "hf_nanogpt.cli.train",
        "hf_nanogpt.plots",
        "torch._dynamo",
        "torch.distributed.elastic.multiprocessing.errors",
        "matplotlib.pyplot",
        "children",
        "pytest",
    ]
)


def run_child(
    function: Callable[..., object],
    *arguments: object,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    stdin: int | None = None,
    timeout: float = 120,
) -> subprocess.CompletedProcess:
    """Call a function in a process of its own; return its exit code and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / "stdout", Path(folder) / "stderr"]
        terminal = None if stdin is None else os.ttyname(stdin)
        settings = (dict(env or os.environ), cwd, terminal, logs)
        child = PROCESSES.Process(target=_begin, args=(settings, function, arguments), daemon=True)
        child.start()
        child.join(timeout)
        if child.exitcode is None:
            child.kill()
            child.join()
        printed = [log.read_text(encoding="utf-8") for log in logs]
    return subprocess.CompletedProcess(function.__name__, child.exitcode, *printed)


def run_command(*argv: object, **settings) -> subprocess.CompletedProcess:
    """Run `hf-nanogpt` in a process of its own."""
    return run_child(_run_main, [str(word) for word in argv], **settings)


def run_python(code: str, *argv: object, **settings) -> subprocess.CompletedProcess:
    """Run a script in a process of its own, as `python -c` would."""
    return run_child(_run_code, code, [str(word) for word in argv], **settings)


def _begin(settings: tuple, function: Callable[..., object], arguments: Sequence[object]) -> None:
    environment, cwd, terminal, logs = settings
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    if cwd:
        os.chdir(cwd)
    if terminal:
        os.dup2(os.open(terminal, os.O_RDWR), 0)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    for number, log in enumerate(logs, start=1):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), number)
    function(*arguments)


def _run_main(argv: list[str]) -> None:
    from hf_nanogpt.cli import main

    sys.exit(main(argv))


def _run_code(code: str, argv: list[str]) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".py", encoding="utf-8") as file:
        file.write(code)
        file.flush()
        sys.argv = [file.name, *argv]
        runpy.run_path(file.name, run_name="__main__")
