"""The verbs `eval`, `info`, `doctor` and `bench`."""

import logging
import sys
from pathlib import Path
from typing import Any

from ..errors import UserError, printable
from . import VERBS
from .parser import Flags, Parser, add_flags, load_libraries, parse_flags

_EVAL: Flags = [
    ("checkpoints CHECKPOINT", str, None, "folder or Hub id; several are compared", {"nargs": "+"}),
    ("--batch_size", int, 16, "blocks in a batch"),
    ("--plot FILE", str, None, "draw the comparison: .png, .svg or .pdf"),
    ("--quantize", ["int8"], None, "measure the model with 8-bit weights"),
]
_EVAL_ON: Flags = [
    ("--data", str, None, "text: file, folder, glob, table or Hub dataset id"),
    ("--tasks", str, None, "tasks of lm-eval: names or YAML files, separated by commas"),
]
_EVAL_ON_DATA: Flags = [
    ("--text_column", str, None, "column of a table that holds the text"),
    ("--context_length", int, None, "tokens in a block (default: the model's)"),
    ("--stride", int, None, "predict so many tokens at a time, each after a full context"),
    (
        "--held_out SHARE",
        float,
        None,
        "only what training with validation_fraction=SHARE holds out; a warning tells the "
        "checkpoint's own share, if it was trained on this text",
    ),
    (
        "--no_document_mask",
        bool,
        None,
        "let the documents of a block see those before them, as in training without the mask",
    ),
]
_EVAL_ON_TASKS: Flags = [
    ("--num_fewshot", int, None, "solved examples before each question"),
    ("--limit", int, None, "use only this many questions of each task"),
]


def run_eval(argv: list[str]) -> None:
    args = _parse_eval(argv)

    load_libraries()
    from ..analysis.compare import compare_on_tasks, compare_on_text, format_table
    from ..analysis.plots import check_picture, plot_comparison

    if plot := args.pop("plot", None):
        check_picture(plot)
    args["quantize"] = "quantize" in args
    if args.pop("no_document_mask", False):
        args["document_mask"] = False
    if "data" in args:
        _warn_of_trained_text(args["checkpoints"], args["data"], args.get("held_out"))
        comparison = compare_on_text(**args, show_progress=True)
    else:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        comparison = compare_on_tasks(**args | {"tasks": args["tasks"].split(",")})
    rows = comparison.rows
    if "data" in args and len(rows) == 2:  # one checkpoint: its figures line by line
        units = {"loss": " nats per token"}
        for name, figure in list(zip(*rows, strict=True))[1:]:
            print(f"{name:<14} {figure}{units.get(name, '')}")
    else:
        print(format_table(rows))
    if plot:
        try:
            plot_comparison(comparison.figures, plot)
        except OSError as error:  # the figures are printed already
            raise UserError(f"plot={plot} cannot be written: {error.strerror}.") from error
        print(f"\nPlot saved to {plot}.")


def _warn_of_trained_text(checkpoints: list[str], data: str, held_out: float | None) -> None:
    """Warn if a checkpoint was trained on the same text and held out another share of it."""
    from ..checkpoint.loading import check_checkpoint, local_folder
    from ..hub.publishable import publish_place

    for name in checkpoints:  # all names before the first download
        check_checkpoint(name)
    for name in checkpoints:
        own_data, own = _read_held_out(local_folder(name))
        if own is None or own == held_out or own_data != publish_place(data):
            continue
        asked = "without --held_out, this" if held_out is None else f"--held_out {held_out}"
        is_part = held_out is not None and held_out < own
        what = "only a part of that" if is_part else "also text that it was trained on"
        print(
            printable(
                f"Warning: {name} was trained on {own_data} with {own} of it held out; {asked} "
                f"measures {what}. Use --held_out {own}."
            ),
            file=sys.stderr,
        )


def _read_held_out(folder: Path) -> tuple[str | None, float | None]:
    """Return the data of a checkpoint's training and the share that it held out.

    Both are `None` if its `metrics.json` does not say so; somebody else may have written that.
    """
    from ..hub.publishable import read_command
    from ..untrusted import read_json

    if not (path := folder / "metrics.json").is_file():
        return None, None
    try:
        flags = read_command(read_json(path)["eval_command"])
        return flags["data"], float(flags["held_out"])
    except (UserError, TypeError, KeyError, ValueError):
        return None, None


def _parse_eval(argv: list[str]) -> dict[str, Any]:
    """Return the flags that were given; refuse those of tasks for a text, and the reverse."""
    parser = Parser("eval", VERBS["eval"])
    add_flags(parser, _EVAL)
    add_flags(parser.add_mutually_exclusive_group(required=True), _EVAL_ON)
    add_flags(parser.add_argument_group("with --data"), _EVAL_ON_DATA)
    add_flags(parser.add_argument_group("with --tasks"), _EVAL_ON_TASKS)
    args = {name: value for name, value in vars(parser.parse(argv)).items() if value is not None}
    if args["batch_size"] < 1:
        raise UserError(f"batch_size={args['batch_size']} must be at least 1.")
    other, flags = ("tasks", _EVAL_ON_TASKS) if "data" in args else ("data", _EVAL_ON_DATA)
    for name, *_ in flags:
        flag = name.split()[0]
        if flag.removeprefix("--") in args:
            raise UserError(f"{flag} is for --{other} only: leave it out.")
    return args


