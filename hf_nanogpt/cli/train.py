"""The verbs `train` and `tokenize`."""

import argparse
import itertools
import os
import shlex
import shutil
import sys
import textwrap
from typing import Any

from ..errors import UserError, printable, without_secrets
from .parser import Parser, quiet_libraries


def run_train(argv: list[str]) -> None:
    given = [word for word in argv if word not in ("--resume", "--overwrite")]
    recipe = argv.pop(0) if argv and not argv[0].startswith("-") else "quickstart"
    own = _make_train_parser()
    args, flags = own.parse_known_args(argv)
    if args.help:
        _print_train_help(own)
        return
    if args.resume and args.overwrite:
        raise UserError("--resume and --overwrite exclude each other: give one of them.")

    quiet_libraries()
    from ..training.run import train
    from ..training.stopping import TrainingInterrupted

    try:
        result = train(
            args.recipe or recipe,
            flags,
            start_from=args.start_from,
            resume=args.resume,
            overwrite=args.overwrite,
        )
    except TrainingInterrupted as interruption:
        if os.environ.get("RANK", "0") == "0":
            where = interruption.checkpoint or "the start, as no checkpoint was saved"
            print(
                f"\nInterrupted. To go on from {where}:\n  {_resume_command(given)}",
                file=sys.stderr,
            )
        sys.exit(128 + interruption.signum)
    if os.environ.get("RANK", "0") == "0":
        print(printable(_summary(result)))


def _make_train_parser() -> Parser:
    """Return the parser of what is no setting: those have one of their own."""
    parser = Parser(
        prog="hf-nanogpt train",
        usage="hf-nanogpt train [RECIPE] [--from CHECKPOINT] [--resume | --overwrite] "
        "[--SETTING VALUE ...]",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", help="instead of the first word")
    parser.add_argument(
        "--from",
        dest="start_from",
        metavar="CHECKPOINT",
        help="go on with this model, do not begin",
    )
    parser.add_argument("--resume", action="store_true", help="go on where it was stopped")
    parser.add_argument("--overwrite", action="store_true", help="train an existing folder anew")
    parser.add_argument("-h", "--help", action="store_true")
    return parser


def _own_name() -> str:
    """Return the words by which this program is called."""
    if shutil.which("hf-nanogpt"):
        return "hf-nanogpt"
    return "python -m hf_nanogpt" if sys.argv[0].endswith("__main__.py") else sys.argv[0]


def _resume_command(given: list[str]) -> str:
    name = _own_name()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        name = f"torchrun --nproc_per_node={os.environ['LOCAL_WORLD_SIZE']} -m hf_nanogpt"
    return f"{name} train {shlex.join([*_hide_secrets(given), '--resume'])}"


def _hide_secrets(words: list[str]) -> list[str]:
    """Leave tokens out of a command, and passwords out of the addresses in it: logs are kept."""
    kept, shown = [], True
    for word in words:
        flag, equals, value = word.partition("=")
        if word.startswith("--"):
            shown = not flag.endswith("token")
        if not shown:
            continue
        is_flag = word.startswith("--") and equals
        kept.append(f"{flag}={without_secrets(value)}" if is_flag else without_secrets(word))
    return kept


def _print_train_help(own: argparse.ArgumentParser) -> None:
    from ..training.arguments import list_recipes, make_parser

    print(own.format_help())
    print(f"recipes: {', '.join(list_recipes())}, or the path of a YAML file\n")
    print(make_parser().format_help())


_FIGURES = [
    ("validation loss", "eval_loss", ".4f", "nats per token"),
    ("perplexity", "perplexity", ".2f", ""),
    ("bits per byte", "bits_per_byte", ".4f", ""),
]


def _lay_side_by_side(left: str, right: str) -> str:
    width = (min(shutil.get_terminal_size().columns, 120) - 7) // 2
    columns = [
        [row for line in text.splitlines() for row in textwrap.wrap(line, width)]
        for text in (left, right)
    ]
    rows = itertools.zip_longest(*columns, fillvalue="")
    return "\n".join(f"  | {a:<{width}} | {b}" for a, b in rows)


def _summary(result: Any) -> str:
    m, folder = result.metrics, result.output_dir
    rows = {
        "parameters": f"{m['num_parameters']:,}",
        "tokens": f"{m['train_tokens']:,}",
        "time": f"{m['train_seconds']:,.0f} s",
    }
    if "tokens_per_second" in m:
        mfu = f" (MFU {m['mfu']:.0%})" if "mfu" in m else ""
        rows["tokens/s"] = f"{m['tokens_per_second']:,.0f}{mfu}"
    before = m.get("before")
    if before:
        rows["held-out text"] = f"{'before':>12} {'after':>12}"
    for name, key, form, unit in _FIGURES:
        known = f"{before[key]:>12{form}} {m[key]:>12{form}}" if before else f"{m[key]:{form}}"
        rows[name] = f"{known} {unit}".rstrip()
    table = "\n".join(f"  {name:<16} {value}" for name, value in rows.items())
    lines = "\n".join(f"  | {line}" for line in result.sample.splitlines())
    sample = f"A sample:\n{lines}\n\n" if lines else ""
    if before and lines:
        columns = _lay_side_by_side(before["sample"], result.sample)
        sample = f"From {result.prompt!r}, before and after:\n{columns}\n\n"
    me = _own_name()
    start = f"generate {folder} {shlex.quote(result.prompt)}"
    return f"""
{folder} is ready:
{table}

{sample}Next:
  {me} {f"chat {folder}" if m["is_chat"] else start}
  {me} eval {folder} --data YOUR_TEXT
  {me} info {folder}"""


def run_tokenize(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        from ..training.arguments import make_data_parser

        print(make_data_parser().format_help())
        return
    if len(argv) < 2 or argv[0].startswith("-") or argv[1].startswith("-"):
        raise UserError(
            "Give the text and then the folder to make: hf-nanogpt tokenize DATA FOLDER."
        )
    data, folder, *flags = argv

    quiet_libraries()
    from ..data.stored import tokenize_corpus
    from ..training.arguments import parse_data

    result = tokenize_corpus(parse_data([*flags, f"--data={data}"]), folder, show_progress=True)
    print(f"{folder} is ready, {result['vocab_size']:,} tokens in its vocabulary:")
    for name, part in result["splits"].items():
        documents, tokens, size = (f"{part[k]:,}" for k in ("documents", "tokens", "bytes"))
        print(f"  {name:<10} {documents} documents, {tokens} tokens of {size} bytes")
    print(f"\nNext:\n  hf-nanogpt train --data {shlex.quote(folder)}")
