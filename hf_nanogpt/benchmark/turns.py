"""How `bench` measures: one clock, contestants that take turns, and the spread of the rounds."""

import time
from collections.abc import Iterable, Iterator
from itertools import pairwise
from statistics import median
from typing import TypeVar

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from ..errors import UserError

T = TypeVar("T")


class Clock(TrainerCallback):
    """Notes when it was made, and when each step of training or token of a text was done."""

    def __init__(self) -> None:
        self.marks = [time.perf_counter()]

    def __call__(self, *args, **kwargs) -> bool:
        """Note the time; as a stopping criterion of `generate()`, never stop."""
        self.marks.append(time.perf_counter())
        return False

    def on_step_end(self, *args, **kwargs) -> None:
        self()

    def seconds(self) -> list[float]:
        """Return the seconds between one mark and the next."""
        return [later - earlier for earlier, later in pairwise(self.marks)]


def take_turns(
    contestants: Iterable[T], rounds: int, *, description: str, show_progress: bool = True
) -> Iterator[tuple[int, T]]:
    """Yield each contestant with the number of the round, 0 being a warm-up that does not count.

    They take turns so that a change in the machine's load affects all of them.
    """
    turns = [(turn, contestant) for turn in range(rounds + 1) for contestant in contestants]
    yield from tqdm(turns, desc=description, disable=not show_progress)


def summarize(values: Iterable[float]) -> list[float]:
    """Return the minimum, the median and the maximum."""
    ordered = sorted(values)
    return [ordered[0], median(ordered), ordered[-1]]


def compare_speeds(ours: Iterable[float], others: Iterable[float]) -> list[float]:
    """Return how fast another contestant is, where we are 1: minimum, median and maximum.

    The arguments are the seconds that each took in each round.
    """
    return summarize(our / other for our, other in zip(ours, others, strict=True))


def check_counts(settings: dict[str, int], num_threads: int | None) -> None:
    """Raise a `UserError` for a count below 1; then set torch's threads, if a number is given."""
    threads = {} if num_threads is None else {"num_threads": num_threads}
    for name, value in (settings | threads).items():
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1.")
    if num_threads is not None:
        torch.set_num_threads(num_threads)
