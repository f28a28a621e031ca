"""The verbs `train` and `tokenize`."""

import itertools
import os
import shlex
import shutil
import sys
import textwrap

from ..errors import UserError, printable, without_secrets
from ..training.recipes import list_recipes
from .last_screen import render_last_screen
from .parser import Flags, Parser, add_flags, load_libraries
from .train_help import print_help

# What is not a setting. The settings have a parser of their own, in training/arguments.py.
_TRAIN: Flags = [
    ("--recipe", str, None, "name or YAML file, as the first argument"),
    ("--from CHECKPOINT", str, None, "start from this checkpoint instead of from scratch"),
    ("--resume", bool, False, "resume an interrupted run"),
    ("--overwrite", bool, False, "delete the run in output_dir and start again"),
    ("--show", bool, False, "print each setting and where it comes from, and train nothing"),
]
_TRAIN_USAGE = (
    "hf-nanogpt train [RECIPE] [--from CHECKPOINT] [--resume | --overwrite | --show]"
    " [--SETTING VALUE ...]"
)


def run_train(argv: list[str]) -> None:
    command = [word for word in argv if word not in ("--resume", "--overwrite")]
    recipe = argv.pop(0) if argv and not argv[0].startswith("-") else None
    parser = Parser("train", usage=_TRAIN_USAGE, add_help=False)
    parser.add_argument("-h", "--help", nargs="?", const="", metavar="GROUP")
    add_flags(parser, _TRAIN)
    args, flags = parser.parse_known_args(argv)
    if args.help is not None:
        print_help(_TRAIN_USAGE, list_recipes(), args.help or None)
        return
    if recipe and args.recipe:
        raise UserError(f"{recipe} and --recipe={args.recipe} are both given: keep one of them.")
    if args.resume and args.overwrite:
        raise UserError("--resume and --overwrite exclude each other: give one of them.")

    load_libraries()
    if args.show:
        chosen = args.recipe or recipe
        print(printable(_show_settings(chosen, flags, getattr(args, "from"), args.resume)))
        return
    from ..training.run import train
    from ..training.stopping import TrainingInterrupted

    is_first = os.environ.get("RANK", "0") == "0"  # of the processes that train together
    try:
        result = train(
            args.recipe or recipe,
            flags,
            start_from=getattr(args, "from"),
            resume=args.resume,
            overwrite=args.overwrite,
        )
    except TrainingInterrupted as interruption:
        if is_first:
            where = interruption.checkpoint or "the start, as no checkpoint was saved"
            how = _resume_command(command)
            print(f"\nInterrupted. To resume from {where}:\n  {how}", file=sys.stderr)
        sys.exit(128 + interruption.signum)
    if is_first:
        print(printable(render_last_screen(result, _program_name())))


def _show_settings(
    recipe: str | None, flags: list[str], start_from: str | None, resume: bool
) -> str:
    """Return a line for each setting: name, value and where it comes from; and why."""
    from ..training.choosing import settle_recipe
    from ..training.origins import explain_settings
    from ..training.recipes import Choice

    chosen = settle_recipe(recipe, flags, start_from=start_from, resume=resume)
    settings = explain_settings(chosen, flags, start_from=start_from)
    lines = []
    for group, rows in itertools.groupby(settings, lambda setting: setting.group):
        lines.append(f"{group}:")
        for row in rows:
            value = textwrap.shorten(without_secrets(str(row.value)), 40, placeholder=" ...")
            lines.append(f"  {row.name:<30} {value:<40} {row.origin}")
    if start_from:
        lines.append(f"model:\n  that of {start_from}")
    if isinstance(chosen, Choice) and chosen.reasons:
        lines += [f"{chosen}:", *(f"  {reason}" for reason in chosen.reasons)]
    return "\n".join(lines)


def _program_name() -> str:
    """Return how this program is called on this machine."""
    if shutil.which("hf-nanogpt"):
        return "hf-nanogpt"
    return "python -m hf_nanogpt" if sys.argv[0].endswith("__main__.py") else sys.argv[0]


def _resume_command(command: list[str]) -> str:
    name = _program_name()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        name = f"torchrun --nproc_per_node={os.environ['LOCAL_WORLD_SIZE']} -m hf_nanogpt"
    return f"{name} train {shlex.join([*_hide_secrets(command), '--resume'])}"


def _hide_secrets(command: list[str]) -> list[str]:
    """Remove tokens from a command, and passwords from its addresses: logs are kept."""
    kept, follows_token = [], False
    for word in command:
        flag, equals, value = word.partition("=")
        if word.startswith("--"):
            follows_token = flag.endswith("token")
        if follows_token:
            continue
        is_flag = word.startswith("--") and equals
        kept.append(f"{flag}={without_secrets(value)}" if is_flag else without_secrets(word))
    return kept


def run_tokenize(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        from ..training.arguments import make_data_parser

        print(make_data_parser().format_help())
        return
    if len(argv) < 2 or argv[0].startswith("-") or argv[1].startswith("-"):
        raise UserError("Give the text and the new folder: hf-nanogpt tokenize DATA FOLDER.")
    data, folder, *flags = argv

    load_libraries()
    from ..data.stored import tokenize_corpus
    from ..training.arguments import parse_data

    result = tokenize_corpus(parse_data([*flags, f"--data={data}"]), folder, show_progress=True)
    print(f"{folder} is ready, {result['vocab_size']:,} tokens in its vocabulary:")
    for name, part in result["splits"].items():
        documents, tokens, size = (f"{part[k]:,}" for k in ("documents", "tokens", "bytes"))
        print(f"  {name:<10} {documents} documents, {tokens} tokens of {size} bytes")
    print(f"\nNext:\n  hf-nanogpt train --data {shlex.quote(folder)}")
