"""The standard streams as every verb finds them: open, and able to show any text."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class OutputLostError(OSError):
    """Standard output or error cannot be written, and the verb does nothing else."""


class _Output(io.FileIO):
    """A standard stream; a `lasting` one lets the work continue when it cannot be written."""

    def __init__(self, number: int, *, lasting: bool):
        super().__init__(number, "w", closefd=False)
        self.number, self.lasting = number, lasting

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
            return len(data) if written is None and self.lasting else written
        except OSError as error:
            self._discard()
            if not self.lasting:
                raise OutputLostError(error.errno, error.strerror) from error
            if self.number == 1 and not isinstance(error, BrokenPipeError):
                print(f"hf-nanogpt: {describe_loss(error)}; the work continues.", file=sys.stderr)
            return len(data)

    def _discard(self) -> None:
        """Discard all further output on this stream, also what other libraries write."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.number)
        os.close(nowhere)


def describe_loss(error: OSError) -> str:
    return f"standard output cannot be written: {error.strerror}"


@contextmanager
def standard_streams(*, lasting: bool) -> Iterator[None]:
    """Let the block write any text to standard output and error, whatever they can show.

    A character that they cannot show is written as its escape. When their reader has gone or their
    disk is full, a `lasting` block continues without them; otherwise `OutputLostError` is raised.
    """
    _open_closed()
    before = sys.stdout, sys.stderr
    if sys.stdout is sys.__stdout__:  # otherwise a test or a notebook has replaced it
        sys.stdout = _wrap(sys.stdout, 1, lasting)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _wrap(sys.stderr, 2, lasting)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OutputLostError):  # it was reported already, or another error is
                stream.flush()
        sys.stdout, sys.stderr = before


def _open_closed() -> None:
    """Open closed streams (`>&-`), or the next file would get their number and our messages."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def _wrap(stream: Any, number: int, lasting: bool) -> io.TextIOWrapper:
    raw = _Output(number, lasting=lasting)
    unbuffered = isinstance(stream.buffer, io.RawIOBase)
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
