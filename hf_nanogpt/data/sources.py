"""From the name of a source to the files that it means; a Hub id means none on this machine."""

import codecs
import glob
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from transformers.utils import logging

from ..errors import UserError, without_secrets
from .reading import TABLES, explain_read_errors, find_format, open_bytes
from .web import download_text, is_address

logger = logging.get_logger(__name__)

STDLIB = "python-stdlib"
TOKENIZED = "tokenized.json"  # describes the folder it is in, which `hf-nanogpt tokenize` made
_HEAD = 8192  # bytes that tell a text from something else


def find_files(data: str) -> list[Path]:
    """List the files that `data` names, all texts or all tables; an empty list means a Hub id.

    Raises:
        UserError: nothing is found, or what is found is empty, not text, mixed, or unreadable.
    """
    with explain_read_errors(without_secrets(data)):
        files = _find(data)
        for file in files:
            _check_file(file, name_file(data, file))
    return files


def _find(data: str) -> list[Path]:
    path = Path(data).expanduser()
    if is_address(data):
        return [download_text(data)]
    if not data.strip():
        raise UserError(f"data={data!r} is empty: give a file, a folder or a Hub id.")
    if data == STDLIB:
        return _choose(data, _list_stdlib())
    if (path / TOKENIZED).is_file() or path.suffix == ".ds" or any(path.glob("*.ds")):
        raise UserError(f"data={data} holds tokens, but this needs text: give the original text.")
    if path.is_dir():
        return _choose(data, _walk(path))
    if path.is_file():
        return [path]
    if path.exists():
        raise UserError(
            f"data={data} is a pipe or a device, which can be read only once: write the text into "
            "a file, and give that."
        )
    if found := glob.glob(str(path), recursive=True):
        return _choose(data, map(Path, found))
    if _may_be_hub_id(data):
        return []
    raise UserError(f"data={data} was not found: no such file or folder, and nothing matches.")


def name_file(data: str, file: Path) -> str:
    """Return what messages call a file of `data`: its path, or its address without a password."""
    return without_secrets(data) if is_address(data) else str(file)


def _list_stdlib() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return [p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts)]


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder and those below it, without hidden ones.

    A folder that cannot be listed is refused: `Path.rglob` would leave it out without a word.
    """

    def refuse(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _choose(data: str, paths: Iterable[Path]) -> list[Path]:
    """Return the tables or the texts among the files; files that are neither are left out."""
    tables: list[Path] = []
    texts: list[Path] = []
    skipped = 0
    for path in sorted(p for p in paths if p.is_file()):
        _, head = _read_head(path, path)
        if find_format(path) and not _is_blank(head):
            tables.append(path)
        elif _is_text(head) and not _is_blank(head):
            texts.append(path)
        else:
            skipped += not _is_blank(head)
    kinds = {find_format(p) or "text": p.name for p in (*tables, *texts)}
    if len(kinds) > 1:
        raise UserError(
            f"data={data} mixes {' and '.join(f'{k} ({name})' for k, name in kinds.items())}: "
            "select one of them by a glob, such as 'FOLDER/*.txt'."
        )
    if not kinds:
        raise UserError(f"data={data} has no UTF-8 text and no {', '.join(TABLES)} file in it.")
    if skipped:
        logger.warning(f"{skipped} files in {data} were skipped: they are not text in UTF-8.")
    return tables or texts


def _may_be_hub_id(data: str) -> bool:
    """Say whether `data` has the form user/name; a name may end in a version, such as -1.0."""
    user, slash, name = data.partition("/")
    suffix = Path(name).suffix.lstrip(".")
    is_path = Path(user).is_dir() or (suffix and not suffix.isdecimal())
    return bool(user and slash and name) and not is_path and not set(name) & set("/*?[")


def _check_file(path: Path, name: str) -> None:
    start, head = _read_head(path, name)
    if _is_blank(head):
        raise UserError(f"data={name} is empty, or has only blanks in it.")
    if find_format(path):
        return
    if (place := head.find(b"\0")) >= 0 and _is_text(head[:place]):  # NUL is valid UTF-8
        raise UserError(
            f"data={name} looks like a binary file: it has a NUL byte at offset {start + place}. "
            "Give UTF-8 text. To remove such bytes from a text: tr -d '\\000' < FILE > NEW_FILE."
        )
    if not _is_text(head):
        raise UserError(f"data={name} is not UTF-8 text: convert it to UTF-8, or give text.")


def _read_head(path: Path, name: object) -> tuple[int, bytes]:
    """Return the first bytes that are not only blanks and empty lines, and where they are."""
    start = 0
    with explain_read_errors(name), open_bytes(path) as file:
        while (head := file.read(_HEAD)) and _is_blank(head):
            start += len(head)
    return start, head


def _is_blank(head: bytes) -> bool:
    return not head.removeprefix(codecs.BOM_UTF8).strip()


def _is_text(head: bytes) -> bool:
    """Say whether a file begins as UTF-8 text (the rest is checked when it is read)."""
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:  # nearer to the end, the head may cut a character
            return False
    return b"\0" not in head
