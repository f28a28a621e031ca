"""Stage a release: copy what is published of a checkpoint to a folder, and write its card."""

import hashlib
import json
import re
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig

from ..checkpoint.loading import LOADING, check_checkpoint, load_checkpoint
from ..checkpoint.writing import ARTIFACTS
from ..configuration_nanogpt import NanoGPTConfig
from ..convert import export_checkpoint
from ..errors import UserError, explain_errors
from ..untrusted import path_inside, read_json
from .card import render_model_card
from .card_edits import write_card
from .publishable import publish_facts

# Only listed files are published: others in the folder are private. None of these is a pickle.
RELEASED = (
    *(name for name in ARTIFACTS if not name.startswith(("training_args", "checkpoint-", "."))),
    "LICENSE",
    "added_tokens.json",
    "merges.txt",
    "vocab.json",
)
# Resuming also needs these. They go only to branches other than main, as some are pickles.
STATE = (
    *("optimizer.*", "scheduler.pt", "scaler.pt", "rng_state*.pth", "trainer_state.json"),
    "best.safetensors",
)
_PACKAGE = Path(__file__).parent.parent
_CODE = ("configuration_nanogpt.py", "modeling_nanogpt.py")
_NOT_LOADED = ("README.md", "metrics.json", "loss.png", "samples.jsonl", "LICENSE")
# What git forbids in a name (man git-check-ref-format), and names that would mean something else.
_NOT_A_REF = re.compile(
    r"[^\w./-]|^[./-]|[./]$|\.\.|//|/\.|\.lock(/|$)|^refs/|^HEAD$|^[0-9a-f]{40}$", re.ASCII
)


@dataclass(frozen=True)
class Release:
    """A staged folder with the options of `push_to_hub`; pushed, it also has its commit."""

    folder: Path
    repo_id: str
    branch: str = "main"
    tag: str | None = None
    native: bool = False
    license: str | None = None
    language: list[str] | None = None
    message: str | None = None
    commit: str | None = None
    is_new: bool = False

    @property
    def revision(self) -> str:
        """What pins this release, if it has a tag; else its branch."""
        return self.tag or self.branch

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"{constants.ENDPOINT}/{self.repo_id}"

    @property
    def files(self) -> dict[str, int]:
        """Size in bytes of each file, by name."""
        return {path.name: path.stat().st_size for path in sorted(self.folder.iterdir())}

    @property
    def overrides(self) -> list[str]:
        """Front matter of the card that this push sets, whatever it was before."""
        return [name for name in ("license", "language") if getattr(self, name)]


def stage_release(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    repo_id: str,
    tag: str | None = None,
    branch: str | None = None,
    **options: Any,
) -> Release:
    """Write to an empty folder what `push_to_hub` would send with these options; send nothing."""
    check_repo_id(repo_id)
    check_ref_names(tag=tag, branch=branch)
    source = Path(check_checkpoint(checkpoint))
    if not source.is_dir():
        raise UserError(f"{checkpoint} is not a local folder: pull it first, then push the folder.")
    model, _ = load_checkpoint(source)  # a checkpoint that does not load is not pushed
    if model.config.model_type != NanoGPTConfig.model_type:
        raise UserError(
            f"{source} is a {model.config.model_type} model, not a nanogpt model: push the "
            "checkpoint that it was exported from, with --native."
        )
    metrics_file = path_inside(source, "metrics.json")
    metrics = publish_facts(read_json(metrics_file)) if metrics_file.is_file() else {}
    metrics["num_parameters"] = model.num_parameters()

    release = Release(Path(folder), repo_id, branch or "main", tag, **options)
    export = _copy_files(source, release, metrics)
    if release.revision == "main":  # the default tag says which content it has
        release = replace(release, tag=f"content-{_sum_content(release.folder)}")
    # A person may have changed the metrics; without them, an error here would be a bug.
    explained = f"{metrics_file} has unexpected content, so correct or delete it"
    with explain_errors(explained) if metrics_file.is_file() else nullcontext():
        card = _render_card(release, metrics, export)
    write_card(
        card, source / "README.md", to=release.folder / "README.md", overrides=release.overrides
    )
    return release


def stage_step(checkpoint: Path, release: Release, num_parameters: int) -> None:
    """Stage a checkpoint of a running training, without loading it first."""
    metrics = {"num_parameters": num_parameters}
    _copy_files(checkpoint, release, metrics)
    card = _render_card(release, metrics)
    write_card(card, checkpoint / "README.md", to=release.folder / "README.md")


def _copy_files(source: Path, release: Release, metrics: dict[str, Any]) -> str | None:
    """Copy what is published of a checkpoint; return the format if it is a native export."""
    with_state = release.branch != "main" and not release.tag and not release.native
    patterns = (*RELEASED, *STATE) if with_state else RELEASED
    found = {path.name for pattern in patterns for path in source.glob(pattern) if path.is_file()}
    # Check all names before any file is read: a link may lead to a private file.
    files = {name: path_inside(source, name) for name in found if not name.endswith(".part")}
    export = None
    if release.native:
        with LOADING:
            export = export_checkpoint(source, release.folder).format
        files = {name: path for name, path in files.items() if name in _NOT_LOADED}
    else:  # the two model files are needed where hf_nanogpt is not installed
        files = {name: _PACKAGE / name for name in _CODE} | files
    for name, path in files.items():
        shutil.copyfile(path, release.folder / name)
    if "metrics.json" in files:
        text = json.dumps(metrics, indent=2) + "\n"
        (release.folder / "metrics.json").write_text(text, encoding="utf-8")
    return export


def _render_card(release: Release, metrics: dict[str, Any], export: str | None = None) -> str:
    return render_model_card(
        AutoConfig.from_pretrained(release.folder, trust_remote_code=False),
        metrics,
        name=release.repo_id,
        revision=release.revision,
        native=export,
        license=release.license,
        language=release.language,
    )


def _sum_content(folder: Path) -> str:
    """Return 12 digits that depend on every file that loading reads, and on nothing else."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name not in _NOT_LOADED:
            with path.open("rb") as file:
                checksum = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.name} {checksum}\n".encode())
    return digest.hexdigest()[:12]


def check_repo_id(repo_id: str) -> None:
    """Raise a `UserError` unless a repository can have this id."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(
            f"repo_id={repo_id!r} must be USER/NAME of letters, digits, '-', '_' and '.', and at "
            "most 96 characters."
        ) from error
    if repo_id.count("/") != 1:
        raise UserError(f"repo_id={repo_id!r} must be USER/NAME, such as user/{repo_id}.")


def check_ref_names(*, tag: str | None = None, branch: str | None = None) -> None:
    """Raise a `UserError` unless the Hub can have a tag and a branch of these names."""
    for option, name in (("tag", tag), ("branch", branch)):
        if name is not None and _NOT_A_REF.search(name):
            raise UserError(
                f"{option}={name!r} is not a possible name: use letters, digits, '-', '_', '.' and "
                "'/', as in v1.0."
            )
    if tag is not None and tag in ("main", branch):
        raise UserError(f"tag={tag!r} is the name of a branch: choose another tag, such as v1.")
