"""Import checkpoints of other formats as ours, and export ours in native formats.

Each format is one file in this folder: a table of weights, and two functions for the configuration.
`rules.py` applies the tables, `native.py` compares configurations, `models.py` builds the models,
and `folders.py` loads and writes.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from ..checkpoint.loading import local_folder
from ..configuration_nanogpt import NanoGPTConfig
from ..errors import UserError, did_you_mean
from ..untrusted import read_json
from . import nanogpt
from .folders import (
    check_destination,
    check_tokenizer,
    load_tokenizer,
    read_settings,
    use_special_tokens,
    write_folder,
)
from .models import export_native_model, import_nanogpt_model, import_native_model, read_our_config
from .native import FORMATS, OBSTACLES, find_native_format, make_native_config

__all__ = ["Conversion", "convert_checkpoint", "export_checkpoint", "find_native_format"]

SOURCE_FORMATS = [*FORMATS, "nanogpt"]
TARGET_FORMATS = ["auto", *FORMATS]
_TYPES = {
    architecture: model_type
    for names in (MODEL_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    for model_type, architecture in names.items()
}


@dataclass(frozen=True)
class Conversion:
    """What was written, and where; `format` is the other format, not ours."""

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
    """Import a checkpoint of another format as one of ours that gives the same logits.

    The tokenizer and `generation_config.json` are copied, and the weights keep their dtype. Tensors
    are read one at a time, so that memory stays near one copy of the weights.

    Args:
        source: a folder or Hub id of a model that transformers wrote as one of `FORMATS`;
            or nanoGPT's `ckpt.pt`, or the folder with that file.
        destination: a folder that does not exist, or is empty.
        source_format: one of `SOURCE_FORMATS`, for a folder whose `config.json` names a type that
            transformers does not know.
        tokenizer: a folder or Hub id of a tokenizer, or a `meta.pkl` of nanoGPT; by default that
            of the source (for nanoGPT see `nanogpt.find_tokenizer`).

    Raises:
        UserError: the source is damaged or has an unsupported format or setting, a tensor is
            missing, unknown or has another shape, or the destination cannot be written.
    """
    folder = check_destination(destination)
    name, path = _recognise(source, source_format)
    if name == "nanogpt":
        config, weights = nanogpt.read_checkpoint(path)
        found = nanogpt.find_tokenizer(path, tokenizer, config=config)
        model = import_nanogpt_model(config, weights, path)
        write_folder(model, found, folder)
    else:
        model = import_native_model(FORMATS[name], path)
        found, settings = load_tokenizer(tokenizer or path), read_settings(path)
        if found is not None:
            check_tokenizer(found, model.config, where=path)
            if tokenizer:
                use_special_tokens(found, model, settings)
        write_folder(model, found, folder, settings=settings)
    return Conversion(folder, name, model.num_parameters(), found is not None)


def export_checkpoint(
    checkpoint: str | Path, destination: str | Path, *, to: str = "auto"
) -> Conversion:
    """Export one of our checkpoints as a native one, which loads without this package.

    Args:
        checkpoint: a folder or Hub id of ours.
        destination: a folder that does not exist, or is empty.
        to: one of `FORMATS`, or `"auto"` for the first that can express the model.

    Raises:
        UserError: the format cannot express a setting or a bias of the model, the checkpoint is
            damaged or not ours, or the destination cannot be written.
    """
    check_name("to", to, TARGET_FORMATS)
    folder = check_destination(destination)
    path = local_folder(checkpoint)
    config = read_our_config(path)
    name, native_config = make_native_config(config, to)
    model = export_native_model(FORMATS[name], native_config, config, path)
    tokenizer = load_tokenizer(path)
    write_folder(model, tokenizer, folder, settings=read_settings(path))
    return Conversion(folder, name, model.num_parameters(), tokenizer is not None)


def _recognise(source: str | Path, source_format: str | None) -> tuple[str, Path]:
    """Return the name of the format, and the folder (for nanoGPT the file) to read."""
    if source_format is not None:
        check_name("source_format", source_format, SOURCE_FORMATS)
    path = Path(source)
    if (path / "ckpt.pt").is_file() and not (path / "config.json").is_file():
        path = path / "ckpt.pt"
    is_nanogpt = path.is_file() and (path.suffix in (".pt", ".pth") or source_format == "nanogpt")
    if source_format is not None and is_nanogpt != (source_format == "nanogpt"):
        what = "a file of nanoGPT" if is_nanogpt else "not a file like nanoGPT's ckpt.pt"
        raise UserError(f"source_format={source_format!r}, but {path} is {what}: leave it out.")
    if is_nanogpt:
        return "nanogpt", path
    folder = local_folder(source)
    return _read_format(folder, source_format), folder


def _read_type(config: dict[str, Any]) -> str:
    """Return the `model_type` of a `config.json`; those of 2019 name only the class."""
    names = config.get("architectures")
    classes = [str(name) for name in names] if isinstance(names, list) else []
    known = [_TYPES[name] for name in classes if name in _TYPES]
    return str(config.get("model_type") or (known or classes or ["no architecture"])[0])


def _read_format(folder: Path, given: str | None) -> str:
    """Return the format that a `config.json` names, or the one that is given if it names none.

    Raises:
        UserError: it names a model that cannot be converted, or another one than is given.
    """
    found = _read_type(read_json(folder / "config.json"))
    for name, native in FORMATS.items():
        if found == native.model_type:
            if given not in (None, name):
                raise UserError(f"source_format={given!r}, but {folder} is a {name}: leave it out.")
            return name
    if found == NanoGPTConfig.model_type:
        raise UserError(f"{folder} is already a checkpoint of ours: nothing to convert.")
    refusal = f"{folder} is a model of type {found!r:.80}, which cannot be converted"
    supported = f"Supported are {', '.join(SOURCE_FORMATS)}."
    if found in CONFIG_MAPPING:  # never as another: tensors may have the same names by chance
        raise UserError(f"{refusal}: {OBSTACLES.get(found, 'it is another model')}. {supported}")
    if given is not None:
        return given
    hint = did_you_mean(found, [native.model_type for native in FORMATS.values()])
    raise UserError(
        f"{refusal}.{hint} {supported} If it is one of them under another name, say which (--from)."
    )


def check_name(field: str, value: str, allowed: Collection[str]) -> None:
    """Raise a `UserError` with the nearest known name unless the value is one of them."""
    if value not in allowed:
        hint = did_you_mean(value, allowed)
        raise UserError(f"{field}={value!r} is unknown.{hint} Known: {', '.join(allowed)}.")
