"""Checkpoints of other formats become ours, and ours become native ones of transformers.

A format is one file beside this one: a table of weights, and two functions for the configuration.
`rules.py` reads the tables, `twins.py` compares configurations, `models.py` puts models together;
`files.py` and `folders.py` read and write.
"""

import difflib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.folder import local_folder
from ..configuration_nanogpt import NanoGPTConfig
from ..errors import UserError
from ..untrusted import read_json
from . import nanogpt, nanogpt_words
from .folders import check_destination, load_tokenizer, write_folder
from .models import make_native_model, read_nanogpt_model, read_native_model, read_our_config
from .twins import FORMATS, find_native_twin, make_native_config

__all__ = ["Conversion", "convert_checkpoint", "export_checkpoint", "find_native_twin"]

SOURCE_FORMATS = [*FORMATS, "nanogpt"]
TARGET_FORMATS = ["auto", *FORMATS]


@dataclass(frozen=True)
class Conversion:
    """What was written, and where; `format` is the one of the two that is not ours."""

    folder: Path
    format: str
    num_parameters: int
    has_tokenizer: bool


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    source_format: str | None = None,
    tokenizer: str | Path | None = None,
) -> Conversion:
    """Write a foreign checkpoint as one of ours that gives the same logits.

    The tokenizer and `generation_config.json` come along, and the weights keep their dtype. Tensors
    are read one at a time, so that memory stays near one copy of the weights.

    Args:
        source: a folder or Hub id of a model that transformers wrote as one of `FORMATS`;
            or nanoGPT's `ckpt.pt`, or the folder that it lies in.
        destination: a folder that does not exist, or is empty.
        source_format: one of `SOURCE_FORMATS`; by default what `config.json` says.
        tokenizer: folder or Hub id of a tokenizer, or a `meta.pkl` of nanoGPT; by default the
            source's own (for nanoGPT see `nanogpt_words.find_tokenizer`).

    Raises:
        UserError: the source is damaged or of another kind, it has a setting that ours has not, a
            tensor is missing, unknown or of another shape, or the destination cannot be written.
    """
    folder = check_destination(destination)
    name, path = _recognise(source, source_format)
    if name == "nanogpt":
        config, weights = nanogpt.read_checkpoint(path)
        words = nanogpt_words.find_tokenizer(path, tokenizer, config=config)
        model = read_nanogpt_model(config, weights, path)
        write_folder(model, words, folder)
    else:
        model = read_native_model(FORMATS[name], path)
        words = load_tokenizer(tokenizer or path)
        write_folder(model, words, folder, settings_from=path)
    return Conversion(folder, name, model.num_parameters(), words is not None)


def export_checkpoint(
    checkpoint: str | Path, destination: str | Path, *, to: str = "auto"
) -> Conversion:
    """Write one of our checkpoints as a native one, which transformers loads without this package.

    Args:
        checkpoint: a folder or Hub id of ours.
        destination: a folder that does not exist, or is empty.
        to: one of `FORMATS`, or `"auto"` for the first of them that can express the model.

    Raises:
        UserError: a field of the configuration, or a bias, has no place in that format; the
            checkpoint is damaged or not ours; or the destination cannot be written.
    """
    check_name("to", to, TARGET_FORMATS)
    folder = check_destination(destination)
    path = local_folder(checkpoint)
    config = read_our_config(path)
    name, theirs = make_native_config(config, to)
    model = make_native_model(FORMATS[name], theirs, config, path)
    words = load_tokenizer(path)
    write_folder(model, words, folder, settings_from=path)
    return Conversion(folder, name, model.num_parameters(), words is not None)


def _recognise(source: str | Path, source_format: str | None) -> tuple[str, Path]:
    """Return the name of the format, and the folder (for nanoGPT the file) to read."""
    if source_format is not None:
        check_name("source_format", source_format, SOURCE_FORMATS)
    path = Path(source)
    if (path / "ckpt.pt").is_file() and not (path / "config.json").is_file():
        path = path / "ckpt.pt"
    is_nanogpt = path.is_file() and (path.suffix in (".pt", ".pth") or source_format == "nanogpt")
    if is_nanogpt != (source_format == "nanogpt") and source_format is not None:
        kind = "the file of nanoGPT" if is_nanogpt else "no such file as nanoGPT's ckpt.pt"
        raise UserError(f"source_format={source_format!r}, but {path} is {kind}: leave it out.")
    if is_nanogpt:
        return "nanogpt", path
    folder = local_folder(source)
    return source_format or _name_format(read_json(folder / "config.json"), folder), folder


def _name_format(config: dict[str, Any], folder: Path) -> str:
    """Return the format that a `config.json` names, or raise a `UserError` with the nearest."""
    kind, classes = config.get("model_type"), config.get("architectures") or ["no architecture"]
    for name, native in FORMATS.items():
        if kind == native.model_type or (kind is None and native.architecture in classes):
            return name
    if kind == NanoGPTConfig.model_type:
        raise UserError(f"{folder} is a checkpoint of ours already: there is nothing to convert.")
    what = str(kind or classes[0])
    near = difflib.get_close_matches(
        what, [f.model_type for f in FORMATS.values()], n=1, cutoff=0.4
    )
    hint = f" Nearest is {near[0]!r}." if near else ""
    raise UserError(
        f"{folder} is a model of type {what!r}, which cannot be converted.{hint} Supported are "
        f"{', '.join(SOURCE_FORMATS)}; if it is one of them in disguise, name it (--from)."
    )


def check_name(field: str, value: str, allowed: Collection[str]) -> None:
    """Raise a `UserError` with the nearest known name unless the value is one of them."""
    if value not in allowed:
        near = difflib.get_close_matches(value, allowed, n=1, cutoff=0.4)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise UserError(f"{field}={value!r} is unknown. {hint}Known: {', '.join(allowed)}.")
