"""Rewrite a model card at every push, and keep what a person changed in it.

The text that we write ends with a comment that holds its checksum. If the checksum fits, the text
above the comment is ours to replace, and the text below it is a person's. If not, the whole text is
a person's.
"""

import hashlib
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from transformers.utils import logging

from ..errors import UserError
from ..untrusted import parse_yaml, path_inside

logger = logging.get_logger(__name__)

_SEAL = re.compile(r"^<!-- hf_nanogpt ([0-9a-f]{12}): .* -->$", re.MULTILINE)
_NOTE = "each push rewrites the text above unless you edit it; add your own text below"
# These would make the file binary, or break lines where only some programs see it.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_GENERATED = (
    "model-index",
    "widget",
)  # front matter that is always ours; a person decides the rest


def read_card(path: str | Path) -> str:
    """Return the text of a card, or raise a `UserError` if it is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: save it as UTF-8 and push again.") from error


def write_card(
    card: str,
    path: Path,
    *,
    to: Path | None = None,
    where: str | None = None,
    overrides: Collection[str] = (),
) -> None:
    """Write a card to `to`, by default `path`, with a person's edits of the card at `path`."""
    earlier = read_card(path_inside(path.parent, path.name)) if path.is_file() else ""
    merged = merge_card(card, earlier, where=where or str(path), overrides=overrides)
    (to or path).write_text(merged, encoding="utf-8")


def seal_card(card: str) -> str:
    """Return a card that we wrote, with the checksum of its text below it."""
    metadata, text = split_card(card)
    text = _INVISIBLE.sub("\N{REPLACEMENT CHARACTER}", text).strip()
    return _join(metadata, f"{text}\n\n<!-- hf_nanogpt {_checksum(text)}: {_NOTE} -->")


def merge_card(
    card: str, earlier: str, *, where: str = "README.md", overrides: Collection[str] = ()
) -> str:
    """Return the new `card` with what a person changed in an `earlier` one.

    Front matter: lists are united. Of other values the earlier one is kept, except for results and
    for the names in `overrides`. Text: if a person edited what we wrote, the earlier text is kept,
    with a warning, as its figures may be old.

    Raises:
        UserError: the front matter of `earlier`, which the message calls `where`, is not YAML, or
            a person edited both cards differently.
    """
    metadata, text = split_card(card)
    earlier_metadata, earlier_text = split_card(earlier, where=where)
    metadata = _merge_metadata(metadata, earlier_metadata, {*_GENERATED, *overrides})
    if not earlier_text.strip() or _is_unedited_0_1(earlier_text):
        return _join(metadata, text.strip())
    generated, added = _split_text(text)
    earlier_generated, earlier_added = _split_text(earlier_text)
    added = _choose_longer(added, earlier_added, where)
    if generated and earlier_generated:
        return _join(metadata, f"{generated}\n\n{added}".strip())
    logger.warning_once(
        f"The text of {where} was edited by hand, so it was kept, and its figures may come from an "
        "earlier training. To replace it, delete the whole text and push again."
    )
    return _join(metadata, added)


def split_card(card: str, *, where: str = "README.md") -> tuple[dict[str, Any], str]:
    """Return the front matter and the text of a card, or raise a `UserError` that names a line."""
    card = re.sub("\r\n?", "\n", card)
    match = REGEX_YAML_BLOCK.match(card)
    if match is None:
        return {}, card
    # Keep as many empty lines as stand before it, so that an error names the line in the file.
    front = "\n" * match[1].count("\n") + match[2]
    metadata = parse_yaml(front, where=f"The front matter of {where}") or {}
    if not isinstance(metadata, dict):
        raise UserError(f"The front matter of {where} must be `name: value` lines: correct it.")
    return metadata, card[match.end() :]


def _split_text(text: str) -> tuple[str, str]:
    """Return what we wrote, with its seal, and what a person added; the first is "" if edited."""
    for seal in _SEAL.finditer(text):
        if _checksum(text[: seal.start()].strip()) == seal[1]:
            return text[: seal.end()].strip(), text[seal.end() :].strip()
    return "", text.strip()


def _is_unedited_0_1(text: str) -> bool:
    """Return whether this is an unedited card of version 0.1, with a checksum for each section."""
    parts = re.split(r"\n<!-- hf-nanogpt: ([0-9a-f]{8}) -->\s*", text)  # section, checksum, ...
    sections = zip(parts[::2], parts[1::2], strict=False)
    is_whole = re.fullmatch(r"<!-- hf-nanogpt wrote: .* -->\s*", parts[-1])
    return bool(is_whole) and all(_checksum(s.strip())[:8] == seal for s, seal in sections)


def _choose_longer(added: str, earlier: str, where: str) -> str:
    """Return the one of two texts of a person that has all lines of the other."""
    for part, whole in ((added, earlier), (earlier, added)):
        if not part or f"\n{part}\n" in f"\n{whole}\n":
            return whole
    raise UserError(
        f"This card and {where} were edited differently: make their texts equal, and push again."
    )


def _merge_metadata(
    metadata: dict[str, Any], earlier: dict[str, Any], overrides: Collection[str]
) -> dict[str, Any]:
    merged = {name: value for name, value in earlier.items() if name not in _GENERATED}
    for name, value in metadata.items():
        if name in overrides or merged.get(name) in (None, "unknown"):
            merged[name] = value
        elif isinstance(value, list):
            old = merged[name] if isinstance(merged[name], list) else [merged[name]]
            merged[name] = old + [item for item in value if item not in old]
    return merged


def _join(metadata: dict[str, Any], text: str) -> str:
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{front}---\n\n{text}\n"


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
