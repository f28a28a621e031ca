"""The verbs `generate` and `explain`."""

import os
import shutil
import sys

from ..errors import UserError, printable
from . import VERBS
from .parser import Parser, add_sampling, quiet_libraries


def run_generate(argv: list[str]) -> None:
    parser = Parser(prog="hf-nanogpt generate", description=VERBS["generate"], allow_abbrev=False)
    parser.add_argument("checkpoint", help="folder or Hub id")
    parser.add_argument("prompt", nargs="?", default="", help="text to go on from; '-' reads stdin")
    parser.add_argument("--max_new_tokens", type=int, help="default 100, or what there is room for")
    add_sampling(parser)
    parser.add_argument("--greedy", action="store_true", help="same as --temperature 0")
    parser.add_argument(
        "--stop", action="append", metavar="TEXT", help="end after this text; may be given again"
    )
    parser.add_argument("--num_samples", type=int, default=1)
    parser.add_argument(
        "--ignore_eos", action="store_true", help="go on after the end of a document"
    )
    parser.add_argument(
        "--quantize",
        choices=["int8"],
        help="8-bit weights: often faster on a CPU, less exact (a trained model of 135 million "
        "parameters changed its most likely token at 14 %% of the positions; see eval --quantize)",
    )
    parser.add_argument(
        "--compile", action="store_true", help="by torch.compile: slow to start, then faster"
    )
    args = parser.parse(argv)
    if args.num_samples < 1:
        raise UserError(f"num_samples={args.num_samples} is not possible: give 1 or more.")
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt

    quiet_libraries()
    from ..checkpoint.folder import load_checkpoint
    from ..generation import stream_text

    model, tokenizer = load_checkpoint(args.checkpoint)
    if args.quantize:
        from ..quantization import quantize_model

        quantize_model(model.float())
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
        print(printable(prompt), end="", flush=True)
        for piece in pieces:
            print(printable(piece), end="", flush=True)
        print()


def run_explain(argv: list[str]) -> None:
    parser = Parser(prog="hf-nanogpt explain", description=VERBS["explain"], allow_abbrev=False)
    parser.add_argument("checkpoint", help="folder or Hub id")
    parser.add_argument("text", help="to be read by the model; '-' reads stdin")
    parser.add_argument(
        "--html", metavar="FILE", help="also write a page with each head's attention map"
    )
    args = parser.parse(argv)
    text = sys.stdin.read() if args.text == "-" else args.text

    quiet_libraries()
    from ..analysis.explain import check_page, explain_text, render_table, write_page

    page = None if args.html is None else check_page(args.html)
    from ..checkpoint.folder import load_checkpoint

    model, tokenizer = load_checkpoint(args.checkpoint)
    explanation = explain_text(model, tokenizer, text, with_attention=page is not None)
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(render_table(explanation, color=color, width=shutil.get_terminal_size().columns))
    if page:
        write_page(explanation, page, title=args.checkpoint)
        print(f"{page} is ready: open it in a browser.")
