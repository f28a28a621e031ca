"""The checkpoint folder: found and loaded with clear errors, written whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from . import auto  # noqa: F401 (importing it registers the Auto classes)
from .hub_errors import explain_hub_error

# Written last: a folder with this file is complete, one without it cannot be taken for a model.
_MARKER = "config.json"
_STEPS = "checkpoint-[0-9]*"
ARTIFACTS = (
    _MARKER,
    "README.md",
    "chat_template.jinja",
    "configuration_nanogpt.py",
    "generation_config.json",
    "loss.png",
    "metrics.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "modeling_nanogpt.py",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "training_args.bin",
    _STEPS,
)


def check_checkpoint(checkpoint: str | Path) -> str:
    """Return the folder or Hub id as a string, or raise a `ValueError` that says what is wrong."""
    path = Path(checkpoint)
    if (path / _MARKER).is_file():
        return str(path)
    if path.is_dir():
        steps = sorted(path.glob(_STEPS), key=lambda p: p.stat().st_mtime)
        hint = f" It holds unfinished training: try {steps[-1]}." if steps else ""
        raise ValueError(f"{path} is no checkpoint folder: it has no {_MARKER}.{hint}")
    if path.exists():
        raise ValueError(f"{path} is a file; give the folder of a checkpoint, or a Hub id.")
    looks_like_a_path = path.is_absolute() or str(checkpoint).startswith((".", "~"))
    repo_id, _ = split_revision(checkpoint)
    if looks_like_a_path or repo_id.count("/") != 1 or Path(repo_id).parent.is_dir():
        raise ValueError(
            f"There is no checkpoint at {path}: no such folder, and it is not a Hub id."
        )
    return str(checkpoint)


def split_revision(checkpoint: str | Path) -> tuple[str, str]:
    """Split `user/name@revision` at the `@`; the revision of a folder, or by default, is main."""
    name, at, revision = str(checkpoint).partition("@")
    if not at or Path(checkpoint).exists():
        return str(checkpoint), "main"
    if not name or not revision:
        raise ValueError(f"{checkpoint} must be USER/NAME or USER/NAME@REVISION.")
    return name, revision


def load_checkpoint(checkpoint: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model, ready for use (`eval` mode), and the tokenizer of a folder or Hub id.

    A Hub id may name a branch, tag or commit: `user/name@revision`.

    Raises:
        ValueError: it is neither, or the Hub cannot be reached and has never been asked for it.
    """
    name, revision = split_revision(check_checkpoint(checkpoint))
    try:
        # False: without it transformers would ask on the terminal whether to run foreign code.
        own = {"trust_remote_code": False, "revision": revision}
        model, report = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **own)
        tokenizer = AutoTokenizer.from_pretrained(name, **own)
    except Exception as error:  # of several libraries, which share no base class
        if isinstance(error, OSError) and not Path(name).is_dir():
            raise ValueError(unreachable(str(checkpoint), "checkpoint folder", error)) from error
        why = " ".join(str(error).split())
        raise ValueError(f"{name} cannot be loaded: {why}") from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{name} has no weights for {', '.join(missing[:3])}: it is not whole.")
    return model.eval(), tokenizer


def unreachable(name: str, what: str, error: BaseException | None = None) -> str:
    """Say in one sentence why a Hub id could not be loaded, which raised `error`."""
    why = explain_hub_error(error)
    return f"{name!r} is no {what} here, and could not be loaded from the Hub: {why}."


def check_output_dir(
    output_dir: str | Path, *, overwrite: bool = False, resume: bool = False
) -> None:
    """Raise a `ValueError` unless a checkpoint can be written to `output_dir`; change nothing.

    A folder with something in it is taken with `resume`, which needs a `checkpoint-*` inside, or
    with `overwrite`, which needs everything inside to be a checkpoint's own.
    """
    path = Path(output_dir)
    check_writable(path, name="output_dir")
    content = {p.name for p in path.iterdir()} if path.is_dir() else set()
    if resume and not any(path.glob(_STEPS)):
        raise ValueError(
            f"output_dir={path} has no checkpoint-* to resume from; leave out --resume."
        )
    if not content or resume:
        return
    if not overwrite:
        raise ValueError(
            f"output_dir={path} exists and is not empty: choose another folder, or give --resume "
            "to go on from its last checkpoint, or --overwrite to train it anew."
        )
    known = {p.name for pattern in ARTIFACTS for p in path.glob(pattern)}
    if foreign := sorted(content - known):
        raise ValueError(
            f"output_dir={path} holds files that no training wrote ({', '.join(foreign[:3])}), "
            "so --overwrite does not touch it: choose another folder, or move them away."
        )


def check_writable(path: Path, *, name: str) -> None:
    """Raise a `ValueError`, calling the path `name`, unless a folder can be made there."""
    # os.path: Path.exists raises where a folder must not be looked into.
    parent = next(p for p in (path, *path.absolute().parents) if os.path.exists(p))
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{name}={path}: cannot write to {parent}; choose another folder.")


def clear_output_dir(output_dir: str | Path) -> None:
    """Delete what an earlier training left in `output_dir`, and nothing else."""
    for pattern in ARTIFACTS:
        for path in Path(output_dir).glob(pattern):
            real_folder = path.is_dir() and not path.is_symlink()
            shutil.rmtree(path) if real_folder else path.unlink()


@contextmanager
def staged_folder(destination: str | Path) -> Iterator[Path]:
    """Give a temporary folder whose files appear in `destination` when the block ends well.

    They are renamed into place on the same file system, `config.json` last; after an error, nothing
    of them is left.
    """
    destination = Path(destination)
    destination.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".staged-", dir=destination) as staged:
        yield Path(staged)
        for path in sorted(Path(staged).iterdir(), key=lambda p: p.name == _MARKER):
            os.replace(path, destination / path.name)
