"""Processes that get ready at the same time, then work one after the other, each in its turn.

Compilation takes a minute for each contestant, and hardly needs the GPU: all of them compile at
once, on all cores. What is timed runs alone: a contestant waits until it is told to go. A crash or
a lack of memory ends only the process in which it happens.
"""

import fcntl
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

STARTED = time.perf_counter()
PRELOADED = ["torch", "transformers.trainer", "hf_nanogpt.training.run", "hf_nanogpt.benchmark"]


def say(text: str) -> None:
    """Print a line of progress with the seconds since the start."""
    print(f"[{time.perf_counter() - STARTED:5.0f} s] {text}", flush=True)


def use_gpu() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    return torch.device("cuda" if use_gpu() else "cpu")


def synchronize() -> None:
    if use_gpu():
        torch.cuda.synchronize()


class Turns:
    """A contestant's side: it reports that it is ready, waits for its turn, and reports results."""

    def __init__(self, connection: Connection, lock: Path):
        self.connection, self.lock = connection, lock.open("w")
        self.started, self.is_first = time.perf_counter(), True

    def hold_after_compiling(self) -> None:
        """Let only one contestant at a time run for the first time, which takes much memory.

        From the end of its first compilation until it is ready it holds a lock. A process that ends
        releases it too.
        """
        if use_gpu():
            # Not public; torch 2.11 and 2.13 have it.
            from torch._dynamo.callback import callback_handler

            callback_handler.register_end_callback(self._hold)

    def _hold(self, *args: Any) -> None:
        if self.is_first:
            self.is_first = False
            fcntl.flock(self.lock, fcntl.LOCK_EX)

    def ready(self) -> None:
        self.is_first = False
        self.report(ready_seconds=time.perf_counter() - self.started)
        fcntl.flock(self.lock, fcntl.LOCK_UN)

    def report(self, **facts: Any) -> None:
        """Send what was measured, and leave the memory to the others."""
        synchronize()
        if use_gpu():
            torch.cuda.empty_cache()
        self.connection.send(facts)

    def wait(self) -> Any:
        """Return what to do next; the process ends here if there is nothing more to do."""
        order = self.connection.recv()
        if order is None:
            raise SystemExit
        return order


class Worker:
    """The script's side of a process that runs `function(turns, **settings)`."""

    started: list["Worker"] = []

    def __init__(self, name: str, function: Callable, scratch: Path, log: Path, **settings: Any):
        self.name = name
        self.error: str | None = None
        self.again = (name, function, scratch, log), settings
        # On a CPU import once, not in each process; importing asks for GPUs, and then forks fail.
        context: Any = multiprocessing.get_context("spawn" if use_gpu() else "forkserver")
        if not use_gpu():
            context.set_forkserver_preload(PRELOADED)
        Worker.started.append(self)
        self.connection, other = context.Pipe()
        arguments = (name, function, other, scratch / "lock", log, settings)
        self.process = context.Process(target=_run, args=arguments, daemon=False)
        self.process.start()
        other.close()

    def restart(self) -> "Worker":
        places, settings = self.again
        return Worker(*places, **settings)

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """Return the next report, or None after an error, which `error` then has."""
        if self.error is None:
            try:
                if self.connection.poll(max(0.0, seconds)):
                    facts = self.connection.recv()
                    self.error = facts.get("error")
                else:
                    self.error = f"no answer within {seconds:.0f} s"
            except (EOFError, ConnectionResetError):
                self.error = "the process ended: see the log"
            if self.error:
                say(f"{self.name}: {self.error.splitlines()[-1][:300]}")
                self.end()
        return None if self.error else facts

    def take_turn(self, order: Any, seconds: float) -> dict[str, Any] | None:
        if self.error is None:
            with suppress(BrokenPipeError, ConnectionResetError):  # `receive` finds out
                self.connection.send(order)
        return self.receive(seconds)

    def end(self) -> None:
        """Let the process end by itself, or else end it."""
        if self.error is None:
            with suppress(BrokenPipeError, ConnectionResetError):  # it has ended
                self.connection.send(None)
            self.process.join(5)
        if self.process.is_alive() and self.process.pid:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # and the processes that it started
            self.process.kill()
        self.process.join()

    @classmethod
    def end_all(cls) -> None:
        for worker in cls.started:
            worker.error = worker.error or "ended"
            worker.end()


def _run(
    name: str, function: Callable, connection: Connection, lock: Path, log: Path, settings: dict
) -> None:
    """Run a worker in its process; what it prints goes to the log."""
    os.setsid()
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    print(f"\n===== {name}", flush=True)
    torch.set_num_threads(4 if use_gpu() else 1)
    try:
        function(Turns(connection, lock), **settings)
    except Exception as error:  # of any kind: the script records it and goes on
        traceback.print_exc()
        sys.stderr.flush()
        text = f"{type(error).__name__}: {error}"
        connection.send({"error": text[:2000]})
