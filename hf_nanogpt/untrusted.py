"""What comes from outside is numbers and text: it never becomes a path elsewhere, or code.

Checkpoints, the Hub and requests are outside. Whoever joins a path with a name that was read from a
file calls `path_inside`; whoever reads JSON or YAML that somebody else may have written calls
`read_json`, `parse_json` or `parse_yaml`; whoever hands a file of theirs to another library does it
inside `explain_errors`; and whoever prints their text on a terminal calls `printable`. An address
is shown as `without_secrets` gives it.
"""

import json
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from .errors import UserError

_LARGEST_JSON = 256 * 2**20  # bytes; the largest tokenizers in use have about 30 MB
_LARGEST_YAML = 2**20


def path_inside(folder: str | Path, name: object) -> Path:
    """Return `folder / name`, or refuse a name or a link that leads out of the folder.

    The links that `huggingface_hub` makes from a snapshot to its own store of files are followed.

    Raises:
        UserError: `name` is not a relative path of plain names, or is a link to another place.
    """
    folder = Path(folder)
    parts = PureWindowsPath(name).parts if isinstance(name, str) else ()
    plain = bool(parts) and ".." not in parts and not PureWindowsPath(str(name)).anchor
    if not plain or "\0" in str(name) or PurePosixPath(str(name)).is_absolute():
        raise UserError(
            f"{folder} names a file {name!r}, which is not a plain path inside that folder: it was "
            "not followed. The folder was not written by a tool that can be trusted."
        )
    path = folder / str(name)
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself
        raise UserError(f"{path} cannot be followed: {error}.") from error
    if not any(real.is_relative_to(root) for root in _own_roots(folder)):
        raise UserError(
            f"{path} is a link to {real}, outside its folder: it was not followed. Put the file "
            "itself into the folder."
        )
    return path


def check_links(folder: str | Path) -> None:
    """Raise a `UserError` if a file that loading may read is a link that leads out of the folder.

    What is loaded is often written elsewhere, and published: a link could lead to a secret.
    """
    for pattern in ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors", "*/*.jinja"):
        for path in Path(folder).glob(pattern):
            path_inside(folder, str(path.relative_to(folder)))


def _own_roots(folder: Path) -> list[Path]:
    real = folder.resolve()
    for parent in (real, *real.parents):  # huggingface_hub's cache: snapshots/COMMIT links to blobs
        if parent.parent.name == "snapshots" and (parent.parent.parent / "blobs").is_dir():
            return [real, parent.parent.parent / "blobs"]
    return [real]


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        UserError: it cannot be read, is not JSON, is nested too deeply, is larger than 256 MB, or
            holds something else than an object.
    """
    path = Path(path)
    try:
        if (size := path.stat().st_size) > _LARGEST_JSON:
            raise UserError(f"it has {size:,} bytes, and at most {_LARGEST_JSON:,} are read")
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    return parse_json(text, where=str(path))


def parse_json(text: str, *, where: str) -> dict[str, Any]:
    """Return the object that a text in JSON describes; `where` names the text in errors."""
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise UserError(f"{where} cannot be read as JSON: it is nested too deeply.") from error
    except ValueError as error:
        raise UserError(f"{where} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{where} holds a {type(content).__name__}, where an object is needed.")
    return content


class _PlainLoader(yaml.SafeLoader):
    """Reads YAML without aliases: a few lines of them can stand for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(
                problem=f"the alias *{event.anchor} is not read: write out what it stands for",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)


def parse_yaml(text: str, *, where: str) -> Any:
    """Return what a text in YAML describes, as plain values; `where` names the text in errors.

    Raises:
        UserError: it is not YAML, is nested too deeply, has aliases or is larger than 1 MB.
    """
    if len(text) > _LARGEST_YAML:
        raise UserError(f"{where} has more than {_LARGEST_YAML:,} characters: it was not read.")
    try:
        return yaml.load(text, _PlainLoader)
    except RecursionError as error:
        raise UserError(f"{where} is not valid YAML: it is nested too deeply.") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2026-99-99
        why = " ".join(str(error).split())
        raise UserError(f"{where} is not valid YAML: {why}") from error
