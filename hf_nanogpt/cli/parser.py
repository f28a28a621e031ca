"""What every verb needs: its flags read from a table, quiet libraries, and a clean end at SIGTERM.

A table of flags maps each flag to what `argparse` wants to know about it.
"""

import argparse
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol

from ..errors import UserError, did_you_mean

Flags = dict[str, dict[str, Any]]

SAMPLING: Flags = {
    "--temperature": {"type": float, "default": 0.8, "help": "0 is greedy (default 0.8)"},
    "--top_k": {"type": int, "help": "sample from the TOP_K most likely tokens only"},
    "--top_p": {
        "type": float,
        "help": "sample from the most likely tokens that together have this probability",
    },
    "--min_p": {
        "type": float,
        "help": "least probability, as a share of the most likely token's",
    },
    "--repetition_penalty": {"type": float, "help": "above 1 discourages repeats"},
    "--seed": {"type": int, "help": "make sampling repeatable"},
}


class Parser(argparse.ArgumentParser):
    """An argument parser that raises a `UserError` of one sentence."""

    def __init__(self, verb: str, description: str | None = None, **kwargs: Any):
        prog = f"hf-nanogpt {verb}"
        super().__init__(prog=prog, description=description, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        see = f"See {self.prog} --help."
        raise UserError(f"{message[0].upper()}{message[1:].rstrip('.')}. {see}")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        args, unknown = self.parse_known_args(argv)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            hint = did_you_mean(unknown[0], options) or f" See {self.prog} --help."
            raise UserError(f"{self.prog} does not know {unknown[0]!r}.{hint}")
        return args


class _TakesFlags(Protocol):
    """A parser, or a group of its flags."""

    def add_argument(self, *names: str, **settings: Any) -> Any: ...


def add_flags(parser: _TakesFlags, flags: Mapping[str, dict[str, Any]]) -> None:
    for name, settings in flags.items():
        parser.add_argument(name, **settings)


def parse_flags(
    verb: str, description: str, flags: Flags, argv: Sequence[str]
) -> argparse.Namespace:
    """Return what `argv` says about the flags in a table."""
    parser = Parser(verb, description)
    add_flags(parser, flags)
    return parser.parse(argv)


def load_libraries() -> None:
    """Import the libraries, which takes seconds: a verb has read its flags before.

    Their progress bars for single files stay off the terminal; ours are enough.
    """
    from transformers.utils import logging

    from .. import auto  # noqa: F401

    logging.disable_progress_bar()


@contextmanager
def sigterm_like_ctrl_c() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C, so that no half-written file is left."""

    def stop(signum: int, frame: object) -> NoReturn:
        raise _Terminated

    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if in_main else None
    try:
        yield
    except _Terminated:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)


class _Terminated(KeyboardInterrupt):
    """SIGTERM came."""
