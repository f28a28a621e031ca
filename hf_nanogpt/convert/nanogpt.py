"""nanoGPT's own checkpoint, `ckpt.pt`; read, never written.

It is a pickle, which can hold code. torch reads it with `weights_only=True`: tensors and plain
values, and nothing that the file brings is run.
"""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.foreign import check_fields
from ..checkpoint.weights import LazyTensor, in_memory
from ..configuration_nanogpt import NanoGPTConfig
from ..errors import UserError, explain_errors
from . import gpt2
from .rules import TRANSPOSE

# GPT-2's names and fused projection, kept by nn.Linear instead of Conv1D.
ROWS = tuple(
    (theirs, ours, *(operation for operation in operations if operation is not TRANSPOSE))
    for theirs, ours, *operations in gpt2.ROWS
)
FIELDS = {
    "vocab_size": "vocab_size",
    "block_size": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
}
GPT2_VOCABULARY, GPT2_PADDED, GPT2_END_OF_TEXT = 50257, 50304, 50256
PARTS = ("model", "model_args")
BUFFERS = r"\.attn\.bias$"  # the causal mask of older versions


def read_checkpoint(path: Path) -> tuple[NanoGPTConfig, dict[str, LazyTensor]]:
    """Return the configuration and the weights of a `ckpt.pt`.

    The file does not say which GELU it was trained with: the exact one is taken, nanoGPT's since
    2023.

    Raises:
        UserError: it is no such file, it needs more than tensors and plain values, or it was
            written by a variant of nanoGPT with settings of its own.
    """
    checkpoint = _load(path)
    tensors, args = map(checkpoint.get, PARTS) if isinstance(checkpoint, dict) else (None, None)
    if not isinstance(tensors, dict) or not isinstance(args, dict):
        raise UserError(
            f"{path} is no checkpoint of nanoGPT, which has {' and '.join(PARTS)}: other models "
            "are converted from a folder that save_pretrained wrote."
        )
    weights = {
        str(name).removeprefix("_orig_mod."): tensor
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor) and not re.search(BUFFERS, str(name))
    }
    # A tensor of a few stored values can claim any shape. (The embeddings are stored once for two.)
    size, claimed = path.stat().st_size, sum(t.nbytes for t in weights.values())
    if claimed > 2 * size:
        raise UserError(
            f"{path} has {size:,} bytes, and its tensors claim {claimed:,}: it is damaged, or made "
            "to fill the memory."
        )
    bias = "transformer.ln_f.bias" in weights  # older versions always had it, and say nothing
    return _read_config({"bias": bias} | args, path), in_memory(weights)


def _load(path: Path) -> Any:
    try:
        mapped = zipfile.is_zipfile(path)  # then only the tensors that are used are read
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it needs {wanted[1]}" if wanted else "it is damaged, or no checkpoint"
        raise UserError(
            f"{path} was not loaded: a checkpoint of nanoGPT needs tensors and plain values only, "
            f"and {what}. Nothing in it was run."
        ) from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"{path} cannot be read, it is cut off or damaged: {error}") from error


def _read_config(args: dict[str, Any], path: Path) -> NanoGPTConfig:
    known = {*FIELDS, "bias", "dropout"}
    args = {str(name): value for name, value in args.items()}
    check_fields(args, path)
    if unknown := args.keys() - known:
        raise UserError(
            f"{path} has model_args that nanoGPT does not know ({', '.join(sorted(unknown))}): it "
            "comes from a variant, whose weights may mean something else."
        )
    if missing := FIELDS.keys() - args.keys():
        raise UserError(f"{path} lacks these of its model_args: {', '.join(sorted(missing))}.")
    with explain_errors(f"{path} has model_args that do not make a model"):
        has_gpt2s = GPT2_VOCABULARY <= args["vocab_size"] <= GPT2_PADDED
        end = GPT2_END_OF_TEXT if has_gpt2s else None
        return NanoGPTConfig(
            **gpt2.FIXED
            | {ours: args[name] for name, ours in FIELDS.items()}
            | {"attention_bias": args["bias"], "mlp_bias": args["bias"]}
            | {"hidden_act": "gelu", "norm_eps": 1e-5, "initializer_range": 0.02}
            | {"dropout": args.get("dropout", 0.0), "tie_word_embeddings": True}
            | {"bos_token_id": end, "eos_token_id": end}
        )
