"""The verbs `eval`, `info` and `bench`."""

import logging
from typing import Any

from ..errors import UserError
from . import VERBS
from .parser import Parser, quiet_libraries


def run_eval(argv: list[str]) -> None:
    args = _parse_eval(argv)

    quiet_libraries()
    from ..analysis.compare import compare_on_tasks, compare_on_text, format_table
    from ..analysis.plots import check_picture, plot_comparison

    if plot := args.pop("plot", None):
        check_picture(plot)
    args["quantize"] = "quantize" in args
    if "data" in args:
        comparison = compare_on_text(**args, show_progress=True)
    else:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        comparison = compare_on_tasks(**args | {"tasks": args["tasks"].split(",")})
    rows = comparison.rows
    if "data" in args and len(rows) == 2:
        units = {"loss": " nats per token"}
        for name, figure in list(zip(*rows, strict=True))[1:]:
            print(f"{name:<14} {figure}{units.get(name, '')}")
    else:
        print(format_table(rows))
    if plot:
        try:
            plot_comparison(comparison.figures, plot)
        except OSError as error:  # the figures above are not lost for it
            raise UserError(f"plot={plot} cannot be written: {error.strerror}.") from error
        print(f"\n{plot} shows it.")


def _parse_eval(argv: list[str]) -> dict[str, Any]:
    parser = Parser(prog="hf-nanogpt eval", description=VERBS["eval"], allow_abbrev=False)
    parser.add_argument(
        "checkpoints", nargs="+", metavar="checkpoint", help="folder or Hub id; compares several"
    )
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--data", help="file, folder, glob, table or Hub dataset id")
    kind.add_argument("--tasks", help="of lm-eval: names or YAML files, separated by commas")
    parser.add_argument("--batch_size", type=int, default=16, help="blocks at a time")
    parser.add_argument("--plot", metavar="FILE", help="draw the comparison: .png, .svg or .pdf")
    parser.add_argument("--quantize", choices=["int8"], help="measure what rounded weights lose")
    text = parser.add_argument_group("on a text")
    text.add_argument("--text_column", help="column of a table that holds the text")
    text.add_argument("--context_length", type=int, help="tokens in a block (default: the model's)")
    text.add_argument(
        "--stride", type=int, help="predict so many at a time, each from a full context before it"
    )
    text.add_argument(
        "--held_out",
        type=float,
        metavar="SHARE",
        help="only the part that a training with validation_fraction=SHARE holds out",
    )
    tasks = parser.add_argument_group("on tasks")
    tasks.add_argument("--num_fewshot", type=int, help="solved examples before each question")
    tasks.add_argument("--limit", type=int, help="look at the first so many questions only")
    args = {name: value for name, value in vars(parser.parse(argv)).items() if value is not None}
    if args["batch_size"] < 1:
        raise UserError(f"batch_size={args['batch_size']} is not possible: give 1 or more.")
    other, flags = ("tasks", tasks) if "data" in args else ("data", text)
    for action in flags._group_actions:
        if action.dest in args:
            raise UserError(f"--{action.dest} is for --{other} only: leave it out.")
    return args


def run_info(argv: list[str]) -> None:
    parser = Parser(prog="hf-nanogpt info", description=VERBS["info"], allow_abbrev=False)
    parser.add_argument("model", help="folder or Hub id of a checkpoint, or the name of a preset")
    args = parser.parse(argv)

    from ..analysis.info import describe

    for name, value in describe(args.model).items():
        print(f"{name:<28} {value}")


def run_bench(argv: list[str]) -> None:
    benchmarks = {"train": _bench_train, "generate": _bench_generate}
    what = argv[0] if argv else "--help"
    if what in ("-h", "--help"):
        print(f"usage: hf-nanogpt bench {{{','.join(benchmarks)}}} ...\n\n{VERBS['bench']}")
    elif what in benchmarks:
        benchmarks[what](argv[1:])
    else:
        raise UserError(f"{what!r} is no benchmark: choose one of {', '.join(benchmarks)}.")


def _bench_train(argv: list[str]) -> None:
    parser = _bench_parser(
        "train",
        "Time steps of training: ours and transformers' models of the same shape, and "
        "a GPT-2 in plain torch, in turns. Takes a minute or two with the sizes of quickstart.",
    )
    parser.add_argument("--batch_size", type=int, default=8, help="blocks in a step (default 8)")
    parser.add_argument("--steps", type=int, default=4, help="steps in a turn (default 4)")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    given, output = _parse_bench(parser, argv, "train")
    from ..benchmark import benchmark_training, format_report, plot_training, save_report

    report = benchmark_training(show_progress=True, **given)
    print(format_report(report))
    if output:
        print("\nWritten:", *save_report(report, output, plot=plot_training))


def _bench_generate(argv: list[str]) -> None:
    parser = _bench_parser(
        "generate",
        "Time greedy generation: ours in float32 and int8, its twin in transformers, and nanoGPT's "
        "way without a cache, in turns, at text lengths up to 1024; a GPT-2 of 10 M parameters.",
    )
    parser.add_argument("--batch_size", type=int, default=1, help="prompts at a time (default 1)")
    parser.add_argument("--tokens", type=int, default=16, help="timed in a turn (default 16)")
    given, output = _parse_bench(parser, argv, "generate")
    from ..benchmark import benchmark_generation, format_generation, plot_generation, save_report

    report = benchmark_generation(show_progress=True, **given)
    print(format_generation(report))
    if output:
        print("\nWritten:", *save_report(report, output, plot=plot_generation))


def _bench_parser(name: str, description: str) -> Parser:
    parser = Parser(prog=f"hf-nanogpt bench {name}", description=description, allow_abbrev=False)
    parser.add_argument("model", nargs="?", help="a preset, folder or Hub id to take instead")
    for size in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
        parser.add_argument(f"--{size}", type=int)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default 5)")
    parser.add_argument("--num_threads", type=int, help="CPU threads (default: cores)")
    parser.add_argument(
        "--compile", action="store_true", help="by torch.compile too; takes minutes more"
    )
    parser.add_argument("--output", help=f"folder for bench_{name}.json and bench_{name}.png")
    return parser


def _parse_bench(parser: Parser, argv: list[str], name: str) -> tuple[dict[str, Any], str | None]:
    """Return what was given to the benchmark, and the folder to write to."""
    args = vars(parser.parse(argv))
    quiet_libraries()
    from ..benchmark import prepare_output

    if output := args.pop("output"):
        prepare_output(output, name=name)
    return {key: value for key, value in args.items() if value is not None}, output
