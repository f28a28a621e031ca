"""Write a folder whole or not at all, and delete only what a training wrote."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from ..errors import UserError, one_line
from .foreign import CONFIG
from .steps import STEPS, find_last_checkpoint, list_steps

_STAGED = ".staged-"
LOCK = ".lock"  # see training/locking.py
RECIPE = "chosen_recipe.yaml"  # see training/choosing.py; people call their own recipe.yaml
# All that a training writes, as patterns: these files may be overwritten.
ARTIFACTS = (
    CONFIG,
    LOCK,
    RECIPE,
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
    STEPS,
    f"{_STAGED}*",
)


def check_output_dir(
    output_dir: str | Path, *, overwrite: bool = False, resume: bool = False
) -> None:
    """Raise a `UserError` unless a training can write to `output_dir`; change nothing.

    A folder with more than a recipe needs `resume` or `overwrite`. To resume, it must have a whole
    `checkpoint-*`, or only what a training leaves that is killed before the first one. To
    overwrite, it must have only files that a training writes.
    """
    path = Path(output_dir)
    check_writable(path, name="output_dir")
    content = {p.name for p in path.iterdir()} - {LOCK, RECIPE} if path.is_dir() else set()
    unknown = content - {p.name for pattern in ARTIFACTS for p in path.glob(pattern)}
    if not content or (resume and find_last_checkpoint(path)):
        return
    if resume:
        if CONFIG in content or unknown:
            raise UserError(
                f"output_dir={path} has no whole checkpoint-* to resume from: leave out --resume."
            )
        return
    if not overwrite:
        raise UserError(
            f"output_dir={path} exists and is not empty: choose another folder, or give --resume "
            "to resume from its last checkpoint, or --overwrite to start again."
        )
    if unknown:
        raise UserError(
            f"output_dir={path} has files that no training wrote ({', '.join(sorted(unknown)[:3])})"
            ", so --overwrite does not touch it: choose another folder, or move them away."
        )


def check_writable(path: Path, *, name: str) -> None:
    """Raise a `UserError`, calling the path `name`, unless a folder can be made there."""
    # os.path, as Path.exists raises where permissions forbid a look into a folder.
    places = (path, *path.absolute().parents)
    if link := next((p for p in places if os.path.islink(p) and not os.path.exists(p)), None):
        raise UserError(f"{name}={path}: {link} is a link to nothing; choose another folder.")
    if any(len(os.fsencode(part)) > 255 for part in path.parts):
        raise UserError(f"{name}={str(path)[:80]}... has a name of over 255 bytes: shorten it.")
    parent = next(p for p in places if os.path.exists(p))
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{name}={path}: cannot write to {parent}; choose another folder.")


# Clear


def clear_output_dir(output_dir: str | Path, recipe: str = "") -> None:
    """Delete what an earlier training left in `output_dir`, and nothing else.

    The lock belongs to the training that is starting, and so does its `recipe`, if that is a file.
    """
    given = Path(recipe).resolve()
    for pattern in ARTIFACTS:
        for path in Path(output_dir).glob(pattern):
            if path.name != LOCK and path.resolve() != given:
                _delete(path)


def clear_unfinished(output_dir: str | Path, last: str | None = None) -> None:
    """Delete what a killed training left half written after its last whole checkpoint.

    `last` is the checkpoint to resume from: then damaged ones after it are deleted, too.
    """
    steps, last = list_steps(output_dir), last or find_last_checkpoint(output_dir)
    for path in steps[steps.index(Path(last)) + 1 :] if last else steps:
        _delete(path)
    clear_abandoned(output_dir)


def clear_abandoned(destination: str | Path) -> None:
    """Delete what killed processes staged in a folder, but nothing that is still being written."""
    for path in Path(destination).glob(f"{_STAGED}{'[a-z0-9_]' * 8}"):  # as mkdtemp names them
        with suppress(OSError):  # a living process has the lock
            lock = _lock(path)
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _delete(path: Path) -> None:
    is_real_folder = path.is_dir() and not path.is_symlink()
    shutil.rmtree(path) if is_real_folder else path.unlink()


# Write


@contextmanager
def explain_write_errors(folder: Path, *, run: str | Path) -> Iterator[None]:
    """Raise a `UserError` if `folder` cannot be written, and delete what is half written.

    `run` is the `output_dir` with the checkpoints.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError
        clear_unfinished(run)
        raise UserError(
            f"{folder} could not be written; what was saved before is untouched. Free some space "
            f"and continue with --resume: {one_line(error)}"
        ) from error


@contextmanager
def staged_folder(destination: str | Path) -> Iterator[Path]:
    """Yield a temporary folder; its files appear in `destination` when the block ends well.

    They are renamed into place on the same file system, `config.json` last: a folder with that file
    is complete, and one without it cannot be taken for a model. After an error nothing is left.
    """
    destination = Path(destination)
    destination.mkdir(parents=True, exist_ok=True)
    clear_abandoned(destination)
    staged, lock = _make_staged(destination)
    try:
        yield staged
        if (staged / CONFIG).is_file():  # never mix the files of two checkpoints
            (destination / CONFIG).unlink(missing_ok=True)
        for path in sorted(staged.iterdir(), key=lambda p: p.name == CONFIG):
            target = destination / path.name
            if path.is_dir() and target.exists():
                _delete(target)  # a folder cannot replace one with files by renaming
            os.replace(path, target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _make_staged(destination: Path) -> tuple[Path, int | None]:
    """Make a locked folder; the system frees the lock when this process ends, even if killed."""
    while True:
        staged = Path(tempfile.mkdtemp(prefix=_STAGED, dir=destination))
        try:
            return staged, _lock(staged)
        except (BlockingIOError, FileNotFoundError):  # another process cleared it before the lock
            continue
        except OSError:  # a file system without locks, where no process clears either
            return staged, None


def _lock(folder: Path) -> int:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.stat(folder)  # the last holder may have deleted it after it was opened
    except OSError:
        os.close(handle)
        raise
    return handle
