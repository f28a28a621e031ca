"""nanoGPT's own checkpoint, `ckpt.pt`, with its tokenizer; both are read and never written.

`ckpt.pt` and `meta.pkl`, which may hold the characters, are pickles and can contain code. Their
readers accept only tensors and plain values, so that nothing in the files is run.
"""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..checkpoint.foreign import check_fields
from ..checkpoint.weights import LazyTensor
from ..configuration_nanogpt import NanoGPTConfig
from ..data.token_files import read_characters
from ..errors import UserError, explain_errors
from . import gpt2
from .folders import check_tokenizer, load_tokenizer
from .rules import TRANSPOSE

logger = logging.get_logger(__name__)

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
_GPT2_TOKENIZER, _GPT2_END_OF_TEXT = "openai-community/gpt2", 50256
_GPT2_SIZES = range(50257, 50304 + 1)  # of its vocabulary, up to the one that nanoGPT pads it to
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
    return config, {
        name: LazyTensor(tuple(t.shape), t.detach, t.is_floating_point())
        for name, t in weights.items()
    }


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
        end = _GPT2_END_OF_TEXT if args["vocab_size"] in _GPT2_SIZES else None
        fields: dict[str, Any] = (
            gpt2.FIXED
            | {ours: args[name] for name, ours in FIELDS.items()}
            | {"attention_bias": args["bias"], "mlp_bias": args["bias"]}
            | {"hidden_act": "gelu", "norm_eps": 1e-5, "initializer_range": 0.02}
            | {"dropout": args.get("dropout", 0.0), "tie_word_embeddings": True}
            | {"bos_token_id": end, "eos_token_id": end}
        )
        return NanoGPTConfig(**fields)


# The tokenizer


def find_tokenizer(
    path: Path, tokenizer: str | Path | None, *, config: NanoGPTConfig
) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer that a `ckpt.pt` was trained with, and copy its token ids to `config`.

    It is `tokenizer` (a folder, a Hub id or a `meta.pkl`), else a `meta.pkl` next to the
    checkpoint, else GPT-2's if the vocabulary has its size. If none is found, a warning says so.

    Raises:
        UserError: the tokenizer cannot be loaded, or has more tokens than the model.
    """
    neighbour = path.parent / "meta.pkl"
    if tokenizer is None and neighbour.is_file():
        tokenizer = neighbour
    if not tokenizer:
        found = _load_gpt2_tokenizer() if config.vocab_size in _GPT2_SIZES else None
    elif Path(tokenizer).suffix == ".pkl":
        found = read_characters(Path(tokenizer))
    else:
        found = load_tokenizer(tokenizer)
    if found is None:
        logger.warning(f"No tokenizer was found for {path}: give one, or the folder has none.")
        return None
    check_tokenizer(found, config, where=path)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(found, name))
    return found


def _load_gpt2_tokenizer() -> PreTrainedTokenizerBase | None:
    try:
        return load_tokenizer(_GPT2_TOKENIZER)
    except UserError as error:  # the Hub cannot be reached
        logger.warning(str(error))
        return None
