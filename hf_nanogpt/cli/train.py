"""The verbs `train` and `tokenize`."""

import itertools
import os
import shlex
import shutil
import sys
import textwrap
from typing import Any

from ..errors import UserError, printable, without_secrets
from ..training.recipes import list_recipes
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
    if args.resume and args.overwrite:
        raise UserError("--resume and --overwrite exclude each other: give one of them.")

    load_libraries()
    if args.show:
        print(printable(_show_settings(args.recipe or recipe, flags, getattr(args, "from"))))
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
        print(printable(_summary(result)))


def _show_settings(recipe: str | None, flags: list[str], start_from: str | None) -> str:
    """Return a line for each setting: name, value and where it comes from."""
    from ..training.origins import explain_settings

    settings = explain_settings(recipe, flags, start_from=start_from)
    lines = []
    for group, rows in itertools.groupby(settings, lambda setting: setting.group):
        lines.append(f"{group}:")
        for row in rows:
            value = textwrap.shorten(without_secrets(str(row.value)), 40, placeholder=" ...")
            lines.append(f"  {row.name:<30} {value:<40} {row.origin}")
    if start_from:
        lines.append(f"model:\n  that of {start_from}")
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


_FIGURES = [
    ("validation loss", "eval_loss", ".4f", "nats per token"),
    ("perplexity", "perplexity", ".2f", ""),
    ("bits per byte", "bits_per_byte", ".4f", ""),
]


def _summary(result: Any) -> str:
    """Return the figures of a finished training, a sample of its text, and what to do next."""
    folder, is_chat = result.output_dir, result.metrics["is_chat"]
    program = _program_name()
    start = f"chat {folder}" if is_chat else f"generate {folder} {shlex.quote(result.prompt)}"
    return f"""
{folder} is ready:
{_table(result.metrics)}

{_sample(result)}Next:
  {program} {start}
  {program} eval {folder} --data YOUR_TEXT
  {program} info {folder}"""


def _table(metrics: dict[str, Any]) -> str:
    rows = {
        "parameters": f"{metrics['num_parameters']:,}",
        "tokens": f"{metrics['train_tokens']:,}",
        "time": f"{metrics['train_seconds']:,.0f} s",
    }
    if "tokens_per_second" in metrics:
        mfu = f" (MFU {metrics['mfu']:.0%})" if "mfu" in metrics else ""
        rows["tokens/s"] = f"{metrics['tokens_per_second']:,.0f}{mfu}"
    before = metrics.get("before")  # when training started from a checkpoint
    if before:
        rows["held-out text"] = f"{'before':>12} {'after':>12}"
    for name, key, form, unit in _FIGURES:
        value = metrics[key]
        figure = f"{before[key]:>12{form}} {value:>12{form}}" if before else f"{value:{form}}"
        rows[name] = f"{figure} {unit}".rstrip()
    return "\n".join(f"  {name:<16} {value}" for name, value in rows.items())


def _sample(result: Any) -> str:
    if not result.sample:
        return ""
    if before := result.metrics.get("before"):
        columns = _lay_side_by_side(before["sample"], result.sample)
        return f"From {result.prompt!r}, before and after:\n{columns}\n\n"
    lines = "\n".join(f"  | {line}" for line in result.sample.splitlines())
    return f"A sample:\n{lines}\n\n"


def _lay_side_by_side(left: str, right: str) -> str:
    width = (min(shutil.get_terminal_size().columns, 120) - 7) // 2
    columns = [
        [row for line in text.splitlines() for row in textwrap.wrap(line, width)]
        for text in (left, right)
    ]
    rows = itertools.zip_longest(*columns, fillvalue="")
    return "\n".join(f"  | {a:<{width}} | {b}" for a, b in rows)


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
