"""The folders at both ends of a conversion: found, loaded from, and written whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.folder import (
    TOKENIZER_FILES,
    check_writable,
    clear_abandoned,
    download,
    split_revision,
    staged_folder,
)
from ..checkpoint.foreign import TOKENIZERS, check_generation_config, read_tokenizer
from ..errors import UserError

_ONE_OF = (*TOKENIZERS, "tokenizer_config.json")
_SETTINGS = "generation_config.json"


def load_tokenizer(place: str | Path) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a folder or Hub id; `None` for a folder that has none."""
    name, revision = split_revision(place)
    folder = Path(name) if Path(name).is_dir() else download(name, revision, TOKENIZER_FILES)
    if not any((folder / file).is_file() for file in _ONE_OF):
        return None
    tokenizer = read_tokenizer(folder)
    for key in ("is_local", "local_files_only"):  # of this loading, not of the tokenizer
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def check_destination(destination: str | Path) -> Path:
    """Return the path if a new folder can be written there, or raise a `UserError`."""
    path = Path(destination)
    clear_abandoned(path)
    content = [p.name for p in path.iterdir()] if path.is_dir() else []
    if content and all(name.startswith(".staged-") for name in content):
        raise UserError(
            f"destination={path} is being written by another process ({content[0]}): wait for its "
            "end, or choose another folder."
        )
    if content:
        raise UserError(f"destination={path} exists and is not empty: choose another folder.")
    check_writable(path, name="destination")
    return path


def write_folder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    destination: Path,
    *,
    settings_from: Path | None = None,
) -> None:
    """Write a whole checkpoint, with the generation settings of another folder, or nothing."""
    settings = settings_from and settings_from / _SETTINGS
    with written_folder(destination) as staged:
        model.save_pretrained(staged)
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        if settings and settings.is_file():
            check_generation_config(settings.parent)  # a damaged one must not pass on
            shutil.copyfile(settings, staged / _SETTINGS)


@contextmanager
def written_folder(destination: Path) -> Iterator[Path]:
    """Stage a folder; after a failure, say so in a `UserError` and leave no trace of it."""
    existed = destination.exists()
    try:
        with staged_folder(destination) as staged:
            yield staged
    except BaseException as error:
        if not existed and destination.is_dir() and not any(destination.iterdir()):
            destination.rmdir()
        # tokenizers, which is written in Rust, raises a bare Exception when the disk is full.
        if isinstance(error, OSError | SafetensorError) or type(error) is Exception:
            raise UserError(
                f"destination={destination} could not be written, and nothing was left of it: "
                f"{error}. Make room there, or choose another folder."
            ) from error
        raise
