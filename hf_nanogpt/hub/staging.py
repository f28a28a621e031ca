"""The folder that goes to the Hub: what is published of a checkpoint, and under which names."""

import hashlib
import json
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import TemplateError
from transformers import AutoConfig

from ..checkpoint.folder import ARTIFACTS, LOADING, check_checkpoint, load_checkpoint
from ..configuration_nanogpt import NanoGPTConfig
from ..convert import export_checkpoint
from ..errors import UserError
from ..untrusted import path_inside, read_json
from .card import render_model_card
from .card_edits import merge_card, read_card
from .publishable import publish_facts

# Listed, not found: what else lies in the folder is private, and no pickle is ever among them.
RELEASED = (
    *(name for name in ARTIFACTS if not name.startswith(("training_args", "checkpoint-", "."))),
    "LICENSE",
    "added_tokens.json",
    "merges.txt",
    "vocab.json",
)
# What resuming needs besides; goes to a branch of its own only, for it has pickles.
STATE = ("optimizer.*", "scheduler.pt", "scaler.pt", "rng_state*.pth", "trainer_state.json")
_CODE = ("configuration_nanogpt.py", "modeling_nanogpt.py")
_NOT_LOADED = ("README.md", "metrics.json", "loss.png", "samples.jsonl", "LICENSE")
# What git forbids in a name (man git-check-ref-format), and names that would mean something else.
_NOT_A_REF = re.compile(
    r"[^\w./-]|^[./-]|[./]$|\.\.|//|/\.|\.lock(/|$)|^refs/|^HEAD$|^[0-9a-f]{40}$", re.ASCII
)


@dataclass(frozen=True)
class Release:
    """A folder as it goes to the Hub: the id, the revision that pins it, and the commit, if any.

    `insist` names the front matter of its card in which a person's earlier word does not count.
    """

    folder: Path
    repo_id: str
    revision: str
    branch: str
    tag: str | None
    message: str | None = None
    insist: tuple[str, ...] = ()
    commit: str | None = None
    is_new: bool = False

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"{constants.ENDPOINT}/{self.repo_id}"

    @property
    def files(self) -> dict[str, int]:
        """Size in bytes of each file, by name."""
        return {path.name: path.stat().st_size for path in sorted(self.folder.iterdir())}


def stage_release(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    repo_id: str,
    tag: str | None = None,
    branch: str | None = None,
    native: bool = False,
    license: str | None = None,
    language: list[str] | None = None,
) -> Release:
    """Write what `push_to_hub` would send to an empty folder, and send nothing."""
    check_repo_id(repo_id)
    check_ref_names(tag=tag, branch=branch)
    source = Path(check_checkpoint(checkpoint))
    if not source.is_dir():
        raise UserError(f"{checkpoint} is no folder here: pull it first, then push the folder.")
    model, _ = load_checkpoint(source)  # what does not load here would not load elsewhere
    if model.config.model_type != NanoGPTConfig.model_type:
        raise UserError(
            f"{source} is a {model.config.model_type} model, not one of ours: push the checkpoint "
            "that it was exported from, with --native."
        )
    path = path_inside(source, "metrics.json")
    metrics = publish_facts(read_json(path)) if path.is_file() else {}
    metrics |= {"num_parameters": model.num_parameters()}
    card = {"license": license, "language": language}
    insist = tuple(name for name, value in card.items() if value)
    release = Release(Path(folder), repo_id, "", branch or "main", tag, insist=insist)
    return stage(source, release, metrics, native=native, tag_content=True, card=card)


def stage(
    source: Path,
    release: Release,
    metrics: dict[str, Any],
    *,
    native: bool = False,
    tag_content: bool = False,
    card: dict[str, Any] | None = None,
) -> Release:
    folder = release.folder
    to_branch = release.branch != "main" and not release.tag
    kept = (*RELEASED, *STATE) if to_branch and not native else RELEASED
    known = {path.name for pattern in kept for path in source.glob(pattern) if path.is_file()}
    known = {name for name in known if not name.endswith(".part")}
    # All of them before anything is read: a link may lead to what nobody meant to publish.
    files = {name: path_inside(source, name) for name in sorted(known)}
    format = None
    if native:
        with LOADING:
            format = export_checkpoint(source, folder).format
        files = {name: path for name, path in files.items() if name in _NOT_LOADED}
    for name, path in files.items():
        shutil.copyfile(path, folder / name)
    if "metrics.json" in files:
        text = json.dumps(metrics, indent=2) + "\n"
        (folder / "metrics.json").write_text(text, encoding="utf-8")
    if not native:
        for name in set(_CODE) - known:
            shutil.copyfile(Path(__file__).parent.with_name(name), folder / name)
    tag = release.tag
    if tag is None and tag_content and release.branch == "main":
        tag = f"content-{_checksum(folder)}"
    release = replace(release, tag=tag, revision=tag or release.branch)
    path = source / "metrics.json"
    options = {"name": release.repo_id, "revision": release.revision, "native": format}
    fresh = _render(folder, metrics, path, **options, **(card or {}))
    write_card(fresh, source / "README.md", to=folder / "README.md", insist=release.insist)
    return release


def _render(folder: Path, metrics: dict[str, Any], path: Path, **options: Any) -> str:
    """Render the card of a folder; a `UserError` names the file that the metrics are from."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    try:
        return render_model_card(config, metrics, **options)
    except (TypeError, ValueError, LookupError, AttributeError, TemplateError) as error:
        raise UserError(
            f"{path} does not hold what a training writes there ({error}): correct or delete it, "
            "and push again."
        ) from error


def write_card(
    card: str, path: Path, *, to: Path | None = None, insist: Collection[str] = ()
) -> None:
    """Write a card, with what a person changed in an earlier one at `path`, there or elsewhere."""
    written = read_card(path_inside(path.parent, path.name)) if path.is_file() else ""
    merged = merge_card(card, written, where=str(path), insist=insist)
    (to or path).write_text(merged, encoding="utf-8")


def _checksum(folder: Path) -> str:
    """Return 12 digits that depend on all that is loaded from a folder, and on nothing else."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name not in _NOT_LOADED:
            with path.open("rb") as file:
                inner = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.name} {inner}\n".encode())
    return digest.hexdigest()[:12]


def check_repo_id(repo_id: str) -> None:
    """Raise a `UserError` unless a repository can have this id."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(
            f"repo_id={repo_id!r} is not possible: give USER/NAME of letters, digits, '-', '_' and "
            "'.', at most 96 of them."
        ) from error
    if repo_id.count("/") != 1:
        raise UserError(f"repo_id={repo_id!r} must be USER/NAME, such as user/{repo_id}.")


def check_ref_names(*, tag: str | None = None, branch: str | None = None) -> None:
    """Raise a `UserError` unless the Hub can have a tag and a branch of these names."""
    for kind, name in (("tag", tag), ("branch", branch)):
        if name is not None and _NOT_A_REF.search(name):
            raise UserError(
                f"{kind}={name!r} is not possible: use letters, digits, '-', '_', '.' and '/', as "
                "in v1.0."
            )
    if tag is not None and tag in ("main", branch):
        raise UserError(f"tag={tag!r} is the name of a branch: choose another tag, such as v1.")
