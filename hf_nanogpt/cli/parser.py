"""What every verb of the command line needs to read its flags and to stay quiet."""

import argparse
import difflib
from collections.abc import Sequence
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are exceptions of one sentence."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(
            message[0].upper() + message[1:].rstrip(".") + f": see {self.prog} --help."
        )

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        args, unknown = self.parse_known_args(argv)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            self.error(f"{unknown[0]!r} is no known argument{find_nearest(unknown[0], options)}")
        return args


def find_nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name.split("=")[0], known, n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else ""


def quiet_libraries() -> None:
    """Keep the progress bars of single files off the terminal; ours are enough."""
    from transformers.utils import logging

    logging.disable_progress_bar()
