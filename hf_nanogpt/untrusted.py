"""Guards for what comes from outside: checkpoints, the Hub, requests.

Such data is numbers and text. It never becomes code, or a path outside its folder:

- `path_inside` joins a folder with a name that was read from a file;
- `read_json`, `parse_json` and `parse_yaml` read what somebody else may have written;
- `errors.explain_errors` surrounds the call of a library that reads such a file;
- `errors.printable` makes such text safe for a terminal;
- `errors.without_secrets` makes an address safe to show.
"""

import json
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml

from .errors import UserError, explain_errors

_LARGEST_JSON = 256 * 2**20  # bytes; the largest tokenizers in use have about 30 MB
_LARGEST_YAML = 2**20  # characters


def path_inside(folder: str | Path, name: object) -> Path:
    """Return `folder / name`, or refuse a name or a link that leads out of the folder.

    Links that `huggingface_hub` makes from a snapshot to the files in its cache are followed.

    Raises:
        UserError: `name` is not a relative path of plain names, or is a link to another place.
    """
    folder = Path(folder)
    # As a Windows path it is split at both kinds of slash, and the anchor is a drive or a root.
    windows = PureWindowsPath(name if isinstance(name, str) else "")
    parts = windows.parts
    plain = bool(parts) and ".." not in parts and not windows.anchor and "\0" not in str(name)
    if not plain:
        raise UserError(
            f"{folder} names a file {name!r}, which is not a plain path inside that folder, so it "
            "was not opened. Do not trust this folder: the usual tools do not write such names."
        )
    path = folder / str(name)
    try:
        target = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a link to itself, no valid name
        raise UserError(f"{path} cannot be followed: {error}.") from error
    if not any(target.is_relative_to(root) for root in _allowed_roots(folder)):
        raise UserError(
            f"{path} is a link to {target}, outside its folder: it was not followed. Replace the "
            "link with a copy of the file."
        )
    return path


def check_links(folder: str | Path) -> None:
    """Raise a `UserError` if a file that loading may read is a link that leads out of the folder.

    What is loaded is often saved and published again, and a link could lead to a secret.
    """
    for pattern in ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors", "*/*.jinja"):
        for path in Path(folder).glob(pattern):
            path_inside(folder, str(path.relative_to(folder)))


def _allowed_roots(folder: Path) -> list[Path]:
    """Return the folders that links in `folder` may lead to."""
    real = folder.resolve()
    for parent in (real, *real.parents):  # huggingface_hub's cache: snapshots/COMMIT links to blobs
        if parent.parent.name == "snapshots" and (parent.parent.parent / "blobs").is_dir():
            return [real, parent.parent.parent / "blobs"]
    return [real]


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        UserError: the file cannot be read, is larger than 256 MB, is not JSON, is nested too
            deeply, or does not hold an object.
    """
    path = Path(path)
    with explain_errors(f"{path} cannot be read as JSON"):
        if (size := path.stat().st_size) > _LARGEST_JSON:
            raise UserError(f"it has {size:,} bytes; the limit is {_LARGEST_JSON:,}")
        text = path.read_text(encoding="utf-8")
    return parse_json(text, where=str(path))


def parse_json(text: str, *, where: str) -> dict[str, Any]:
    """Return the object that a text in JSON describes; errors call the text `where`."""
    with explain_errors(f"{where} cannot be read as JSON"):
        content = load_json(text)
    if not isinstance(content, dict):
        raise UserError(f"{where} must hold a JSON object, not a {type(content).__name__}.")
    return content


def load_json(text: str) -> Any:
    """Return what a text in JSON describes; raise a `ValueError` if a name has two values.

    Python's reader would take the last one without a word, and other programs the first.
    """
    return _DECODER.decode(text)


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        for name, value in pairs:
            if content[name] != value:
                raise ValueError(
                    f"{name!r:.80} is there twice, as {value!r:.80} and as {content[name]!r:.80}: "
                    "leave one out"
                )
    return content


# Made once: for each line of a corpus, `json.loads` would make it again, and take twice the time.
_DECODER = json.JSONDecoder(object_pairs_hook=_make_object)


class _PlainLoader(yaml.SafeLoader):
    """Reads YAML without aliases, as a few lines of them can expand to gigabytes.

    A name that is there twice is refused: the last value would win without a word.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(
                problem=f"the alias *{event.anchor} is not read: write its value here",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if isinstance(key.value, str) and key.value in seen:
                problem = f"{key.value!r:.80} is there twice: leave one out"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, *, where: str) -> Any:
    """Return what a text in YAML describes, as plain values; errors call the text `where`.

    Raises:
        UserError: the text is not YAML, is nested too deeply, has aliases or more than 2**20
            characters.
    """
    if len(text) > _LARGEST_YAML:
        raise UserError(f"{where} has more than {_LARGEST_YAML:,} characters, so it was not read.")
    with explain_errors(f"{where} is not valid YAML"):
        return yaml.load(text, _PlainLoader)
