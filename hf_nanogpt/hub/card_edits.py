"""A model card that is written anew at every push, and what a person changed in it stays.

Each section that we write ends with its own checksum, in a comment that no page shows: where it
still fits, the section is ours to replace; any other section is a person's. The last line names the
sections that we wrote, so that one that a person took out stays out.
"""

import hashlib
import re
from collections.abc import Collection
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

_SEAL = re.compile(r"<!-- hf-nanogpt: ([0-9a-f]{8}) -->")
_WROTE = re.compile(r"<!-- hf-nanogpt wrote: (.*) -->\n?")
# Of the front matter, these are measured or made by us; the rest a person's word decides.
_OURS = ("model-index", "widget")


def merge_card(
    ours: str, theirs: str, *, where: str = "README.md", insist: Collection[str] = ()
) -> str:
    """Return the card `ours` with what a person wrote into `theirs`, an earlier state of it.

    Of the front matter, lists are united, and other values of a person stay, but for the measured
    and those of the names to `insist` on.

    Raises:
        ValueError: the front matter of `theirs`, which the message calls `where`, is no YAML, or a
            person wrote a section in both cards, and not alike.
    """
    if not theirs.strip():
        return ours
    data, text = split_card(theirs, where=where)
    our_data, our_text = split_card(ours)
    fresh, present = split_sections(our_text), split_sections(text)
    merged: dict[str, str] = {}
    for name, section in present.items():
        if _is_sealed(section):
            merged |= {name: fresh[name]} if name in fresh else {}
            continue
        if name in fresh and not _is_sealed(fresh[name]) and fresh[name] != section:
            raise ValueError(
                f"The section {name!r} was edited here and in {where}, each in another way: make "
                "them equal, and push again."
            )
        merged[name] = section
    taken_out = [name for name in _names(text) if name not in present]
    new = {name: s for name, s in fresh.items() if name not in [*merged, *taken_out]}
    merged = _insert(merged, new, fresh)
    names = list(dict.fromkeys([*_names(our_text), *taken_out]))
    return _join(_merge_data(our_data, data, {*_OURS, *insist}), merged, names)


def _insert(sections: dict[str, str], new: dict[str, str], order: dict[str, str]) -> dict[str, str]:
    """Add what is new behind the section that it follows in `order`."""
    names, place = list(sections), 0
    for name in order:
        if name in names:
            place = names.index(name) + 1
        elif name in new:
            names.insert(place, name)
            place += 1
    return {name: (sections | new)[name] for name in names}


def join_card(data: dict[str, Any], sections: dict[str, str]) -> str:
    """Return a card of front matter and sections, from heading line to text, each sealed."""
    sealed = {}
    for heading, text in sections.items():
        section = f"{heading}\n\n{text.strip()}"
        sealed[_name(heading)] = f"{section}\n{_seal(section)}"
    return _join(data, sealed, list(sealed))


def _join(data: dict[str, Any], sections: dict[str, str], names: list[str]) -> str:
    front = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1000)
    wrote = f"<!-- hf-nanogpt wrote: {'; '.join(names)} -->\n"
    return "\n\n".join([f"---\n{front}---", *sections.values(), wrote])


def split_card(card: str, *, where: str = "README.md") -> tuple[dict[str, Any], str]:
    """Return the front matter and the text of a card, or raise a `ValueError` that names a line."""
    card = card.replace("\r\n", "\n")
    match = REGEX_YAML_BLOCK.match(card)
    if match is None:
        return {}, card
    try:
        data = yaml.safe_load(match[2]) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = (mark.line if mark else 0) + 1 + match[1].count("\n")
        why = getattr(error, "problem", None) or "not YAML"
        raise ValueError(
            f"{where} has invalid front matter in line {line}: {why}. Correct it there, and push "
            "again."
        ) from error
    if not isinstance(data, dict):
        raise ValueError(f"{where} has front matter that is no list of `name: value`: correct it.")
    return data, card[match.end() :]


def split_sections(text: str) -> dict[str, str]:
    """Return the sections of a text by name: "title", or the heading.

    Headings of the first and second order divide, but none in a fenced block. What stands before
    the first has the name "", and what stands behind a seal the name of its section and "+".
    """
    sections: dict[str, list[str]] = {"": []}
    name, fence = "", ""
    for line in _WROTE.sub("", text).splitlines():
        mark = re.match(r" {0,3}(```+|~~~+)", line)
        if mark and (not fence or line.strip() == fence):
            fence = "" if fence else mark[1]
        elif not fence and re.match(r"##? ", line):
            name = _name(line)
            while name in sections:  # a heading that a person used twice
                name += " again"
        sections.setdefault(name, []).append(line)
        if _SEAL.fullmatch(line):
            name += "+"
    joined = {name: "\n".join(lines).strip() for name, lines in sections.items()}
    return {name: section for name, section in joined.items() if section}


def _name(heading: str) -> str:
    return "title" if heading.startswith("# ") else heading.lstrip("# ").strip()


def _names(text: str) -> list[str]:
    wrote = _WROTE.search(text)
    return wrote[1].split("; ") if wrote else []


def _is_sealed(section: str) -> bool:
    text, _, last = section.rpartition("\n")
    return last == _seal(text)


def _seal(section: str) -> str:
    return f"<!-- hf-nanogpt: {hashlib.sha256(section.strip().encode()).hexdigest()[:8]} -->"


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
