"""Push a checkpoint to the Hub: one commit, compared with the local files after it arrived."""

import tempfile
from dataclasses import replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.utils import filter_repo_objects

from ..errors import UserError, one_line
from ..hub_errors import FAILURES, LOG_IN, explain_hub_error, retry
from .card_edits import read_card, write_card
from .staging import RELEASED, STATE, Release, stage_release, stage_step


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

    A push can be repeated: the same content makes no new commit. What a person changed in the card,
    locally or on the Hub, is kept. A push to a branch other than main, without a tag, includes the
    training state, so that training can resume from there.

    Args:
        private: create the repository as private.
        tag: name of this release; by default, on main, a checksum of its content.
        branch: main by default; created if missing.
        native: push the folder that `export_checkpoint` writes instead of this one.
        license, language: for the card, as the Hub calls them; by default what it says already.

    Raises:
        UserError: the folder is not one of our checkpoints, a name is not possible, the card has
            invalid YAML, the Hub refuses, or the tag exists with another content.
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
            message=message,
        )
        return _send(release, private=private, token=token)


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
    """Push a checkpoint of a running training, without a tag.

    `private` is used if the repository has to be created again, because somebody deleted it.
    """
    with tempfile.TemporaryDirectory(prefix="hf_nanogpt-push-") as folder:
        release = Release(Path(folder), repo_id, branch, message=message)
        stage_step(checkpoint, release, num_parameters)
        return _send(release, private=private, token=token)


def _send(release: Release, *, private: bool | None, token: str | None) -> Release:
    """Push a staged folder; return the release with its commit. Raises as `push_to_hub` does."""
    name, tag = release.repo_id, release.tag
    if not (token or get_token()):
        raise UserError(f"{name} cannot be pushed: {LOG_IN}.")
    api = HfApi(token=token)
    try:
        tags = _prepare_repository(api, release, private)
        release = retry(lambda: _commit(api, release, tags.get(tag or "")))
        if wrong := _find_differences(api, release, release.commit):
            raise UserError(f"{name} arrived damaged ({', '.join(wrong)}): push again.")
        if tag and tag not in tags:
            retry(lambda: api.create_tag(name, tag=tag, revision=release.commit, exist_ok=True))
            _check_tag(api, release, tag)  # another process may have created it first
    except FAILURES as error:
        raise UserError(
            f"{name} could not be pushed: {explain_hub_error(error)}. The local folder is "
            "unchanged, and the same command can be repeated."
        ) from error
    except UserError:
        raise
    except ValueError as error:  # the Hub refuses the card, for example its license
        raise UserError(f"{name} could not be pushed: {one_line(error)}") from error
    return release


def _prepare_repository(api: HfApi, release: Release, private: bool | None) -> dict[str, str]:
    """Create repository and branch if missing; return the commit of each tag that exists."""
    name, branch, tag = release.repo_id, release.branch, release.tag
    retry(lambda: api.create_repo(name, private=private, exist_ok=True))
    if private and not retry(lambda: api.repo_info(name)).private:
        raise UserError(
            f"{name} exists and is public: make it private on its page, or leave out --private."
        )
    refs = retry(lambda: api.list_repo_refs(name))
    branches = {ref.name for ref in refs.branches}
    tags = {ref.name: ref.target_commit for ref in refs.tags}
    # A revision must mean one thing only.
    if tag in branches:
        raise UserError(f"tag={tag} cannot be used: {name} has a branch of that name.")
    if branch in tags:
        raise UserError(f"branch={branch} cannot be used: {name} has a tag of that name.")
    if branch not in branches:
        retry(lambda: api.create_branch(name, branch=branch, exist_ok=True))
    return tags


def _commit(api: HfApi, release: Release, tagged: str | None) -> Release:
    """Make the branch hold exactly the release, in one commit; `tagged` is what the tag points to.

    If the branch holds it already, no commit is made: so a retry after a lost answer finds the
    commit of the first attempt. `parent_commit` makes the Hub refuse the commit if another one came
    first; `retry` then starts again from that one.
    """
    name = release.repo_id
    head = api.repo_info(name, revision=release.branch).sha
    present = set(api.list_repo_files(name, revision=head))
    if "README.md" in present:  # keep what a person changed there
        earlier = Path(api.hf_hub_download(name, "README.md", revision=head))
        staged, where = release.folder / "README.md", f"README.md of {name}"
        write_card(read_card(staged), earlier, to=staged, where=where, overrides=release.overrides)
    if tagged:
        _check_tag(api, release, tagged)
    # Not `upload_folder`: with hf_xet, it may split a slow or large upload into several commits, of
    # which only the last is a whole model.
    stale = filter_repo_objects(present - set(release.files), allow_patterns=[*RELEASED, *STATE])
    info = api.create_commit(
        name,
        [
            *(CommitOperationAdd(file, release.folder / file) for file in release.files),
            *(CommitOperationDelete(file) for file in stale),
        ],
        commit_message=release.message or f"Push {release.revision} with hf_nanogpt",
        revision=release.branch,
        parent_commit=head,
    )
    return replace(release, commit=info.oid, is_new=info.oid != head)


def _check_tag(api: HfApi, release: Release, revision: str) -> None:
    """Raise a `UserError` unless a tag that exists has the content of the release."""
    # A content tag needs no check: its name is the checksum of the content.
    if release.tag is None or release.tag.startswith("content-"):
        return
    if _find_differences(api, release, revision):
        raise UserError(
            f"tag={release.tag} exists in {release.repo_id} with another content: choose another "
            "tag."
        )


def _find_differences(api: HfApi, release: Release, revision: str | None) -> list[str]:
    """Return the staged files that differ from those of a revision, or are missing there."""
    found = retry(
        lambda: api.verify_repo_checksums(
            release.repo_id, revision=revision, local_dir=release.folder
        )
    )
    return [*(mismatch["path"] for mismatch in found.mismatches), *found.extra_paths]
