"""The command line: each verb parses its flags, calls one function of the library and prints."""

import argparse
import difflib
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

VERBS: dict[str, str] = {
    "train": "train a tokenizer and a GPT from nothing, on your text or on Python's own source",
    "generate": "go on from a prompt, printed as it is produced",
    "eval": "measure loss, perplexity and bits per byte on a text",
    "convert": "turn a GPT-1, GPT-2, GPT-Neo, Llama, Qwen3, nanochat or nanoGPT model into ours",
    "export": "turn a model of ours into one of those, for tools without hf_nanogpt",
    "push": "share a checkpoint on the Hub: model, tokenizer, code and card in one commit",
    "pull": "download a checkpoint from the Hub to a folder, whole or not at all",
    "info": "describe a checkpoint or a preset: sizes, memory, FLOPs",
}


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are exceptions of one sentence."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(
            message[0].upper() + message[1:].rstrip(".") + f": see {self.prog} --help."
        )

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        args, unknown = self.parse_known_args(argv)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            self.error(f"{unknown[0]} is no known argument{_nearest(unknown[0], options)}")
        return args


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name.split("=")[0], known, n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `hf-nanogpt`; return 0, 2 for bad input (one sentence on stderr), or 130 for Ctrl-C."""
    # Threads of torch wait for each other by spinning, and so take the core from the one they wait
    # for as soon as another program runs: small steps then take ten times as long or more. A short
    # spin costs nothing on a quiet machine. (libgomp reads this once, when torch is imported.)
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    argv = list(sys.argv[1:] if argv is None else argv)
    verbs: dict[str, Callable[[list[str]], None]] = {
        "train": _train,
        "generate": _generate,
        "eval": _eval,
        "convert": _convert,
        "export": _export,
        "push": _push,
        "pull": _pull,
        "info": _info,
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


def _quiet_libraries() -> None:
    """Keep the progress bars of single files off the terminal; ours are enough."""
    from transformers.utils import logging

    logging.disable_progress_bar()


# train


def _train(argv: list[str]) -> None:
    recipe = argv.pop(0) if argv and not argv[0].startswith("-") else "quickstart"
    own = _Parser(
        prog="hf-nanogpt train",
        usage="hf-nanogpt train [RECIPE] [--resume | --overwrite] [--SETTING VALUE ...]",
        add_help=False,
        allow_abbrev=False,
    )
    own.add_argument("--recipe", help="instead of the first word")
    own.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    own.add_argument("--overwrite", action="store_true", help="train an existing folder anew")
    own.add_argument("-h", "--help", action="store_true")
    args, flags = own.parse_known_args(argv)
    if args.help:
        _print_train_help(own)
        return
    if args.resume and args.overwrite:
        raise ValueError("--resume and --overwrite exclude each other: give one of them.")

    _quiet_libraries()
    from .training import train

    result = train(args.recipe or recipe, flags, resume=args.resume, overwrite=args.overwrite)
    print(_summary(result))


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
        "tokens/s": f"{m['tokens_per_second']:,.0f}",
        "validation loss": f"{m['eval_loss']:.4f} nats per token",
        "perplexity": f"{m['perplexity']:.2f}",
        "bits per byte": f"{m['bits_per_byte']:.4f}",
    }
    table = "\n".join(f"  {name:<16} {value}" for name, value in rows.items())
    sample = "\n".join(f"  | {line}" for line in result.sample.splitlines())
    me = "hf-nanogpt" if shutil.which("hf-nanogpt") else sys.argv[0]  # as it was called
    return f"""
{folder} is ready:
{table}

A sample:
{sample}

Next:
  {me} generate {folder} {shlex.quote(result.prompt)}
  {me} eval {folder} --data YOUR_TEXT
  {me} info {folder}"""


# generate


def _generate(argv: list[str]) -> None:
    parser = _Parser(prog="hf-nanogpt generate", description=VERBS["generate"], allow_abbrev=False)
    parser.add_argument("checkpoint", help="folder or Hub id")
    parser.add_argument("prompt", nargs="?", default="", help="text to go on from; '-' reads stdin")
    parser.add_argument("--max_new_tokens", type=int, default=100)
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
    parser.add_argument("--seed", type=int, help="make sampling repeatable")
    parser.add_argument("--num_samples", type=int, default=1)
    parser.add_argument(
        "--ignore_eos", action="store_true", help="go on after the end of a document"
    )
    args = parser.parse(argv)
    if args.num_samples < 1:
        raise ValueError(f"num_samples={args.num_samples} is not possible: give 1 or more.")
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt

    _quiet_libraries()
    from .checkpoint import load_checkpoint
    from .generation import stream_text

    model, tokenizer = load_checkpoint(args.checkpoint)
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
            stop_at_eos=not args.ignore_eos,
            seed=None if args.seed is None else args.seed + i,
        )
        if args.num_samples > 1:
            print(f"--- sample {i + 1} ---")
        print(prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()


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


# push and pull


def _push(argv: list[str]) -> None:
    parser = _Parser(prog="hf-nanogpt push", description=VERBS["push"], allow_abbrev=False)
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

    _quiet_libraries()
    from .hub import push_to_hub, stage_release

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


def _pull(argv: list[str]) -> None:
    parser = _Parser(prog="hf-nanogpt pull", description=VERBS["pull"], allow_abbrev=False)
    parser.add_argument("checkpoint", metavar="USER/NAME[@REVISION]", help="Hub id")
    parser.add_argument("destination", nargs="?", help="folder to make (default: NAME)")
    parser.add_argument("--verify", action="store_true", help="compare checksums with the Hub's")
    args = parser.parse(argv)

    _quiet_libraries()
    from .hub_pull import pull_checkpoint

    folder = pull_checkpoint(args.checkpoint, args.destination, verify=args.verify)
    print(f"{folder} is ready" + (", and every checksum fits." if args.verify else "."))
    print("\nNext:")
    if folder.name.startswith("checkpoint-"):
        print(f"  hf-nanogpt train RECIPE --resume --output_dir {shlex.quote(str(folder.parent))}")
    else:
        print(f"  hf-nanogpt generate {shlex.quote(str(folder))} 'Once upon a time'")


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
    args = parser.parse(argv)
    if args.batch_size < 1:
        raise ValueError(f"batch_size={args.batch_size} is not possible: give 1 or more.")

    _quiet_libraries()
    from .evaluation import evaluate

    result = evaluate(
        args.checkpoint,
        args.data,
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


if __name__ == "__main__":
    sys.exit(main())
