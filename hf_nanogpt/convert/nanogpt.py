"""nanoGPT's own checkpoint, `ckpt.pt`, which is read and never written.

It is a pickle, which can contain code. torch reads it with `weights_only=True`: only tensors and
plain values, so that nothing in the file is run.
"""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.foreign import check_fields
from ..checkpoint.weights import LazyTensor
from ..configuration_nanogpt import NanoGPTConfig
from ..errors import UserError, explain_errors
from . import gpt2
from .rules import TRANSPOSE

# GPT-2's names and fused projection, but nn.Linear instead of Conv1D.
ROWS = tuple(
    (native, ours, *(operation for operation in operations if operation is not TRANSPOSE))
    for native, ours, *operations in gpt2.ROWS
)
FIELDS = {
    "vocab_size": "vocab_size",
    "block_size": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
}
GPT2_VOCABULARY = range(50257, 50304 + 1)  # GPT-2's size, up to the one that nanoGPT pads it to
GPT2_END_OF_TEXT = 50256
_MASK = r"\.attn\.bias$"  # the causal mask of older versions


def read_checkpoint(path: Path) -> tuple[NanoGPTConfig, dict[str, LazyTensor]]:
    """Return the configuration and the weights of a `ckpt.pt`.

    The file does not say with which GELU it was trained. The exact one is assumed, which nanoGPT
    has used since 2023.

    Raises:
        UserError: the file is not a `ckpt.pt`, it needs more than tensors and plain values, or it
            comes from a variant of nanoGPT with other settings.
    """
    checkpoint = _load(path)
    parts = checkpoint if isinstance(checkpoint, dict) else {}
    tensors, args = parts.get("model"), parts.get("model_args")
    if not isinstance(tensors, dict) or not isinstance(args, dict):
        raise UserError(
            f"{path} is not a checkpoint of nanoGPT, which has model and model_args: convert other "
            "models from a folder written by save_pretrained."
        )
    weights = {
        str(name).removeprefix("_orig_mod."): tensor  # the prefix of a compiled model
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor) and not re.search(_MASK, str(name))
    }
    # A tensor with a few stored values can claim any shape. (The embeddings count twice.)
    size, claimed = path.stat().st_size, sum(t.nbytes for t in weights.values())
    if claimed > 2 * size:
        raise UserError(
            f"{path} has {size:,} bytes, but its tensors claim {claimed:,}: it is damaged, or was "
            "made to fill the memory."
        )
    bias = "transformer.ln_f.bias" in weights  # older versions always have it and do not say so
    config = _read_config({"bias": bias} | args, path)
    return config, {name: LazyTensor(tuple(t.shape), t.detach) for name, t in weights.items()}


def _load(path: Path) -> Any:
    try:
        mapped = zipfile.is_zipfile(path)  # then only the tensors that are used are read
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"this one needs {wanted[1]}" if wanted else "this file is damaged or something else"
        raise UserError(
            f"{path} was not loaded: a checkpoint of nanoGPT contains only tensors and plain "
            f"values, but {what}. Nothing in it was run."
        ) from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"{path} cannot be read, it is cut off or damaged: {error}") from error


def _read_config(args: dict[str, Any], path: Path) -> NanoGPTConfig:
    args = {str(name): value for name, value in args.items()}
    check_fields(args, path)
    if unknown := args.keys() - {*FIELDS, "bias", "dropout"}:
        raise UserError(
            f"{path} has model_args that nanoGPT does not know ({', '.join(sorted(unknown))}): it "
            "comes from a variant, where the weights may mean something else."
        )
    if missing := FIELDS.keys() - args.keys():
        raise UserError(f"{path} lacks these model_args: {', '.join(sorted(missing))}.")
    with explain_errors(f"{path} has model_args that do not describe a valid model"):
        is_gpt2 = args["vocab_size"] in GPT2_VOCABULARY
        end = GPT2_END_OF_TEXT if is_gpt2 else None
        return NanoGPTConfig(
            **gpt2.FIXED
            | {ours: args[name] for name, ours in FIELDS.items()}
            | {"attention_bias": args["bias"], "mlp_bias": args["bias"]}
            | {"hidden_act": "gelu", "norm_eps": 1e-5, "initializer_range": 0.02}
            | {"dropout": args.get("dropout", 0.0), "tie_word_embeddings": True}
            | {"bos_token_id": end, "eos_token_id": end}
        )