_INFO: Flags = [("model", str, None, "folder or Hub id of a checkpoint, or the name of a preset")]


def run_info(argv: list[str]) -> None:
    args = parse_flags("info", VERBS["info"], _INFO, argv)

    load_libraries()
    from ..analysis.info import describe

    for name, value in describe(args.model).items():
        print(f"{name:<28} {value}")


_DOCTOR: Flags = [
    ("checkpoint", str, None, "what to check (default: three tiny models)", {"nargs": "?"})
]


def run_doctor(argv: list[str]) -> None:
    checkpoint = parse_flags("doctor", VERBS["doctor"], _DOCTOR, argv).checkpoint

    load_libraries()
    from ..analysis.doctor import check_installation, describe_environment

    facts = describe_environment()
    width = max(map(len, facts))
    print(*(f"{name:<{width}}  {value}" for name, value in facts.items()), sep="\n")
    count, failed, model = 0, 0, None
    for finding in check_installation(checkpoint):
        if finding.model != model:
            model = finding.model
            print(f"\n{model}")
        count, failed = count + 1, failed + (not finding.is_right)
        print(f"  {'ok  ' if finding.is_right else 'FAIL'}  {finding.check}: {finding.detail}")
    if failed:
        print(f"\n{failed} of {count} checks failed: results on this machine may be wrong.")
        print("Please report all of the above.")
        sys.exit(1)
    print("\nAll checks passed.")


_SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
_BENCH: Flags = [
    ("model", str, None, "preset, folder or Hub id to measure instead", {"nargs": "?"}),
    *((f"--{size}", int, None, "of the models") for size in _SIZES),
    ("--rounds", int, 5, "turns of each"),
    ("--num_threads", int, None, "CPU threads (default: cores)"),
    ("--compile", bool, False, "also with torch.compile; takes minutes more"),
    ("--output", str, None, "folder for the figures (.json) and the plot (.png)"),
]
_BENCH_TRAIN: Flags = [
    ("--batch_size", int, 8, "blocks in a step"),
    ("--steps", int, 4, "steps in a turn"),
    ("--bf16", bool, False, "compute in bfloat16"),
]
_BENCH_GENERATE: Flags = [
    ("--batch_size", int, 1, "prompts in a batch"),
    ("--tokens", int, 16, "tokens timed in a turn"),
]


def run_bench(argv: list[str]) -> None:
    benchmarks = {"train": _bench_train, "generate": _bench_generate}
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print(f"usage: hf-nanogpt bench {{{','.join(benchmarks)}}} ...\n\n{VERBS['bench']}")
    elif name in benchmarks:
        benchmarks[name](argv[1:])
    else:
        raise UserError(f"{name!r} is not a benchmark: choose one of {', '.join(benchmarks)}.")


def _bench_train(argv: list[str]) -> None:
    what = (
        "Time steps of training: our model, transformers' models of the same shape and a GPT-2 in "
        "plain torch take turns. Takes a minute or two with the sizes of quickstart."
    )
    settings, output = _parse_bench("train", what, _BENCH_TRAIN, argv)
    from ..benchmark import benchmark_training, format_report, plot_training, save_report

    report = benchmark_training(show_progress=True, **settings)
    print(format_report(report))
    if output:
        print("\nWritten:", *save_report(report, output, plot=plot_training))


def _bench_generate(argv: list[str]) -> None:
    what = (
        "Time greedy generation at text lengths up to 1024: our model in float32 and int8, its "
        "native equivalent in transformers, and nanoGPT's way without a cache take turns. The "
        "model is a GPT-2 of 10 M parameters."
    )
    settings, output = _parse_bench("generate", what, _BENCH_GENERATE, argv)
    from ..benchmark import benchmark_generation, format_generation, plot_generation, save_report

    report = benchmark_generation(show_progress=True, **settings)
    print(format_generation(report))
    if output:
        print("\nWritten:", *save_report(report, output, plot=plot_generation))


def _parse_bench(
    name: str, description: str, flags: Flags, argv: list[str]
) -> tuple[dict[str, Any], str | None]:
    """Return the settings of a benchmark that were given, and the folder to write to."""
    args = vars(parse_flags(f"bench {name}", description, _BENCH + flags, argv))
    load_libraries()
    from ..benchmark import prepare_output

    if output := args.pop("output"):
        prepare_output(output, name=name)
    return {key: value for key, value in args.items() if value is not None}, output
