"""One training at a time in an output folder, by a lock that the system frees when it ends."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from transformers.utils import logging

from ..checkpoint.folder import LOCK, check_writable
from ..errors import UserError

logger = logging.get_logger(__name__)


@contextmanager
def lock_output_dir(output_dir: str | Path) -> Iterator[None]:
    """Keep every other training out of a folder, which is made if need be.

    A training that is killed leaves the file `.lock`, which then holds nobody back. Folders that
    were made and stay empty are removed at the end.

    Raises:
        UserError: another training has the folder, or it cannot be written to.
    """
    folder = Path(output_dir)
    check_writable(folder, name="output_dir")
    made = [p for p in (folder, *folder.parents) if not os.path.exists(p)]
    lock = _take_lock(folder)
    try:
        yield
    finally:
        with suppress(OSError):  # somebody has removed the folder
            (folder / LOCK).unlink()  # while it is still ours
        os.close(lock)
        with suppress(OSError):  # something is in it
            for path in made:
                path.rmdir()


def _take_lock(folder: Path) -> int:
    path = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            # A link would lead out of the folder.
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:  # another training, which has just ended, made the folder
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
                f"output_dir={folder} is in use: {holder} trains there. Wait until it has ended, "
                "or choose another output_dir."
            ) from error
        except OSError as error:  # of a file system without locks
            logger.warning(
                f"{folder} cannot be locked ({error.strerror}): make sure that no other training "
                "writes there."
            )
        if _is_open(path, file):
            with suppress(OSError):  # on a full disk others do not learn who has it
                os.ftruncate(file, 0)
                os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            return file
        os.close(file)  # whoever had it has removed it before it was locked here


def _is_open(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(file))
    except FileNotFoundError:
        return False
