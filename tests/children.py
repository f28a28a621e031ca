"""Processes of their own that start at once: forked from one that has imported everything.

A fresh interpreter takes five seconds of a processor to import torch and transformers. It is needed
only where imports or the installed command are what is tested. What sends signals, limits memory or
closes streams runs in one of these instead.
"""

import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import TCPStore

# In one worker, what all these processes are forked from is started once.
forked = pytest.mark.xdist_group("processes")
PROCESSES = multiprocessing.get_context("forkserver")
# Also what training imports only when it begins.
PROCESSES.set_forkserver_preload(
    [
        "hf_nanogpt.training.run",
        "hf_nanogpt.cli.train",
        "hf_nanogpt.analysis.plots",
        "torch._dynamo",
        "torch.distributed.elastic.multiprocessing.errors",
        "matplotlib.pyplot",
        "pytest",
        "children",
    ]
)
gc.freeze()  # of the process to fork from too: see conftest.py


def run_child(
    function: Callable[..., object],
    *arguments: object,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    input: str = "",
    terminal: int | None = None,
    timeout: float = 120,
) -> subprocess.CompletedProcess:
    """Call a function in a process of its own; return its exit code and what it printed.

    It reads `input`, or what is typed at a `terminal`.
    """
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / "stdout", Path(folder) / "stderr"]
        source = Path(folder) / "stdin" if terminal is None else Path(os.ttyname(terminal))
        if terminal is None:
            source.write_text(input, encoding="utf-8")
        settings = (dict(env or os.environ), cwd, source, logs)
        child = PROCESSES.Process(target=_begin, args=(settings, function, arguments), daemon=True)
        child.start()
        child.join(timeout)
        if child.exitcode is None:
            child.kill()
            child.join()
        printed = [log.read_text(encoding="utf-8") for log in logs]
    return subprocess.CompletedProcess(function.__name__, child.exitcode, *printed)


def run_ranks(
    count: int, function: Callable[..., object], *arguments: object, **settings
) -> list[subprocess.CompletedProcess]:
    """Call a function in several processes that find each other, as `torchrun` starts them."""
    # A port that is taken already cannot be taken twice.
    meeting = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(meeting.port)}
    found |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    found |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}

    def run(rank: int) -> subprocess.CompletedProcess:
        env = os.environ | found | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        return run_child(function, *arguments, env=env, **settings)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def run_command(*argv: object, **settings) -> subprocess.CompletedProcess:
    """Run `hf-nanogpt` in a process of its own."""
    return run_child(_run_main, [str(word) for word in argv], **settings)


def run_python(code: str, *argv: object, **settings) -> subprocess.CompletedProcess:
    """Run a script in a process of its own, as `python -c` would."""
    return run_child(_run_code, code, [str(word) for word in argv], **settings)


def _begin(settings: tuple, function: Callable[..., object], arguments: Sequence[object]) -> None:
    environment, cwd, source, logs = settings
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    if cwd:
        os.chdir(cwd)
    os.dup2(os.open(source, os.O_RDONLY), 0)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    for number, log in enumerate(logs, start=1):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), number)
    function(*arguments)


def _run_main(argv: list[str]) -> None:
    from hf_nanogpt.cli import main

    sys.argv = ["hf-nanogpt", *argv]
    sys.exit(main(argv))


def _run_code(code: str, argv: list[str]) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".py", encoding="utf-8") as file:
        file.write(code)
        file.flush()
        sys.argv = [file.name, *argv]
        runpy.run_path(file.name, run_name="__main__")
