"""What every verb of the command line needs to read its flags and to stay quiet."""

import argparse
import difflib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from ..errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are exceptions of one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message[0].upper() + message[1:].rstrip(".") + f": see {self.prog} --help.")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        args, unknown = self.parse_known_args(argv)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            self.error(f"{unknown[0]!r} is no known argument{find_nearest(unknown[0], options)}")
        return args


def find_nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name.split("=")[0], known, n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else ""


def add_sampling(parser: Parser) -> None:
    """Add the flags that say how the next token is drawn."""
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)")
    parser.add_argument("--top_k", type=int, help="sample from the likeliest TOP_K tokens")
    parser.add_argument(
        "--top_p", type=float, help="sample from the likeliest share of probability"
    )
    parser.add_argument(
        "--min_p", type=float, help="least probability relative to the likeliest token"
    )
    parser.add_argument("--repetition_penalty", type=float, help="above 1 discourages repeats")
    parser.add_argument("--seed", type=int, help="make sampling repeatable")


def quiet_libraries() -> None:
    """Keep the progress bars of single files off the terminal; ours are enough."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@contextmanager
def sigterm_like_ctrl_c() -> Iterator[None]:
    """End at SIGTERM as at Ctrl-C, so that nothing half written is left."""

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
