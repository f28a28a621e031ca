"""The verbs `convert` and `export`."""

import shlex
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import VERBS
from .parser import Flags, load_libraries, parse_flags, sigterm_like_ctrl_c

_CONVERT: Flags = [
    ("source", str, None, "folder or Hub id, or nanoGPT's ckpt.pt"),
    ("destination", str, None, "folder to create"),
    (
        "--from FORMAT",
        str,
        None,
        "gpt1, gpt2, gpt_neo, opt, llama, qwen2, qwen3, nanochat or nanogpt",
    ),
    ("--tokenizer", str, None, "folder or Hub id, or nanoGPT's meta.pkl (default: the source's)"),
]
_EXPORT: Flags = [
    ("checkpoint", str, None, "folder or Hub id"),
    ("destination", str, None, "folder to create; for gguf and onnx, the file"),
    (
        "--to FORMAT",
        str,
        None,
        "qwen3, llama, qwen2, gpt2, gpt_neo, gpt1, opt, nanochat, gguf or onnx (default: gguf or "
        "onnx if the destination ends so, else the first that can express the model)",
    ),
    ("--dtype", ["f32", "f16", "q8_0"], None, "dtype of the weights, for --to gguf (default f32)"),
]


@sigterm_like_ctrl_c()
def run_convert(argv: list[str]) -> None:
    args = parse_flags("convert", VERBS["convert"], _CONVERT, argv)

    load_libraries()
    from ..convert import convert_checkpoint

    result = convert_checkpoint(
        args.source,
        args.destination,
        source_format=getattr(args, "from"),
        tokenizer=args.tokenizer,
    )
    _print_conversion(result, f"from {result.format}")
    print("\nNext:")
    if result.has_tokenizer:
        print(f"  hf-nanogpt generate {shlex.quote(args.destination)} 'Once upon a time'")
    print(f"  hf-nanogpt info {shlex.quote(args.destination)}")


@sigterm_like_ctrl_c()
def run_export(argv: list[str]) -> None:
    args = parse_flags("export", VERBS["export"], _EXPORT, argv)
    # The ending of a file decides, too; a folder may have any name.
    ending = Path(args.destination).suffix.removeprefix(".")
    args.to = args.to or (ending if ending in ("gguf", "onnx") else "auto")
    if args.dtype and args.to != "gguf":
        raise UserError(f"dtype={args.dtype} is for --to gguf only: leave it out.")

    load_libraries()
    from ..convert import TARGET_FORMATS, check_name, export_checkpoint

    check_name("to", args.to, [*TARGET_FORMATS, "gguf", "onnx"])
    if args.to == "gguf":
        from ..convert.gguf import export_gguf

        path = export_gguf(args.checkpoint, args.destination, dtype=args.dtype or "f32")
        print(f"{path} is ready, {path.stat().st_size:,} bytes for llama.cpp.")
    elif args.to == "onnx":
        from ..convert.onnx import export_onnx

        file = export_onnx(args.checkpoint, args.destination)
        data = f" (its weights are in {file.data.name})" if file.data else ""
        print(f"{file.path} is ready, {file.num_bytes:,} bytes for onnxruntime{data}.")
        print(f"Its logits differ from the model's by at most {file.largest_difference:.1g}.")
    else:
        result = export_checkpoint(args.checkpoint, args.destination, to=args.to)
        _print_conversion(result, f"as {result.format}")


def _print_conversion(result: Any, how: str) -> None:
    tokenizer = "with" if result.has_tokenizer else "without"
    size = f"{result.num_parameters:,} parameters, {tokenizer} tokenizer"
    print(f"{result.folder} is ready, {how}: {size}.")
