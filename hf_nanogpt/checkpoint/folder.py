"""The checkpoint folder: found and loaded with clear errors, written whole or not at all."""

import fcntl
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError
from safetensors import SafetensorError
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from ..errors import UserError
from ..hub_errors import explain_hub_error
from ..untrusted import check_links, path_inside
from .checksums import find_damage, read_record
from .foreign import TOKENIZERS, read_model, read_tokenizer

logger = logging.get_logger(__name__)

# Written last: a folder with this file is complete, one without it cannot be taken for a model.
_MARKER = "config.json"
_STEPS = "checkpoint-[0-9]*"
_STAGED = ".staged-"
LOCK = ".lock"  # see locking.py
ARTIFACTS = (
    _MARKER,
    LOCK,
    "README.md",
    "adapter",
    "chat_template.jinja",
    "configuration_nanogpt.py",
    "generation_config.json",
    "loss.png",
    "loss.png.part",
    "metrics.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "modeling_nanogpt.py",
    "samples.jsonl",
    "samples.jsonl.part",
    "special_tokens_map.json",
    "tensorboard",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "training_args.bin",
    _STEPS,
    f"{_STAGED}*",
)
# What loading needs of a repository: no pickle, and no code.
TOKENIZER_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
_DOWNLOADED = (*TOKENIZER_FILES, "model*.safetensors")


# While it loads, transformers replaces `tie_weights` for all models of the process, and two at once
# would leave it replaced: threads take turns.
LOADING = threading.RLock()


def check_checkpoint(checkpoint: str | Path) -> str:
    """Return the folder or Hub id as a string, or raise a `UserError` that says what is wrong."""
    path = Path(checkpoint)
    if (path / _MARKER).is_file():
        return str(path)
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path} holds an adapter and no whole model: give the folder that its training made, "
            "or end that training with --resume."
        )
    if path.is_dir():
        last = find_last_checkpoint(path)
        hint = f" It holds unfinished training: try {last}." if last else ""
        raise UserError(f"{path} is no checkpoint folder: it has no {_MARKER}.{hint}")
    if path.exists():
        raise UserError(f"{path} is a file; give the folder of a checkpoint, or a Hub id.")
    looks_like_a_path = path.is_absolute() or str(checkpoint).startswith((".", "~"))
    repo_id, _ = split_revision(checkpoint)
    if looks_like_a_path or repo_id.count("/") != 1 or Path(repo_id).parent.is_dir():
        raise UserError(
            f"There is no checkpoint at {path}: no such folder, and it is not a Hub id."
        )
    return str(checkpoint)


def split_revision(checkpoint: str | Path) -> tuple[str, str]:
    """Split `user/name@revision` at the `@`; the revision of a folder, or by default, is main."""
    name, at, revision = str(checkpoint).partition("@")
    if not at or Path(checkpoint).exists():
        return str(checkpoint), "main"
    if not name or not revision:
        raise UserError(f"{checkpoint} must be USER/NAME or USER/NAME@REVISION.")
    return name, revision


def load_checkpoint(checkpoint: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model, ready for use (`eval` mode), and the tokenizer of a folder or Hub id.

    A Hub id may name a branch, tag or commit: `user/name@revision`. Nothing that the folder brings
    is run: what is read are numbers and text.

    Raises:
        UserError: it is neither, a file in it is damaged or hostile, or the Hub cannot be reached
            and has never been asked for it.
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
    """Load the model alone, as `load_checkpoint` does; `folder` is where it was downloaded to."""
    folder = folder or local_folder(checkpoint)
    with LOADING:
        model = read_model(folder)
    model.name_or_path = model.config._name_or_path = split_revision(checkpoint)[0]
    return model.eval()


def local_folder(checkpoint: str | Path, files: Sequence[str] = _DOWNLOADED) -> Path:
    """Return the folder of a checkpoint; of a Hub id the one in which `files` were downloaded."""
    name, revision = split_revision(check_checkpoint(checkpoint))
    if not Path(name).is_dir():
        return download(name, revision, files)
    check_links(name)
    return Path(name)


def download(
    name: str, revision: str, files: Sequence[str] = _DOWNLOADED, *, what: str = "checkpoint folder"
) -> Path:
    """Return the folder of the cache with the files of a Hub id, which match the patterns."""
    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=list(files), ignore_patterns="*/*"
        )
    except (OSError, HTTPError, HFValidationError) as error:
        raise UserError(unreachable(name, what, error)) from error
    return Path(folder)


def unreachable(name: str, what: str, error: BaseException | None = None) -> str:
    """Say in one sentence why a Hub id could not be loaded, which raised `error`."""
    why = explain_hub_error(error)
    return f"{name!r} is no {what} here, and could not be loaded from the Hub: {why}."


def check_output_dir(
    output_dir: str | Path, *, overwrite: bool = False, resume: bool = False
) -> None:
    """Raise a `UserError` unless a checkpoint can be written to `output_dir`; change nothing.

    A folder with something in it is taken with `resume`, which needs a whole `checkpoint-*` inside
    or no more than a training leaves that was killed before its first, or with `overwrite`, which
    needs everything inside to be a checkpoint's own.
    """
    path = Path(output_dir)
    check_writable(path, name="output_dir")
    content = {p.name for p in path.iterdir()} - {LOCK} if path.is_dir() else set()
    known = {p.name for pattern in ARTIFACTS for p in path.glob(pattern)}
    if not content or (resume and find_last_checkpoint(path)):
        return
    if resume and (_MARKER in content or content - known):
        raise UserError(
            f"output_dir={path} has no whole checkpoint-* to resume from; leave out --resume."
        )
    if resume:
        return
    if not overwrite:
        raise UserError(
            f"output_dir={path} exists and is not empty: choose another folder, or give --resume "
            "to go on from its last checkpoint, or --overwrite to train it anew."
        )
    if foreign := sorted(content - known):
        raise UserError(
            f"output_dir={path} holds files that no training wrote ({', '.join(foreign[:3])}), "
            "so --overwrite does not touch it: choose another folder, or move them away."
        )


