"""The verbs `push` and `pull`."""

import argparse
import shlex
import shutil
import tempfile

from . import VERBS
from .parser import Parser, quiet_libraries, sigterm_like_ctrl_c


@sigterm_like_ctrl_c()
def run_push(argv: list[str]) -> None:
    parser = Parser(prog="hf-nanogpt push", description=VERBS["push"], allow_abbrev=False)
    parser.add_argument("checkpoint", help="folder")
    parser.add_argument("repo_id", metavar="USER/NAME", help="Hub id, made if need be")
    parser.add_argument("--private", action="store_true", help="for a repository made by this push")
    parser.add_argument("--tag", help="of this release (default on main: a checksum of it)")
    parser.add_argument("--branch", help="instead of main; takes the training's state along")
    parser.add_argument(
        "--native", action="store_true", help="as a native model, which needs no code of its own"
    )
    parser.add_argument("--license", help="for the card, such as apache-2.0")
    parser.add_argument(
        "--language", nargs="+", metavar="CODE", help="for the card, such as en or code"
    )
    parser.add_argument("--dry_run", action="store_true", help="write the folder, send nothing")
    args = parser.parse(argv)

    quiet_libraries()
    from ..hub import push_to_hub, stage_release

    options = {
        name: getattr(args, name) for name in ("tag", "branch", "native", "license", "language")
    }
    if args.dry_run:
        folder = tempfile.mkdtemp(prefix="hf_nanogpt-push-")
        try:
            release = stage_release(args.checkpoint, folder, repo_id=args.repo_id, **options)
        except BaseException:
            shutil.rmtree(folder)
            raise
        print((release.folder / "README.md").read_text(encoding="utf-8"))
        for name, size in release.files.items():
            print(f"{size:>15,}  {name}")
        print(f"\n{folder} has these files; nothing was sent to {args.repo_id}.")
        return
    release = push_to_hub(args.checkpoint, args.repo_id, private=args.private, **options)
    how = "has the" if release.is_new else "had this content already: no new"
    print(f"{release.repo_id} {how} commit {release.commit}, on {release.branch}, and every file")
    print(f"of it is what it is here. To load just this: revision={release.revision!r}")
    print(f"\n  {release.url}")


@sigterm_like_ctrl_c()
def run_pull(argv: list[str]) -> None:
    parser = Parser(prog="hf-nanogpt pull", description=VERBS["pull"], allow_abbrev=False)
    parser.add_argument("checkpoint", metavar="USER/NAME[@REVISION]", help="Hub id")
    parser.add_argument("destination", nargs="?", help="folder to make (default: NAME)")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare each file's checksum with the Hub's (default: yes)",
    )
    args = parser.parse(argv)

    quiet_libraries()
    from ..hub import pull_checkpoint

    folder = pull_checkpoint(args.checkpoint, args.destination, verify=args.verify)
    print(f"{folder} is ready" + (", and every checksum fits." if args.verify else "."))
    print("\nNext:")
    if folder.name.startswith("checkpoint-"):
        print(f"  hf-nanogpt train RECIPE --resume --output_dir {shlex.quote(str(folder.parent))}")
    else:
        print(f"  hf-nanogpt generate {shlex.quote(str(folder))} 'Once upon a time'")
