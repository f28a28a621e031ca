"""Share a checkpoint on the Hub, in one commit that is checked after it has arrived."""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
)
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import TemplateError
from transformers import AutoConfig

from ..checkpoint import (
    ARTIFACTS,
    LOADING,
    check_checkpoint,
    load_checkpoint,
)
from ..configuration_nanogpt import NanoGPTConfig
from ..convert import export_checkpoint
from ..facts import publish_facts
from ..hub_errors import FAILURES, LOG_IN, explain_hub_error, retry
from ..untrusted import path_inside, read_json
from .card import render_model_card
from .card_edits import merge_card, read_card

# Listed, not found: what else lies in the folder is private, and no pickle is ever among them.
_RELEASED = (
    *(name for name in ARTIFACTS if not name.startswith(("training_args", "checkpoint-", "."))),
    "LICENSE",
    "added_tokens.json",
    "merges.txt",
    "vocab.json",
)
# What resuming needs besides; goes to a branch of its own only, for it has pickles.
_STATE = ("optimizer.*", "scheduler.pt", "scaler.pt", "rng_state*.pth", "trainer_state.json")
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


def push_to_hub(
    checkpoint: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    tag: str | None = None,
    branch: str | None = None,
    native: bool = False,
    license: str | None = None,
    language: list[str] | None = None,
    message: str | None = None,
    token: str | None = None,
) -> Release:
    """Push the folder of a checkpoint to `user/name` in one commit, checked by SHA-256, and tag it.

    Repeating a push is safe: the same content makes no commit. What a person changed in the card,
    here or on the Hub, stays. To a branch of its own, untagged, the state of the training goes
    along, so that it can be resumed from there.

    Args:
        private: for a repository that this push makes.
        tag: of this release; by default, on main, a checksum of its content.
        branch: by default main; made if need be.
        native: push what `export_checkpoint` makes of it instead.
        license, language: for the card, as the Hub calls them; by default what it says already.

    Raises:
        ValueError: the folder is no checkpoint of ours, a name is not possible, the card has
            invalid YAML, the Hub refuses, or it has another content under this tag.
    """
    with tempfile.TemporaryDirectory(prefix="hf_nanogpt-push-") as folder:
        release = stage_release(
            checkpoint,
            folder,
            repo_id=repo_id,
            tag=tag,
            branch=branch,
            native=native,
            license=license,
            language=language,
        )
        return send_release(replace(release, message=message), private=private, token=token)


def push_step(
    checkpoint: Path,
    repo_id: str,
    *,
    branch: str,
    num_parameters: int,
    message: str,
    private: bool | None = None,
    token: str | None = None,
) -> Release:
    """Push a checkpoint of a running training: no tag, and its loading is not tried first.

    `private` is for the repository, should somebody have deleted it meanwhile.
    """
    with tempfile.TemporaryDirectory(prefix="hf_nanogpt-push-") as folder:
        release = Release(Path(folder), repo_id, branch, branch, None, message)
        facts = {"num_parameters": num_parameters}
        return send_release(_stage(checkpoint, release, facts), private=private, token=token)


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
        raise ValueError(f"{checkpoint} is no folder here: pull it first, then push the folder.")
    model, _ = load_checkpoint(source)  # what does not load here would not load elsewhere
    if model.config.model_type != NanoGPTConfig.model_type:
        raise ValueError(
            f"{source} is a {model.config.model_type} model, not one of ours: push the checkpoint "
            "that it was exported from, with --native."
        )
    path = path_inside(source, "metrics.json")
    metrics = publish_facts(read_json(path)) if path.is_file() else {}
    metrics |= {"num_parameters": model.num_parameters()}
    card = {"license": license, "language": language}
    insist = tuple(name for name, value in card.items() if value)
    release = Release(Path(folder), repo_id, "", branch or "main", tag, insist=insist)
    return _stage(source, release, metrics, native=native, tag_content=True, card=card)