def check_writable(path: Path, *, name: str) -> None:
    """Raise a `UserError`, calling the path `name`, unless a folder can be made there."""
    # os.path: Path.exists raises where a folder must not be looked into.
    parent = next(p for p in (path, *path.absolute().parents) if os.path.exists(p))
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{name}={path}: cannot write to {parent}; choose another folder.")


def clear_output_dir(output_dir: str | Path) -> None:
    """Delete what an earlier training left in `output_dir`, and nothing else."""
    for pattern in ARTIFACTS:
        for path in Path(output_dir).glob(pattern):
            if path.name != LOCK:  # it is that of the training that begins
                _delete(path)


def _delete(path: Path) -> None:
    real_folder = path.is_dir() and not path.is_symlink()
    shutil.rmtree(path) if real_folder else path.unlink()


def find_last_checkpoint(output_dir: str | Path) -> str | None:
    """Return the `checkpoint-N` of most steps in `output_dir` that is whole, or None."""
    return next((str(p) for p in reversed(_list_steps(output_dir)) if _is_whole(p)), None)


def find_intact_checkpoint(output_dir: str | Path) -> str | None:
    """Return the last whole `checkpoint-N` whose files are those that were written, or None.

    It reads them all; one that is damaged is left out, with a warning.

    Raises:
        UserError: all that are whole are damaged.
    """
    damaged = []
    for step in filter(_is_whole, reversed(_list_steps(output_dir))):
        if (name := find_damage(step)) is None:
            return str(step)
        logger.warning(f"{step / name} is damaged, so {step.name} cannot be resumed from.")
        damaged.append(str(step / name))
    if damaged:
        raise UserError(
            f"output_dir={output_dir} has no checkpoint-* to resume from whose files are those "
            f"that were written: damaged are {', '.join(damaged)}. Bring them back from a copy, or "
            "train anew in another output_dir."
        )
    return None


def clear_unfinished(output_dir: str | Path, last: str | None = None) -> None:
    """Delete what a killed training has left half written, after its last whole checkpoint.

    And with `last`, the one to resume from, the damaged ones after that.
    """
    steps, last = _list_steps(output_dir), last or find_last_checkpoint(output_dir)
    later = steps[steps.index(Path(last)) + 1 :] if last else steps
    for path in later:
        _delete(path)
    clear_abandoned(output_dir)


def _list_steps(output_dir: str | Path) -> list[Path]:
    steps = {p.name.removeprefix("checkpoint-"): p for p in Path(output_dir).glob(_STEPS)}
    return [steps[n] for n in sorted(filter(str.isdecimal, steps), key=int)]


def _is_whole(step: Path) -> bool:
    # trainer_state.json is written last, and says how long the other files are.
    try:
        sizes = read_record(step).get("sizes", {})
        return all(path_inside(step, name).stat().st_size >= sizes[name] for name in sizes)
    except (OSError, ValueError):  # not there, or cut
        return False


@contextmanager
def explain_write_errors(folder: Path, *, run: str | Path) -> Iterator[None]:
    """Raise a `UserError` where `folder` cannot be written, and delete what is half written.

    `run` is the `output_dir` in which checkpoints are.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: of torch.save
        clear_unfinished(run)
        why = " ".join(str(error).split())
        raise UserError(
            f"{folder} could not be written, and what was saved before it is untouched; make room "
            f"and go on with --resume: {why}"
        ) from error


@contextmanager
def staged_folder(destination: str | Path) -> Iterator[Path]:
    """Give a temporary folder whose files appear in `destination` when the block ends well.

    They are renamed into place on the same file system, `config.json` last; after an error, nothing
    of them is left.
    """
    destination = Path(destination)
    destination.mkdir(parents=True, exist_ok=True)
    clear_abandoned(destination)
    staged, lock = _make_staged(destination)
    try:
        yield staged
        if (staged / _MARKER).is_file():  # files of two checkpoints are never to be mixed
            (destination / _MARKER).unlink(missing_ok=True)
        for path in sorted(staged.iterdir(), key=lambda p: p.name == _MARKER):
            target = destination / path.name
            if path.is_dir() and target.exists():
                _delete(target)  # a folder cannot be renamed onto one with files
            os.replace(path, target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def clear_abandoned(destination: str | Path) -> None:
    """Delete what killed processes have staged in a folder, and nothing that is still written."""
    for path in Path(destination).glob(f"{_STAGED}{'[a-z0-9_]' * 8}"):  # as mkdtemp names them
        with suppress(OSError):  # a living process has the lock
            lock = _lock(path)
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _make_staged(destination: Path) -> tuple[Path, int | None]:
    """Make a folder with a lock, which the system frees when this process ends, even by a kill."""
    while True:
        staged = Path(tempfile.mkdtemp(prefix=_STAGED, dir=destination))
        try:
            return staged, _lock(staged)
        except (BlockingIOError, FileNotFoundError):  # taken for abandoned before it was locked
            continue
        except OSError:  # of a file system without locks, where nobody clears either
            return staged, None


def _lock(folder: Path) -> int:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.stat(folder)  # whoever had it may have deleted it since it was opened
    except OSError:
        os.close(handle)
        raise
    return handle
