"""What every verb needs: flags read from a table, libraries without noise, an end at SIGTERM."""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol

from ..errors import UserError, did_you_mean

# A flag in each row: its name (and a name for its value), its type, its default, its help, and, if
# needed, further arguments of `add_argument`. `bool` makes a switch; a list holds the choices.
Flags = list[tuple[Any, ...]]

SAMPLING: Flags = [
    ("--temperature", float, None, "0 is greedy (default: the checkpoint's, else 0.8)"),
    ("--top_k", int, None, "sample from the TOP_K most likely tokens only"),
    ("--top_p", float, None, "sample from the most likely tokens that reach this probability"),
    ("--min_p", float, None, "least probability, as a share of the most likely token's"),
    ("--repetition_penalty", float, None, "above 1 discourages repeats"),
    ("--seed", int, None, "make sampling repeatable"),
]


class Parser(argparse.ArgumentParser):
    """An argument parser that raises a `UserError` instead of ending the program."""

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
            raise UserError(f"Unknown argument {unknown[0]!r}.{hint}")
        return args


class _TakesFlags(Protocol):
    """A parser, or a group of its flags."""

    def add_argument(self, *names: str, **settings: Any) -> Any: ...


def add_flags(parser: _TakesFlags, flags: Flags) -> None:
    for names, value_type, default, text, *more in flags:
        name, _, metavar = names.partition(" ")
        settings: dict[str, Any] = {"default": default, "help": text}
        if value_type is bool:
            settings["action"] = "store_true"
        elif isinstance(value_type, list):
            settings["choices"] = value_type
        elif value_type is not str:
            settings["type"] = value_type
        if metavar:
            settings["metavar"] = metavar
        if default and default is not True:
            settings["help"] += f" (default {default})"
        parser.add_argument(name, **settings, **(more[0] if more else {}))


def parse_flags(verb: str, what: str, flags: Flags, argv: Sequence[str]) -> argparse.Namespace:
    """Return what `argv` says about the flags of a verb that does `what`."""
    parser = Parser(verb, what)
    add_flags(parser, flags)
    return parser.parse(argv)


def load_libraries() -> None:
    """Import the libraries, which takes seconds: a verb has read its flags before.

    Their progress bars for single files stay off the terminal; ours are enough.
    """
    if not sys.stderr.isatty():  # a log should not be one line of a hundred bars
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
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
