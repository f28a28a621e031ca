"""The verbs `generate` and `explain`."""

import os
import shutil
import sys

from ..errors import UserError, printable
from . import VERBS
from .parser import SAMPLING, Flags, load_libraries, parse_flags

_QUANTIZE = (
    "8-bit weights: often faster on a CPU, less exact (a trained model of 135 million parameters "
    "changed its most likely token at 14 %% of the positions; see eval --quantize)"
)
_GENERATE: Flags = [
    ("checkpoint", str, None, "folder or Hub id"),
    ("prompt", str, "", "text to continue; '-' reads stdin", {"nargs": "?"}),
    ("--max_new_tokens", int, None, "default 100, or what the context has room for"),
    *SAMPLING,
    ("--greedy", bool, False, "same as --temperature 0"),
    ("--stop TEXT", str, None, "end after this text; repeatable", {"action": "append"}),
    ("--num_samples", int, 1, "texts to generate"),
    ("--ignore_eos", bool, False, "continue after the end of a document"),
    ("--quantize", ["int8"], None, _QUANTIZE),
    ("--compile", bool, False, "use torch.compile: slow to start, then faster"),
]


def run_generate(argv: list[str]) -> None:
    args = parse_flags("generate", VERBS["generate"], _GENERATE, argv)
    if args.num_samples < 1:
        raise UserError(f"num_samples={args.num_samples} must be at least 1.")
    prompt = _read_text(args.prompt)

    load_libraries()
    from ..checkpoint.loading import load_checkpoint
    from ..generation import find_temperature, stream_text

    model, tokenizer = load_checkpoint(args.checkpoint)
    temperature = find_temperature(model) if args.temperature is None else args.temperature
    if args.quantize:
        from ..quantization import quantize_model

        quantize_model(model.float())
    for i in range(args.num_samples):
        pieces = stream_text(
            model,
            tokenizer,
            prompt,
            max_new_tokens=args.max_new_tokens,
            temperature=0.0 if args.greedy else temperature,
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


def _read_text(text: str) -> str:
    return sys.stdin.read() if text == "-" else text


_EXPLAIN: Flags = [
    ("checkpoint", str, None, "folder or Hub id"),
    ("text", str, None, "text for the model to read; '-' reads stdin"),
    ("--html FILE", str, None, "also write a page with each head's attention map"),
]


def run_explain(argv: list[str]) -> None:
    args = parse_flags("explain", VERBS["explain"], _EXPLAIN, argv)
    text = _read_text(args.text)

    load_libraries()
    from ..analysis.explain import check_page, explain_text, render_table, write_page
    from ..checkpoint.loading import load_checkpoint

    page = None if args.html is None else check_page(args.html)
    model, tokenizer = load_checkpoint(args.checkpoint)
    explanation = explain_text(model, tokenizer, text, with_attention=page is not None)
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(render_table(explanation, color=color, width=shutil.get_terminal_size().columns))
    if page:
        write_page(explanation, page, title=args.checkpoint)
        print(f"{page} is ready: open it in a browser.")
