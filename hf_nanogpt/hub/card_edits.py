"""A model card that is written anew at every push, and what a person changed in it stays.

What we write ends with one comment that holds its checksum. Where that fits, the text above it is
ours to replace and the text below it is a person's. Where it does not, all of it is a person's.
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
from ..untrusted import parse_yaml

logger = logging.get_logger(__name__)

_SEAL = re.compile(r"^<!-- hf_nanogpt ([0-9a-f]{12}): .* -->$", re.MULTILINE)
_WORDS = "what is above is written anew at each push, unless you change it; add yours below"
# They would make the file binary, or break lines in places that only some programs see.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
# Of the front matter, these are measured or made by us; the rest a person's word decides.
_OURS = ("model-index", "widget")


def read_card(path: str | Path) -> str:
    """Return the text of a card, or raise a `UserError` if it is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: save it as that, and push again.") from error


def seal_card(card: str) -> str:
    """Return a card that we wrote, with the checksum of its text below it."""
    data, text = split_card(card)
    text = _UNSEEN.sub("\N{REPLACEMENT CHARACTER}", text).strip()
    return _join(data, f"{text}\n\n<!-- hf_nanogpt {_sum(text)}: {_WORDS} -->")


def merge_card(
    ours: str, theirs: str, *, where: str = "README.md", insist: Collection[str] = ()
) -> str:
    """Return the card `ours` with what a person wrote into `theirs`, an earlier state of it.

    Of the front matter, lists are united, and other values of a person stay, but for the measured
    and those of the names to `insist` on. Text that we wrote and a person changed stays as it is,
    with a warning, for its figures may be old.

    Raises:
        UserError: the front matter of `theirs`, which the message calls `where`, is not YAML, or a
            person wrote something in both cards, and not alike.
    """
    our_data, our_text = split_card(ours)
    data, text = split_card(theirs, where=where)
    merged = _merge_data(our_data, data, {*_OURS, *insist})
    if not text.strip() or _is_of_first_version(text):
        return _join(merged, our_text.strip())
    (fresh, here), (sealed, there) = _split_text(our_text), _split_text(text)
    words = _choose_longer(here, there, where)
    if fresh and sealed:
        return _join(merged, f"{fresh}\n\n{words}".strip())
    logger.warning_once(
        f"The text of {where} was changed by hand, so it stays as it is, and its figures may be of "
        "an earlier training. To have it written anew, delete all of it, and push again."
    )
    return _join(merged, words)


def split_card(card: str, *, where: str = "README.md") -> tuple[dict[str, Any], str]:
    """Return the front matter and the text of a card, or raise a `UserError` that names a line."""
    card = re.sub("\r\n?", "\n", card)
    match = REGEX_YAML_BLOCK.match(card)
    if match is None:
        return {}, card
    # Behind as many empty lines as stand before it, so that an error names the line of the file.
    front = "\n" * match[1].count("\n") + match[2]
    data = parse_yaml(front, where=f"The front matter of {where}") or {}
    if not isinstance(data, dict):
        raise UserError(f"{where} has front matter that is not `name: value` lines: correct it.")
    return data, card[match.end() :]


def _split_text(text: str) -> tuple[str, str]:
    """Return what we wrote, with its seal, and what a person added; the first is "" if edited."""
    for seal in _SEAL.finditer(text):
        if _sum(text[: seal.start()].strip()) == seal[1]:
            return text[: seal.end()].strip(), text[seal.end() :].strip()
    return "", text.strip()


def _is_of_first_version(text: str) -> bool:
    """Say whether this is a card of version 0.1, with a checksum for each section, not edited."""
    parts = re.split(r"\n<!-- hf-nanogpt: ([0-9a-f]{8}) -->\s*", text)  # section, checksum, ...
    sections = zip(parts[::2], parts[1::2], strict=False)
    whole = re.fullmatch(r"<!-- hf-nanogpt wrote: .* -->\s*", parts[-1])
    return bool(whole) and all(_sum(section.strip())[:8] == seal for section, seal in sections)


def _choose_longer(here: str, there: str, where: str) -> str:
    """Return what a person wrote here or there, if one has all lines of the other."""
    for part, whole in ((here, there), (there, here)):
        if not part or f"\n{part}\n" in f"\n{whole}\n":
            return whole
    raise UserError(
        f"The card was edited here and in {where}, each in another way: make them equal, and push "
        "again."
    )


def _join(data: dict[str, Any], text: str) -> str:
    front = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{front}---\n\n{text}\n"


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _merge_data(
    ours: dict[str, Any], theirs: dict[str, Any], fixed: Collection[str]
) -> dict[str, Any]:
    merged = {name: value for name, value in theirs.items() if name not in _OURS}
    for name, value in ours.items():
        if name in fixed or merged.get(name) in (None, "unknown"):
            merged[name] = value
        elif isinstance(value, list):
            old = merged[name] if isinstance(merged[name], list) else [merged[name]]
            merged[name] = old + [item for item in value if item not in old]
    return merged
