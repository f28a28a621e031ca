"""One function for many jobs, in several processes, with the results in order."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import parent_process
from typing import TypeVar

Result = TypeVar("Result")


def run_in_order(
    function: Callable[..., Result], jobs: Iterable[tuple], num_proc: int | None
) -> Iterator[Result]:
    """Yield what the function returns for the arguments of each job; few jobs wait in memory."""
    pool: Executor = ThreadPoolExecutor(1)
    if num_proc is not None and num_proc > 1:
        pool = ProcessPoolExecutor(num_proc, initializer=_start_worker)
    waiting: deque[Future[Result]] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(function, *job))
            if len(waiting) > 2 * (num_proc or 0):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Use one thread, and end when the parent process does, even if that is killed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent

    def follow_parent() -> None:
        parent_process().join()  # type: ignore[union-attr]
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
