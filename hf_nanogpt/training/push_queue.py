"""Pushes of a running training, in the background, that lose nothing when the Hub is slow."""

import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ..hub.release import push_step


class PushQueue:
    """Push checkpoints one after the other in a thread.

    Each is copied first, so that it may change or go away thereafter.
    """

    def __init__(self):
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="push")
        self._errors: list[BaseException] = []
        self._jobs: list[tuple[Future, tempfile.TemporaryDirectory]] = []

    def add(
        self,
        checkpoint: str | Path,
        repo_id: str,
        *,
        branches: list[str],
        num_parameters: int,
        message: str,
        skip_waiting: bool,
        private: bool | None = None,
        token: str | None = None,
    ) -> None:
        """Push a checkpoint to each of the branches; with `skip_waiting`, only the newest waits."""
        if skip_waiting:
            for job, waiting in self._jobs:
                if job.cancel():
                    waiting.cleanup()
        copy = tempfile.TemporaryDirectory(prefix="hf_nanogpt-push-")
        try:
            # A link stays one: push_step refuses those that lead elsewhere.
            shutil.copytree(checkpoint, copy.name, symlinks=True, dirs_exist_ok=True)
        except OSError as error:  # a full disk, say, which the training itself may yet survive
            copy.cleanup()
            self._errors.append(error)
            return

        def push() -> None:
            with copy:
                for branch in branches:
                    push_step(
                        Path(copy.name),
                        repo_id,
                        branch=branch,
                        num_parameters=num_parameters,
                        message=message,
                        private=private,
                        token=token,
                    )

        self._jobs.append((self._executor.submit(push), copy))

    def finish(self) -> list[BaseException]:
        """Wait for all pushes; return the errors of those that failed."""
        jobs, self._jobs = self._jobs, []
        errors, self._errors = self._errors, []
        raised = [job.exception() for job, _ in jobs if not job.cancelled()]
        return errors + [error for error in raised if error is not None]
