"""The command line: each verb parses its flags, calls one function of the library and prints."""

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .cli_hub import pull, push
from .cli_parser import Parser as _Parser
from .cli_parser import find_nearest as _nearest
from .cli_parser import quiet_libraries as _quiet_libraries

VERBS: dict[str, str] = {
    "train": "train a tokenizer and a GPT from nothing, on your text or on Python's own source",
    "tokenize": "turn a text into tokens once, in a folder to train from",
    "generate": "go on from a prompt, printed as it is produced",
    "explain": "show what a model expected at each token of a text, and where its heads look",
    "eval": "measure loss, perplexity and bits per byte on a text",
    "convert": "turn a GPT-1, GPT-2, GPT-Neo, Llama, Qwen3, nanochat or nanoGPT model into ours",
    "export": "turn a model of ours into one of those, for tools without hf_nanogpt",
    "push": "share a checkpoint on the Hub: model, tokenizer, code and card in one commit",
    "pull": "download a checkpoint from the Hub to a folder, whole or not at all",
    "info": "describe a checkpoint or a preset: sizes, memory, FLOPs",
    "bench": "measure the speed of training or generation here, beside other implementations",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `hf-nanogpt`; return 0, 2 for bad input (one sentence on stderr), or 130 for Ctrl-C.

    A training that a signal has stopped exits with 128 and the signal's number.
    """
    # Threads of torch wait for each other by spinning, and so take the core from the one they wait
    # for as soon as another program runs: small steps then take ten times as long or more. A short
    # spin costs nothing on a quiet machine. (libgomp reads this once, when torch is imported.)
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Work that is done within this many seconds shows no bar. (tqdm reads it when imported, too.)
    os.environ.setdefault("TQDM_DELAY", "2")
    argv = list(sys.argv[1:] if argv is None else argv)
    verbs: dict[str, Callable[[list[str]], None]] = {
        "train": _train,
        "tokenize": _tokenize,
        "generate": _generate,
        "explain": _explain,
        "eval": _eval,
        "convert": _convert,
        "export": _export,
        "push": push,
        "pull": pull,
        "info": _info,
        "bench": _bench,
    }
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(_overview())
        elif argv[0] == "--version":
            from . import __version__

            print(__version__)
        elif argv[0] in verbs:
            verbs[argv[0]](argv[1:])
        else:
            near = _nearest(argv[0], list(verbs)) or f": choose one of {', '.join(verbs)}"
            raise ValueError(f"{argv[0]!r} is no command{near}.")
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("HF_NANOGPT_TRACEBACK") or not _is_users(error):
            raise
        print(f"hf-nanogpt: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _is_users(error: Exception) -> bool:
    """Say whether an error is about what the user gave; any other is ours and shows a traceback."""
    return isinstance(error, ValueError) or type(error).__name__.startswith("StrictDataclass")


def _overview() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {what}" for verb, what in VERBS.items()]
    return "\n".join(
        [
            "usage: hf-nanogpt COMMAND ...",
            "",
            "Train, use and share a small GPT in the Hugging Face ecosystem.",
            "",
            "commands:",
            *lines,
            "",
            "hf-nanogpt COMMAND --help tells more. Start with: hf-nanogpt train",
        ]
    )


# train


def _train(argv: list[str]) -> None:
    given = [word for word in argv if word not in ("--resume", "--overwrite")]
    recipe = argv.pop(0) if argv and not argv[0].startswith("-") else "quickstart"
    own = _Parser(
        prog="hf-nanogpt train",
        usage="hf-nanogpt train [RECIPE] [--resume | --overwrite] [--SETTING VALUE ...]",
        add_help=False,
        allow_abbrev=False,
    )
    own.add_argument("--recipe", help="instead of the first word")
    own.add_argument(
        "--from",
        dest="start_from",
        metavar="CHECKPOINT",
        help="go on with this model, do not begin",
    )
    own.add_argument("--resume", action="store_true", help="go on where it was stopped")
    own.add_argument("--overwrite", action="store_true", help="train an existing folder anew")
    own.add_argument("-h", "--help", action="store_true")
    args, flags = own.parse_known_args(argv)
    if args.help:
        _print_train_help(own)
        return
    if args.resume and args.overwrite:
        raise ValueError("--resume and --overwrite exclude each other: give one of them.")

    _quiet_libraries()
    from .interruption import TrainingInterrupted
    from .training import train

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
        print(_summary(result))


def _own_name() -> str:
    """Return the words by which this program is called."""
    if shutil.which("hf-nanogpt"):
        return "hf-nanogpt"
    return "python -m hf_nanogpt" if sys.argv[0].endswith("__main__.py") else sys.argv[0]


def _resume_command(given: list[str]) -> str:
    name = _own_name()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        name = f"torchrun --nproc_per_node={os.environ['LOCAL_WORLD_SIZE']} -m hf_nanogpt"
    return f"{name} train {shlex.join([*given, '--resume'])}"


def _print_train_help(own: argparse.ArgumentParser) -> None:
    from .arguments import list_recipes, make_parser

    print(own.format_help())
    print(f"recipes: {', '.join(list_recipes())}, or the path of a YAML file\n")
    print(make_parser().format_help())


def _summary(result: Any) -> str:
    m, folder = result.metrics, result.output_dir
    rows = {
        "parameters": f"{m['num_parameters']:,}",
        "tokens": f"{m['train_tokens']:,}",
        "time": f"{m['train_seconds']:,.0f} s",
        "tokens/s": f"{m['tokens_per_second']:,.0f}"
        + (f" (MFU {m['mfu']:.0%})" if "mfu" in m else ""),
        "validation loss": f"{m['eval_loss']:.4f} nats per token",
        "perplexity": f"{m['perplexity']:.2f}",
        "bits per byte": f"{m['bits_per_byte']:.4f}",
    }
    table = "\n".join(f"  {name:<16} {value}" for name, value in rows.items())
    lines = "\n".join(f"  | {line}" for line in result.sample.splitlines())
    sample = f"A sample:\n{lines}\n\n" if lines else ""
    me = _own_name()
    return f"""
{folder} is ready:
{table}

{sample}Next:
  {me} generate {folder} {shlex.quote(result.prompt)}
  {me} eval {folder} --data YOUR_TEXT
  {me} info {folder}"""


# tokenize


def _tokenize(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        from .arguments import make_data_parser

        print(make_data_parser().format_help())
        return
    if len(argv) < 2 or argv[0].startswith("-") or argv[1].startswith("-"):
        raise ValueError(
            "Give the text and then the folder to make: hf-nanogpt tokenize DATA FOLDER."
        )
    data, folder, *flags = argv

    _quiet_libraries()
    from .arguments import parse_data
    from .tokenized import tokenize_corpus

    result = tokenize_corpus(parse_data([*flags, f"--data={data}"]), folder, show_progress=True)
    print(f"{folder} is ready, {result['vocab_size']:,} tokens in its vocabulary:")
    for name, part in result["splits"].items():
        documents, tokens, size = (f"{part[k]:,}" for k in ("documents", "tokens", "bytes"))
        print(f"  {name:<10} {documents} documents, {tokens} tokens of {size} bytes")
    print(f"\nNext:\n  hf-nanogpt train --data {shlex.quote(folder)}")


# generate


def _generate(argv: list[str]) -> None:
    parser = _Parser(prog="hf-nanogpt generate", description=VERBS["generate"], allow_abbrev=False)
    parser.add_argument("checkpoint", help="folder or Hub id")
    parser.add_argument("prompt", nargs="?", default="", help="text to go on from; '-' reads stdin")
    parser.add_argument("--max_new_tokens", type=int, help="default 100, or what there is room for")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)")
    parser.add_argument("--greedy", action="store_true", help="same as --temperature 0")
    parser.add_argument("--top_k", type=int, help="sample from the likeliest TOP_K tokens")
    parser.add_argument(
        "--top_p", type=float, help="sample from the likeliest share of probability"
    )
    parser.add_argument(
        "--min_p", type=float, help="least probability relative to the likeliest token"
    )
    parser.add_argument("--repetition_penalty", type=float, help="above 1 discourages repeats")
    parser.add_argument(
        "--stop", action="append", metavar="TEXT", help="end after this text; may be given again"
    )
    parser.add_argument("--seed", type=int, help="make sampling repeatable")
    parser.add_argument("--num_samples", type=int, default=1)
    parser.add_argument(
        "--ignore_eos", action="store_true", help="go on after the end of a document"
    )
    parser.add_argument("--quantize", choices=["int8"], help="round the weights: faster on a CPU")
    parser.add_argument(
        "--compile", action="store_true", help="by torch.compile: a minute first, then faster"
    )
    args = parser.parse(argv)
    if args.quantize and args.compile:
        raise ValueError("--quantize and --compile exclude each other: give one of them.")
    if args.num_samples < 1:
        raise ValueError(f"num_samples={args.num_samples} is not possible: give 1 or more.")
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt

    _quiet_libraries()
    from .checkpoint import load_checkpoint
    from .generation import stream_text

    model, tokenizer = load_checkpoint(args.checkpoint)
    if args.quantize:
        from .quantization import quantize_model

        quantize_model(model)
    for i in range(args.num_samples):
        pieces = stream_text(
            model,
            tokenizer,
            prompt,
            max_new_tokens=args.max_new_tokens,
            temperature=0.0 if args.greedy else args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            min_p=args.min_p,
            repetition_penalty=args.repetition_penalty,
            stop_strings=args.stop or (),
            stop_at_eos=not args.ignore_eos,
            compile=args.compile,
            seed=None if args.seed is None else args.seed + i,
        )
        if args.num_samples > 1:
            print(f"--- sample {i + 1} ---")
        print(prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()


# explain


def _explain(argv: list[str]) -> None:
    parser = _Parser(prog="hf-nanogpt explain", description=VERBS["explain"], allow_abbrev=False)
    parser.add_argument("checkpoint", help="folder or Hub id")
    parser.add_argument("text", help="to be read by the model; '-' reads stdin")
    parser.add_argument(
        "--html", metavar="FILE", help="also write a page with each head's attention map"
    )
    args = parser.parse(argv)
    text = sys.stdin.read() if args.text == "-" else args.text

    _quiet_libraries()
    from .explain import check_page, explain_text, render_table, write_page

    page = None if args.html is None else check_page(args.html)
    from .checkpoint import load_checkpoint

    model, tokenizer = load_checkpoint(args.checkpoint)
    explanation = explain_text(model, tokenizer, text, with_attention=page is not None)
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(render_table(explanation, color=color, width=shutil.get_terminal_size().columns))
    if page:
        write_page(explanation, page, title=args.checkpoint)
        print(f"{page} is ready: open it in a browser.")


# convert and export


def _convert(argv: list[str]) -> None:
    parser = _Parser(prog="hf-nanogpt convert", description=VERBS["convert"], allow_abbrev=False)
    parser.add_argument("source", help="folder or Hub id, or nanoGPT's ckpt.pt")
    parser.add_argument("destination", help="folder to make")
    parser.add_argument(
        "--from",
        dest="source_format",
        metavar="FORMAT",
        help="gpt1, gpt2, gpt_neo, llama, qwen3, nanochat or nanogpt (default: found out)",
    )
    parser.add_argument(
        "--tokenizer", help="folder or Hub id, or nanoGPT's meta.pkl (default: the source's)"
    )
    args = parser.parse(argv)

    _quiet_libraries()
    from .convert import convert_checkpoint

    result = convert_checkpoint(
        args.source,
        args.destination,
        source_format=args.source_format,
        tokenizer=args.tokenizer,
    )
    _print_conversion(result, f"from {result.format}")
    print("\nNext:")
    if result.has_tokenizer:
        print(f"  hf-nanogpt generate {shlex.quote(args.destination)} 'Once upon a time'")
    print(f"  hf-nanogpt info {shlex.quote(args.destination)}")


def _export(argv: list[str]) -> None:
    parser = _Parser(prog="hf-nanogpt export", description=VERBS["export"], allow_abbrev=False)
    parser.add_argument("checkpoint", help="folder or Hub id")
    parser.add_argument("destination", help="folder to make, or for gguf the file")
    parser.add_argument(
        "--to",
        default="auto",
        metavar="FORMAT",
        help="qwen3, llama, gpt2, gpt_neo, gpt1, nanochat or gguf (default auto: what fits)",
    )
    parser.add_argument("--dtype", choices=["f32", "f16"], help="of the weights of a gguf")
    args = parser.parse(argv)
    if args.dtype and args.to != "gguf":
        raise ValueError(f"dtype={args.dtype} is for --to gguf only: leave it out.")

    _quiet_libraries()
    if args.to == "gguf":
        from .convert.gguf import export_gguf

        path = export_gguf(args.checkpoint, args.destination, dtype=args.dtype or "f32")
        print(f"{path} is ready, {path.stat().st_size:,} bytes for llama.cpp.")
        return
    from .convert import export_checkpoint

    result = export_checkpoint(args.checkpoint, args.destination, to=args.to)
    _print_conversion(result, f"as {result.format}")


def _print_conversion(result: Any, how: str) -> None:
    words = "with" if result.has_tokenizer else "without"
    print(
        f"{result.folder} is ready, {how}: {result.num_parameters:,} parameters, {words} tokenizer."
    )


# eval and info


def _eval(argv: list[str]) -> None:
    parser = _Parser(prog="hf-nanogpt eval", description=VERBS["eval"], allow_abbrev=False)
    parser.add_argument("checkpoint", help="folder or Hub id")
    parser.add_argument("--data", required=True, help="file, folder, glob, table or Hub dataset id")
    parser.add_argument(
        "--text_column", default="text", help="column of a table that holds the text"
    )
    parser.add_argument(
        "--context_length", type=int, help="tokens in a block (default: the model's)"
    )
    parser.add_argument("--batch_size", type=int, default=16, help="blocks at a time")
    parser.add_argument(
        "--held_out",
        type=float,
        metavar="SHARE",
        help="only the part that a training with validation_fraction=SHARE holds out",
    )
    parser.add_argument("--quantize", choices=["int8"], help="measure what rounded weights lose")
    args = parser.parse(argv)
    if args.batch_size < 1:
        raise ValueError(f"batch_size={args.batch_size} is not possible: give 1 or more.")

    _quiet_libraries()
    from .checkpoint import load_checkpoint
    from .evaluation import evaluate

    model, tokenizer = load_checkpoint(args.checkpoint)
    if args.quantize:
        from .quantization import quantize_model

        quantize_model(model)
    result = evaluate(
        model,
        args.data,
        tokenizer=tokenizer,
        context_length=args.context_length,
        batch_size=args.batch_size,
        text_column=args.text_column,
        held_out=args.held_out,
        show_progress=True,
    )
    print(f"loss           {result.loss:.4f} nats per token")
    print(f"perplexity     {result.perplexity:.2f}")
    print(f"bits per byte  {result.bits_per_byte:.4f}")
    print(f"tokens         {result.num_tokens:,}")
    print(f"bytes          {result.num_bytes:,}")


def _info(argv: list[str]) -> None:
    parser = _Parser(prog="hf-nanogpt info", description=VERBS["info"], allow_abbrev=False)
    parser.add_argument("model", help="folder or Hub id of a checkpoint, or the name of a preset")
    args = parser.parse(argv)

    from .info import describe

    for name, value in describe(args.model).items():
        print(f"{name:<28} {value}")


# bench


def _bench(argv: list[str]) -> None:
    benchmarks = {"train": _bench_train, "generate": _bench_generate}
    what = argv[0] if argv else "--help"
    if what in ("-h", "--help"):
        print(f"usage: hf-nanogpt bench {{{','.join(benchmarks)}}} ...\n\n{VERBS['bench']}")
    elif what in benchmarks:
        benchmarks[what](argv[1:])
    else:
        raise ValueError(f"{what!r} is no benchmark: choose one of {', '.join(benchmarks)}.")


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
    from .benchmark import benchmark_training, format_report, plot_training, save_report

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
    from .benchmark import benchmark_generation, format_generation, plot_generation, save_report

    report = benchmark_generation(show_progress=True, **given)
    print(format_generation(report))
    if output:
        print("\nWritten:", *save_report(report, output, plot=plot_generation))


def _bench_parser(name: str, description: str) -> _Parser:
    parser = _Parser(prog=f"hf-nanogpt bench {name}", description=description, allow_abbrev=False)
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


def _parse_bench(parser: _Parser, argv: list[str], name: str) -> tuple[dict[str, Any], str | None]:
    """Return what was given to the benchmark, and the folder to write to."""
    args = vars(parser.parse(argv))
    _quiet_libraries()
    from .benchmark import prepare_output

    if output := args.pop("output"):
        prepare_output(output, name=name)
    return {key: value for key, value in args.items() if value is not None}, output


if __name__ == "__main__":
    sys.exit(main())
