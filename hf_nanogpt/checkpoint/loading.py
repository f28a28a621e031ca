"""Find a checkpoint, a folder or a Hub id, and load it with clear errors."""

import threading
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from ..hub_errors import explain_hub_error
from ..untrusted import check_links
from .foreign import CONFIG, TOKENIZERS, read_model, read_tokenizer
from .steps import find_last_checkpoint

# What loading needs of a repository: no pickle, and no code.
TOKENIZER_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
_DOWNLOADED = (*TOKENIZER_FILES, "model*.safetensors")
# While transformers loads a model, it replaces `tie_weights` in the whole process, and two loads at
# once would leave it replaced: threads take turns.
LOADING = threading.RLock()


def load_checkpoint(checkpoint: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model, ready for use (`eval` mode), and the tokenizer of a folder or Hub id.

    A Hub id may name a branch, tag or commit: `user/name@revision`. No code in the folder is run:
    only numbers and text are read.

    Raises:
        UserError: it is neither, a file in it is damaged or hostile, or the Hub cannot be reached
            and the checkpoint is not in the cache.
    """
    folder = local_folder(checkpoint)
    model = load_model(checkpoint, folder)
    if not any((folder / file).is_file() for file in TOKENIZERS):
        raise UserError(
            f"{folder} has no tokenizer: put the tokenizer.json that the model was trained with "
            "into it."
        )
    tokenizer = read_tokenizer(folder)
    tokenizer.name_or_path = model.name_or_path
    return model, tokenizer


def load_model(checkpoint: str | Path, folder: Path | None = None) -> PreTrainedModel:
    """Load only the model, as `load_checkpoint` does; `folder` is where it was downloaded to."""
    folder = folder or local_folder(checkpoint)
    with LOADING:
        model = read_model(folder)
    model.name_or_path = model.config._name_or_path = split_revision(checkpoint)[0]
    return model.eval()


def local_folder(checkpoint: str | Path, files: Sequence[str] = _DOWNLOADED) -> Path:
    """Return the folder of a checkpoint; for a Hub id, the one to which `files` are downloaded."""
    name, revision = split_revision(check_checkpoint(checkpoint))
    if not Path(name).is_dir():
        return download(name, revision, files)
    check_links(name)
    return Path(name)


def check_checkpoint(checkpoint: str | Path) -> str:
    """Return the folder or Hub id as a string, or raise a `UserError` that says what is wrong."""
    path = Path(checkpoint)
    if (path / CONFIG).is_file():
        return str(path)
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path} has an adapter, not a whole model: give the output_dir of its training, or "
            "finish that training with --resume."
        )
    if path.is_dir():
        last = find_last_checkpoint(path)
        hint = f" It has an unfinished training: try {last}." if last else ""
        raise UserError(f"{path} is not a checkpoint folder: it has no {CONFIG}.{hint}")
    if path.exists():
        raise UserError(f"{path} is a file: give the folder of a checkpoint, or a Hub id.")
    looks_like_a_path = path.is_absolute() or str(checkpoint).startswith((".", "~"))
    repo_id, _ = split_revision(checkpoint)
    if looks_like_a_path or repo_id.count("/") != 1 or Path(repo_id).parent.is_dir():
        raise UserError(
            f"There is no checkpoint at {path}: this folder does not exist, and it is not a Hub id."
        )
    return str(checkpoint)


def split_revision(checkpoint: str | Path) -> tuple[str, str]:
    """Split `user/name@revision` at the `@`; without one, and for a folder, it is `main`."""
    name, at, revision = str(checkpoint).partition("@")
    if not at or Path(checkpoint).exists():
        return str(checkpoint), "main"
    if not name or not revision:
        raise UserError(f"{checkpoint} must be USER/NAME or USER/NAME@REVISION.")
    return name, revision


def download(
    name: str, revision: str, files: Sequence[str] = _DOWNLOADED, *, what: str = "checkpoint folder"
) -> Path:
    """Return the folder of the cache with the files of a Hub id that match the patterns."""
    # `*` matches a slash, too: leave out folders, but for the one with additional chat templates.
    in_folders = ["*/*/*", *(f"*/{pattern}" for pattern in files if pattern != "*.jinja")]
    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=list(files), ignore_patterns=in_folders
        )
    except (OSError, HTTPError, HFValidationError) as error:
        raise UserError(unreachable(name, what, error)) from error
    return Path(folder)


def unreachable(name: str, what: str, error: BaseException | None = None) -> str:
    """Say in one sentence why a Hub id could not be loaded; `error` is what the request raised."""
    why = explain_hub_error(error)
    return f"{name!r} is not a {what} here, and could not be loaded from the Hub: {why}."
