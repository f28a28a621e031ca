"""From the name of a source to the files that it means; a Hub id means none on this machine."""

import glob
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from transformers.utils import logging

from ..errors import UserError
from .web import download_text, is_address

logger = logging.get_logger(__name__)

STDLIB = "python-stdlib"
TOKENIZED = "tokenized.json"  # describes the folder it is in, which `hf-nanogpt tokenize` made
TABLES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_HEAD = 8192  # bytes that tell a text from something else


def find_files(data: str) -> list[Path]:
    """List the files that `data` names, all texts or all tables; an empty list means a Hub id.

    Raises:
        UserError: nothing is found, or what is found is empty, not text, or mixed.
    """
    path = Path(data).expanduser()
    if is_address(data):
        files = [download_text(data)]
    elif not data.strip():
        raise UserError(f"data={data!r} is empty: give a file, a folder or a Hub id.")
    elif data == STDLIB:
        files = _choose(data, _list_stdlib())
    elif (path / TOKENIZED).is_file():
        raise UserError(f"data={data} holds tokens, but this needs text: give the original text.")
    elif path.is_dir():
        files = _choose(data, (p for p in path.rglob("*") if not _is_hidden(p.relative_to(path))))
    elif path.is_file():
        files = [path]
    elif found := glob.glob(str(path), recursive=True):
        files = _choose(data, map(Path, found))
    elif _may_be_hub_id(data):
        files = []
    else:
        raise UserError(f"data={data} was not found: no such file or folder, and nothing matches.")
    for file in files:
        _check_file(file)
    return files


def _list_stdlib() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return [p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts)]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _choose(data: str, paths: Iterable[Path]) -> list[Path]:
    """Return the tables or the texts among the files; files that are neither are left out."""
    files = sorted(p for p in paths if p.is_file() and p.stat().st_size)
    tables = [p for p in files if p.suffix in TABLES]
    texts = [p for p in files if p.suffix not in TABLES and _is_text(p)]
    if tables and texts:
        raise UserError(
            f"data={data} mixes tables ({tables[0].name}) and texts: select one of them by a glob, "
            "such as 'FOLDER/*.txt'."
        )
    if not tables and not texts:
        raise UserError(f"data={data} has no UTF-8 text and no {', '.join(TABLES)} file in it.")
    if skipped := len(files) - len(tables) - len(texts):
        logger.warning(f"{skipped} files in {data} were skipped: they are not UTF-8 text.")
    return tables or texts


def _may_be_hub_id(data: str) -> bool:
    """Say whether `data` has the form user/name; a name may end in a version, such as -1.0."""
    user, slash, name = data.partition("/")
    suffix = Path(name).suffix.lstrip(".")
    is_path = Path(user).is_dir() or (suffix and not suffix.isdecimal())
    return bool(user and slash and name) and not is_path and not set(name) & set("/*?[")


def _check_file(path: Path) -> None:
    if path.stat().st_size < _HEAD and not path.read_bytes().strip():
        raise UserError(f"data={path} is empty.")
    if path.suffix not in TABLES and not _is_text(path):
        raise UserError(f"data={path} is not UTF-8 text: convert it to UTF-8, or give text.")


def _is_text(path: Path) -> bool:
    """Say whether a file begins as UTF-8 text (the rest is checked when it is read)."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:  # nearer to the end, the head may cut a character
            return False
    return b"\0" not in head
