"""The verbs `push` and `pull`."""

import argparse
import shlex
import shutil
import tempfile

from . import VERBS
from .parser import Flags, load_libraries, parse_flags, sigterm_like_ctrl_c

_YES_OR_NO = {"action": argparse.BooleanOptionalAction}
_PUSH: Flags = [
    ("checkpoint", str, None, "folder"),
    ("repo_id USER/NAME", str, None, "Hub id; the repository is created if needed"),
    ("--private", bool, False, "create the repository as private, if it does not exist"),
    ("--tag", str, None, "tag of this release (default on main: a checksum of its files)"),
    ("--branch", str, None, "branch instead of main; includes the training state"),
    ("--native", bool, False, "push a native transformers model, which needs no code of its own"),
    ("--license", str, None, "for the card, such as apache-2.0"),
    ("--language CODE", str, None, "for the card, such as en or code", {"nargs": "+"}),
    ("--dry_run", bool, False, "write the folder, send nothing"),
]
_PULL: Flags = [
    ("checkpoint USER/NAME[@REVISION]", str, None, "Hub id"),
    ("destination", str, None, "folder to create (default: NAME)", {"nargs": "?"}),
    ("--verify", str, True, "compare each file's checksum with the Hub's", _YES_OR_NO),
]


@sigterm_like_ctrl_c()
def run_push(argv: list[str]) -> None:
    options = vars(parse_flags("push", VERBS["push"], _PUSH, argv))
    checkpoint, repo_id = options.pop("checkpoint"), options.pop("repo_id")
    private, dry_run = options.pop("private"), options.pop("dry_run")
    if dry_run:
        _show_release(checkpoint, repo_id, options)
        return

    load_libraries()
    from ..hub import push_to_hub

    release = push_to_hub(checkpoint, repo_id, private=private, **options)
    how = "has" if release.is_new else "already had this content:"
    print(f"{release.repo_id} {how} commit {release.commit} on {release.branch}, and every file")
    print(f"there equals the local one. To load exactly this: revision={release.revision!r}")
    print(f"\n  {release.url}")


def _show_release(checkpoint: str, repo_id: str, options: dict) -> None:
    """Write the files of a release to a temporary folder, and print its card and their sizes."""
    load_libraries()
    from ..hub import stage_release

    folder = tempfile.mkdtemp(prefix="hf_nanogpt-push-")
    try:
        release = stage_release(checkpoint, folder, repo_id=repo_id, **options)
    except BaseException:
        shutil.rmtree(folder)
        raise
    print((release.folder / "README.md").read_text(encoding="utf-8"))
    for name, size in release.files.items():
        print(f"{size:>15,}  {name}")
    print(f"\n{folder} has these files; nothing was sent to {repo_id}.")


@sigterm_like_ctrl_c()
def run_pull(argv: list[str]) -> None:
    args = parse_flags("pull", VERBS["pull"], _PULL, argv)

    load_libraries()
    from ..checkpoint.writing import RECIPE
    from ..hub import pull_checkpoint

    folder = pull_checkpoint(args.checkpoint, args.destination, verify=args.verify)
    print(f"{folder} is ready" + (", and every checksum matches." if args.verify else "."))
    print("\nNext:")
    if folder.name.startswith("checkpoint-"):
        # A run that chose its settings has them in the checkpoint.
        recipe = "--data DATA" if (folder / RECIPE).is_file() else "RECIPE"
        run = shlex.quote(str(folder.parent))
        print(f"  hf-nanogpt train {recipe} --resume --output_dir {run}")
    else:
        print(f"  hf-nanogpt generate {shlex.quote(str(folder))} 'Once upon a time'")
