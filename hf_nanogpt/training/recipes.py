"""Recipes: YAML files of settings that could also be given as flags.

A recipe is read as if it stood on the command line before the flags, so both are checked alike and
flags win.
"""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, did_you_mean
from ..untrusted import parse_yaml

RECIPES = Path(__file__).parent.parent / "recipes"
CHOSEN = "chosen from the corpus"
_SECTIONS = ("data", "model", "training", "lora")
_MAY_BE_NO = ("eval_strategy", "logging_strategy", "save_strategy")


@dataclass(frozen=True)
class Choice:
    """A recipe that was made for a text: its sections, and why (see choosing.py)."""

    sections: dict[str, dict[str, Any]]
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        return CHOSEN


def list_recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_recipe(recipe: str | Path | Choice) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of a recipe, and those that replace some of them with `--lora`."""
    parts = dict(recipe.sections if isinstance(recipe, Choice) else read_sections(recipe))
    lora_defaults = parts.pop("lora", {})
    return {name: value for part in parts.values() for name, value in part.items()}, lora_defaults


def read_sections(recipe: str | Path) -> dict[str, dict[str, Any]]:
    """Return the sections of a recipe's file, which is named or one of the package.

    Raises:
        UserError: there is no such file, or it is not a recipe.
    """
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        known = list_recipes()
        raise UserError(
            f"recipe={recipe} is unknown.{_suggest(Path(recipe), known)} Known: "
            f"{', '.join(known)}, or the path of a .yaml file."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe={recipe} is not valid YAML: {error}") from error
    sections = parse_yaml(text, where=f"recipe={recipe}")
    # An empty section is None.
    if (
        not isinstance(sections, dict)
        or set(sections) - set(_SECTIONS)
        or not all(isinstance(section, dict | None) for section in sections.values())
    ):
        raise UserError(
            f"recipe={recipe} must have the sections {', '.join(_SECTIONS)}, each with settings, "
            "and no others."
        )
    parts = [section or {} for part, section in sections.items() if part != "lora"]
    _check_once(recipe, [str(name) for part in parts for name in part])
    # YAML takes a plain `no` for False.
    return {
        part: {
            name: "no" if value is False and name in _MAY_BE_NO else value
            for name, value in (section or {}).items()
        }
        for part, section in sections.items()
    }


def _check_once(recipe: str | Path, names: list[str]) -> None:
    """Refuse a setting in two sections, or by two of its names, as the last one would win."""
    from ..configuration_nanogpt import NanoGPTConfig  # slow to import

    given: dict[str, list[str]] = {}
    for name in names:
        given.setdefault(NanoGPTConfig.attribute_map.get(name, name), []).append(name)
    for same in given.values():
        if len(same) > 1:
            listed = ", ".join(same)
            raise UserError(f"recipe={recipe} sets one setting twice ({listed}): keep one.")


def _suggest(path: Path, known: list[str]) -> str:
    """Say what to give in place of `path`, which may be a text or a checkpoint."""
    name = shlex.quote(str(path))
    if (path / "config.json").is_file():
        return f" To continue training it: hf-nanogpt train finetune --from {name} --data TEXT."
    if path.exists():
        return f" To train on it: hf-nanogpt train --data {name}."
    return did_you_mean(str(path), known)


def as_flags(settings: dict[str, Any]) -> list[str]:
    """Return settings as they are written on the command line."""
    flags = []
    for name, value in settings.items():
        if value is None:
            continue
        if isinstance(value, dict):
            value = json.dumps(value)
        values = value if isinstance(value, list | tuple) else [value]
        flags += [f"--{name}={values[0]}"] if len(values) == 1 else [f"--{name}", *map(str, values)]
    return flags
