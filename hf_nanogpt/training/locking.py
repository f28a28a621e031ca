"""One training at a time in an output folder, by a lock that the system frees when it ends."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from transformers.utils import logging

from ..checkpoint.writing import LOCK, check_writable
from ..errors import UserError

logger = logging.get_logger(__name__)


@contextmanager
def lock_output_dir(output_dir: str | Path) -> Iterator[None]:
    """Keep every other training out of a folder, and create the folder if it does not exist.

    A killed training leaves the file `.lock` behind, which then blocks nobody. Folders that were
    created here and are still empty are removed at the end.

    Raises:
        UserError: another training has the folder, or it cannot be written to.
    """
    folder = Path(output_dir)
    check_writable(folder, name="output_dir")
    created = [p for p in (folder, *folder.parents) if not os.path.exists(p)]
    lock = _take_lock(folder)
    try:
        yield
    finally:
        with suppress(OSError):  # somebody has removed the folder
            (folder / LOCK).unlink()  # before the lock is free, or it could be another's file
        os.close(lock)
        with suppress(OSError):  # the folder is not empty
            for path in created:
                path.rmdir()


def _take_lock(folder: Path) -> int:
    path = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            # Do not follow a link: it would lead out of the folder.
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:  # another training has just ended and removed its folder
            continue
        except OSError as error:
            raise UserError(
                f"output_dir={folder} cannot be locked for this training: {error.strerror} "
                f"({path}). Remove that file, or choose another output_dir."
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            text = os.pread(file, 200, 0).decode(errors="replace")
            holder = "".join(filter(str.isprintable, text)) or "another process"
            os.close(file)
            raise UserError(
                f"output_dir={folder} is in use: {holder} trains there. Wait for it to end, or "
                "choose another output_dir."
            ) from error
        except OSError as error:  # a file system without locks
            logger.warning(
                f"{folder} cannot be locked ({error.strerror}): make sure that no other training "
                "writes there."
            )
        if _is_open(path, file):
            with suppress(OSError):  # on a full disk, others do not learn who has the lock
                os.ftruncate(file, 0)
                os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            return file
        os.close(file)  # the former holder removed the file before it was locked here: try again


def _is_open(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(file))
    except FileNotFoundError:
        return False