def _stage(
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
    kept = (*_RELEASED, *_STATE) if to_branch and not native else _RELEASED
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
    try:
        fresh = render_model_card(
            AutoConfig.from_pretrained(folder, trust_remote_code=False),
            metrics,
            name=release.repo_id,
            revision=release.revision,
            native=format,
            **(card or {}),
        )
    except (TypeError, ValueError, LookupError, AttributeError, TemplateError) as error:
        raise ValueError(
            f"{source / 'metrics.json'} does not hold what a training writes there ({error}): "
            "correct or delete it, and push again."
        ) from error
    write_card(fresh, source / "README.md", to=folder / "README.md", insist=release.insist)
    return release


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
    """Raise a `ValueError` unless a repository can have this id."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"repo_id={repo_id!r} is not possible: give USER/NAME of letters, digits, '-', '_' and "
            "'.', at most 96 of them."
        ) from error
    if repo_id.count("/") != 1:
        raise ValueError(f"repo_id={repo_id!r} must be USER/NAME, such as user/{repo_id}.")


def check_ref_names(*, tag: str | None = None, branch: str | None = None) -> None:
    """Raise a `ValueError` unless the Hub can have a tag and a branch of these names."""
    for kind, name in (("tag", tag), ("branch", branch)):
        if name is not None and _NOT_A_REF.search(name):
            raise ValueError(
                f"{kind}={name!r} is not possible: use letters, digits, '-', '_', '.' and '/', as "
                "in v1.0."
            )
    if tag is not None and tag in ("main", branch):
        raise ValueError(f"tag={tag!r} is the name of a branch: choose another tag, such as v1.")


# Sending


def send_release(
    release: Release, *, private: bool | None = None, token: str | None = None
) -> Release:
    """Send what `stage_release` wrote; return it with its commit. Raises as `push_to_hub`."""
    if not (token or get_token()):
        raise ValueError(f"{release.repo_id} cannot be pushed: {LOG_IN}.")
    api = HfApi(token=token)
    try:
        return _send(api, release, private)
    except FAILURES as error:
        raise ValueError(
            f"{release.repo_id} could not be pushed: {explain_hub_error(error)}. Nothing is lost "
            "here; the same command can be repeated."
        ) from error


def _send(api: HfApi, release: Release, private: bool | None) -> Release:
    name, branch, tag = release.repo_id, release.branch, release.tag
    retry(lambda: api.create_repo(name, private=private, exist_ok=True))
    if private and not retry(lambda: api.repo_info(name)).private:
        raise ValueError(
            f"{name} exists and is public: make it private on its page, or leave out --private."
        )
    refs = retry(lambda: api.list_repo_refs(name))
    branches = [ref.name for ref in refs.branches]
    tags = {ref.name: ref.target_commit for ref in refs.tags}
    for kind, other, value in (("tag", "branch", tag), ("branch", "tag", branch)):
        if value in (branches if kind == "tag" else tags):  # a revision must be one thing
            raise ValueError(
                f"{kind}={value} is not possible: {name} has a {other} of that name. Choose "
                "another."
            )
    if branch not in branches:
        retry(lambda: api.create_branch(name, branch=branch, exist_ok=True))
    release = retry(lambda: _commit(api, release, tags.get(tag or "")))
    found = retry(
        lambda: api.verify_repo_checksums(name, revision=release.commit, local_dir=release.folder)
    )
    if wrong := [*(m["path"] for m in found.mismatches), *found.extra_paths]:
        raise ValueError(f"{name} arrived damaged ({', '.join(wrong)}): repeat the push.")
    if tag and tag not in tags:
        retry(lambda: api.create_tag(name, tag=tag, revision=release.commit, exist_ok=True))
        _check_tag(api, release, tag)  # somebody else may have been faster
    return release


def _commit(api: HfApi, release: Release, tagged: str | None) -> Release:
    """Make the branch hold the release; the commit that does so already is the answer, if any.

    Sent again after an answer that was lost, it so finds its own commit. It is bound to the parent
    that it was made for: another pusher's commit in between is refused, and this one made anew.
    """
    name, folder = release.repo_id, release.folder
    head = api.repo_info(name, revision=release.branch).sha
    present = set(api.list_repo_files(name, revision=head))
    card = folder / "README.md"
    if "README.md" in present:
        theirs = read_card(api.hf_hub_download(name, "README.md", revision=head))
        where = f"README.md of {name}"
        text = merge_card(read_card(card), theirs, where=where, insist=release.insist)
        card.write_text(text, encoding="utf-8")
    ours = {path.name: path for path in folder.iterdir()}
    stale = [
        path
        for path in present - set(ours)
        if any(fnmatch(path, pattern) for pattern in (*_RELEASED, *_STATE))
    ]
    if tagged:
        _check_tag(api, release, tagged)
    operations = [CommitOperationAdd(path, file) for path, file in ours.items()]
    operations += [CommitOperationDelete(path) for path in stale]
    info = api.create_commit(
        name,
        operations,
        commit_message=release.message or f"Push {release.revision} with hf_nanogpt",
        revision=release.branch,
        parent_commit=head,
    )
    return replace(release, commit=info.oid, is_new=info.oid != head)


def _check_tag(api: HfApi, release: Release, revision: str) -> None:
    """Raise a `ValueError` unless a tag that exists has the content of the release."""
    if release.tag is None or release.tag.startswith("content-"):  # says by itself what it has
        return
    name, folder = release.repo_id, release.folder
    found = retry(lambda: api.verify_repo_checksums(name, revision=revision, local_dir=folder))
    if found.mismatches or found.extra_paths:
        raise ValueError(
            f"tag={release.tag} is in {name} already, with another content: choose another tag."
        )
