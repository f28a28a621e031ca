"""What comes from outside is numbers and text: it never becomes a path elsewhere, or code.

Checkpoints, the Hub and requests are outside. Whoever joins a path with a name that was read from a
file calls `path_inside`, whoever reads JSON that somebody else may have written calls `read_json`,
and whoever prints their text on a terminal calls `printable`.
"""

import json
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

_LARGEST_JSON = 256 * 2**20  # bytes; the largest tokenizers in use have about 30 MB

# What a terminal obeys: all control characters, of which a line's end and a tab are no danger. A
# carriage return is left out, so that the ends of lines stay what they are.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
_CONTROLS |= {ord("\n"): "\n", ord("\t"): "\t", ord("\r"): ""}


def printable(text: object) -> str:
    r"""Return the text with nothing in it that a terminal obeys, such as `\x1b[2J`.

    >>> print(printable("a\x1b[2Jb"))
    a\x1b[2Jb
    """
    return str(text).translate(_CONTROLS)


def path_inside(folder: str | Path, name: object) -> Path:
    """Return `folder / name`, or refuse a name or a link that leads out of the folder.

    The links that `huggingface_hub` makes from a snapshot to its own store of files are followed.

    Raises:
        ValueError: `name` is not a relative path of plain names, or is a link to another place.
    """
    folder = Path(folder)
    parts = PureWindowsPath(name).parts if isinstance(name, str) else ()
    plain = bool(parts) and ".." not in parts and not PureWindowsPath(str(name)).anchor
    if not plain or "\0" in str(name) or PurePosixPath(str(name)).is_absolute():
        raise ValueError(
            f"{folder} names a file {name!r}, which is not a plain path inside that folder: it was "
            "not followed. The folder was not written by a tool that can be trusted."
        )
    path = folder / str(name)
    real = path.resolve()
    if not any(real.is_relative_to(root) for root in _own_roots(folder)):
        raise ValueError(
            f"{path} is a link to {real}, outside its folder: it was not followed. Put the file "
            "itself into the folder."
        )
    return path


def _own_roots(folder: Path) -> list[Path]:
    real = folder.resolve()
    for parent in (real, *real.parents):  # huggingface_hub's cache: snapshots/COMMIT links to blobs
        if parent.parent.name == "snapshots" and (parent.parent.parent / "blobs").is_dir():
            return [real, parent.parent.parent / "blobs"]
    return [real]


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ValueError: it cannot be read, is not JSON, is nested too deeply, is larger than 256 MB, or
            holds something else than an object.
    """
    path = Path(path)
    try:
        if (size := path.stat().st_size) > _LARGEST_JSON:
            raise ValueError(f"it has {size:,} bytes, and at most {_LARGEST_JSON:,} are read")
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} cannot be read as JSON: it is nested too deeply.") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, where an object is needed.")
    return content
