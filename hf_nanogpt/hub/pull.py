"""Pull a checkpoint from the Hub: the whole folder as it was pushed, or nothing."""

import os
import shutil
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from ..checkpoint.loading import split_revision
from ..convert.folders import check_destination, written_folder
from ..errors import UserError, one_line
from ..hub_errors import FAILURES, explain_hub_error, retry
from ..untrusted import path_inside, read_json
from .staging import check_repo_id


def pull_checkpoint(
    checkpoint: str, destination: str | Path | None = None, *, verify: bool = True
) -> Path:
    """Download `user/name` or `user/name@revision` to a new folder, and return the checkpoint.

    A training checkpoint goes to `destination/checkpoint-N`, where `train --resume` looks for it.

    Args:
        destination: by default the name of the model.
        verify: compare the checksum of each file with the Hub's (SHA-256 for the weights).

    Raises:
        UserError: the id or revision does not exist, the destination is not empty, a file would
            land outside it, or a checksum differs. A damaged file is downloaded again next time.
    """
    name, revision = split_revision(checkpoint)
    check_repo_id(name)
    folder = check_destination(destination or name.split("/")[1])
    try:
        snapshot = Path(snapshot_download(name, revision=revision))
    except FAILURES as error:
        why = explain_hub_error(error)
        raise UserError(f"{checkpoint} could not be downloaded: {why}.") from error
    except ValueError as error:  # a file name that leads out of the folder
        raise UserError(f"{checkpoint} was not downloaded: {one_line(error)}") from error
    if verify:
        _verify(name, snapshot)
    # A training checkpoint goes one folder deeper, which also appears only when it is complete.
    state = snapshot / "trainer_state.json"
    step = _name_step(path_inside(snapshot, state.name)) if state.is_file() else ""
    with written_folder(folder) as staged:
        shutil.copytree(
            snapshot,
            staged / step,
            ignore=shutil.ignore_patterns(".gitattributes"),
            copy_function=partial(_copy_inside, snapshot),
            dirs_exist_ok=True,
        )
    return folder / step


def _name_step(state: Path) -> str:
    step = read_json(state).get("global_step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise UserError(f"{state} has global_step={step!r:.80}, which is not a number of steps.")
    return f"checkpoint-{step}"


def _copy_inside(snapshot: Path, source: str, target: str) -> None:
    shutil.copyfile(path_inside(snapshot, os.path.relpath(source, snapshot)), target)


def _verify(name: str, snapshot: Path) -> None:
    try:
        found = retry(lambda: HfApi().verify_repo_checksums(name, revision=snapshot.name))
    except FAILURES as error:
        raise UserError(
            f"{name} could not be compared with the Hub's checksums: {explain_hub_error(error)}. "
            "Try again, or use --no-verify to accept the download unchecked."
        ) from error
    for mismatch in found.mismatches:  # delete it from the cache, so that it is downloaded again
        (path := path_inside(snapshot, mismatch["path"])).resolve().unlink()
        path.unlink(missing_ok=True)
    if wrong := [*(m["path"] for m in found.mismatches), *found.missing_paths]:
        raise UserError(
            f"{name} arrived damaged ({', '.join(wrong)}) and was not kept: pull it again."
        )
