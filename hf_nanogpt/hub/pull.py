"""Fetch a checkpoint from the Hub, whole or not at all."""

import json
import shutil
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from ..checkpoint import split_revision, staged_folder
from ..convert.folders import check_destination
from ..hub_errors import explain_hub_error
from .release import FAILURES, check_repo_id


def pull_checkpoint(
    checkpoint: str, destination: str | Path | None = None, *, verify: bool = False
) -> Path:
    """Download `user/name` or `user/name@revision` to a new folder, whole or not at all.

    A training checkpoint lands in `destination/checkpoint-N`, where `train --resume` looks for it.

    Args:
        destination: by default the name of the model.
        verify: compare the checksum of each file with the Hub's (SHA-256 for the weights).

    Raises:
        ValueError: there is no such id or revision, the destination has content, or a checksum
            differs; downloading again then starts anew.
    """
    name, revision = split_revision(checkpoint)
    check_repo_id(name)
    folder = check_destination(destination or name.split("/")[1])
    try:
        snapshot = Path(snapshot_download(name, revision=revision))
        if verify:
            _verify(name, snapshot)
    except FAILURES as error:
        why = explain_hub_error(error)
        raise ValueError(f"{checkpoint} could not be downloaded: {why}.") from error
    if (state := snapshot / "trainer_state.json").is_file():
        step = json.loads(state.read_text())["global_step"]
        folder = check_destination(folder / f"checkpoint-{step}")
    with staged_folder(folder) as staged:
        shutil.copytree(
            snapshot, staged, ignore=shutil.ignore_patterns(".gitattributes"), dirs_exist_ok=True
        )
    return folder


def _verify(name: str, snapshot: Path) -> None:
    found = HfApi().verify_repo_checksums(name, revision=snapshot.name)
    for mismatch in found.mismatches:  # out of the cache, so that it is not taken for good again
        (snapshot / mismatch["path"]).resolve().unlink()
        (snapshot / mismatch["path"]).unlink(missing_ok=True)
    if wrong := [*(m["path"] for m in found.mismatches), *found.missing_paths]:
        raise ValueError(
            f"{name} arrived damaged ({', '.join(wrong)}), and was not kept: pull it again."
        )
