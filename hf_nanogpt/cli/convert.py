"""The verbs `convert` and `export`."""

import shlex
from typing import Any

from ..errors import UserError
from . import VERBS
from .parser import Parser, quiet_libraries, sigterm_like_ctrl_c


@sigterm_like_ctrl_c()
def run_convert(argv: list[str]) -> None:
    parser = Parser(prog="hf-nanogpt convert", description=VERBS["convert"], allow_abbrev=False)
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

    quiet_libraries()
    from ..convert import convert_checkpoint

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


@sigterm_like_ctrl_c()
def run_export(argv: list[str]) -> None:
    parser = Parser(prog="hf-nanogpt export", description=VERBS["export"], allow_abbrev=False)
    parser.add_argument("checkpoint", help="folder or Hub id")
    parser.add_argument("destination", help="folder to make; for gguf and onnx the file")
    parser.add_argument(
        "--to",
        default="auto",
        metavar="FORMAT",
        help="qwen3, llama, gpt2, gpt_neo, gpt1, nanochat, gguf or onnx (default auto)",
    )
    parser.add_argument("--dtype", choices=["f32", "f16", "q8_0"], help="of the weights of a gguf")
    args = parser.parse(argv)
    if args.dtype and args.to != "gguf":
        raise UserError(f"dtype={args.dtype} is for --to gguf only: leave it out.")

    quiet_libraries()
    from ..convert import TARGET_FORMATS, check_name, export_checkpoint

    check_name("to", args.to, [*TARGET_FORMATS, "gguf", "onnx"])
    if args.to == "gguf":
        from ..convert.gguf import export_gguf

        path = export_gguf(args.checkpoint, args.destination, dtype=args.dtype or "f32")
        print(f"{path} is ready, {path.stat().st_size:,} bytes for llama.cpp.")
        return
    if args.to == "onnx":
        from ..convert.onnx import export_onnx

        file = export_onnx(args.checkpoint, args.destination)
        beside = f" (with {file.data.name} beside it)" if file.data else ""
        print(f"{file.path} is ready, {file.num_bytes:,} bytes for onnxruntime{beside}.")
        print(f"Its logits are at most {file.largest_difference:.1g} away from the model's.")
        return
    result = export_checkpoint(args.checkpoint, args.destination, to=args.to)
    _print_conversion(result, f"as {result.format}")


def _print_conversion(result: Any, how: str) -> None:
    words = "with" if result.has_tokenizer else "without"
    print(
        f"{result.folder} is ready, {how}: {result.num_parameters:,} parameters, {words} tokenizer."
    )
