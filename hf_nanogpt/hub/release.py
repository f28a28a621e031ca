"""Share a checkpoint on the Hub, in one commit that is checked after it has arrived."""

import tempfile
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

from ..errors import UserError
from ..hub_errors import FAILURES, LOG_IN, explain_hub_error, retry
from .card_edits import merge_card, read_card
from .staging import RELEASED, STATE, Release, stage, stage_release


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
        UserError: the folder is no checkpoint of ours, a name is not possible, the card has
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
        return send_release(stage(checkpoint, release, facts), private=private, token=token)


def send_release(
    release: Release, *, private: bool | None = None, token: str | None = None
) -> Release:
    """Send what `stage_release` wrote; return it with its commit. Raises as `push_to_hub`."""
    if not (token or get_token()):
        raise UserError(f"{release.repo_id} cannot be pushed: {LOG_IN}.")
    api = HfApi(token=token)
    try:
        return _send(api, release, private)
    except FAILURES as error:
        raise UserError(
            f"{release.repo_id} could not be pushed: {explain_hub_error(error)}. Nothing is lost "
            "here; the same command can be repeated."
        ) from error


def _send(api: HfApi, release: Release, private: bool | None) -> Release:
    name, branch, tag = release.repo_id, release.branch, release.tag
    retry(lambda: api.create_repo(name, private=private, exist_ok=True))
    if private and not retry(lambda: api.repo_info(name)).private:
        raise UserError(
            f"{name} exists and is public: make it private on its page, or leave out --private."
        )
    refs = retry(lambda: api.list_repo_refs(name))
    branches = [ref.name for ref in refs.branches]
    tags = {ref.name: ref.target_commit for ref in refs.tags}
    for kind, other, value in (("tag", "branch", tag), ("branch", "tag", branch)):
        if value in (branches if kind == "tag" else tags):  # a revision must be one thing
            raise UserError(
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
        raise UserError(f"{name} arrived damaged ({', '.join(wrong)}): repeat the push.")
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
        if any(fnmatch(path, pattern) for pattern in (*RELEASED, *STATE))
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
    """Raise a `UserError` unless a tag that exists has the content of the release."""
    if release.tag is None or release.tag.startswith("content-"):  # says by itself what it has
        return
    name, folder = release.repo_id, release.folder
    found = retry(lambda: api.verify_repo_checksums(name, revision=revision, local_dir=folder))
    if found.mismatches or found.extra_paths:
        raise UserError(
            f"tag={release.tag} is in {name} already, with another content: choose another tag."
        )
