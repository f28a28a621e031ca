"""GGUF, the one-file format of llama.cpp: what we train runs there as gpt2, llama or qwen3.

Tensor and key names are those of llama.cpp's loaders; `gguf`, an optional package, writes the
bytes. `gguf_model.py` has the keys that describe the model, `gguf_vocabulary.py` the tokenizer's.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.folder import staged_folder
from ..errors import UserError
from ..modeling_nanogpt import NanoGPTForCausalLM, NanoGPTRotaryEmbedding
from .gguf_model import GGUFType, choose_architecture, describe_model
from .gguf_vocabulary import describe_tokenizer
from .one_file import check_new_file, load_own

_MODULES = {
    "model.embed_tokens": "token_embd",
    "model.embed_positions": "position_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def export_gguf(
    checkpoint: str | Path, destination: str | Path, *, dtype: GGUFType = "f32"
) -> Path:
    """Write one of our checkpoints, tokenizer included, as a file that llama.cpp runs.

    Learned positions make it a gpt2, `qk_norm` a qwen3, anything else a llama. With `dtype="f16"`
    the matrices are halved, with `"q8_0"` they have 8 bits and a scale for 32 weights; vectors and
    positions stay in f32, as in llama.cpp's own files.

    Args:
        checkpoint: a folder or Hub id of ours.
        destination: a path that ends in `.gguf` and does not exist; its folder is made.

    Raises:
        UserError: a field of the configuration has no place in that architecture, the tokenizer
            is of a kind that llama.cpp would read differently, a weight is too large for f16,
            rows do not divide by 32 for q8_0, the package `gguf` is missing, or the destination
            cannot be written.
    """
    if dtype not in get_args(GGUFType):
        raise UserError(f"dtype={dtype!r} is unknown: choose f32, f16 or q8_0.")
    destination = check_new_file(destination, ".gguf")
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise UserError("GGUF needs a package: pip install 'hf-nanogpt[gguf]'.") from error

    model, tokenizer = load_own(checkpoint)
    name = choose_architecture(model.config)
    keys = describe_model(model.config, name, dtype)
    keys |= describe_tokenizer(tokenizer, vocab_size=model.config.vocab_size)
    try:
        with staged_folder(destination.parent) as staged:
            writer = gguf.GGUFWriter(staged / destination.name, name)
            for key, value in keys.items():
                _ADD[type(value)](writer, key, value)
            _write_tensors(writer, model, name, dtype)
    except OSError as error:
        raise UserError(
            f"destination={destination} could not be written, and nothing was left of it: {error}."
        ) from error
    return destination


_ADD: dict[type, Any] = {
    bool: lambda writer, key, value: writer.add_bool(key, value),
    int: lambda writer, key, value: writer.add_uint32(key, value),
    float: lambda writer, key, value: writer.add_float32(key, value),
    str: lambda writer, key, value: writer.add_string(key, value),
    list: lambda writer, key, value: writer.add_array(key, value),
}


def translate_tensors(model: NanoGPTForCausalLM, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors by llama.cpp's names, as that architecture wants them, one at a time."""
    config: Any = model.config
    parts: dict[str, list[Tensor]] = {}
    for ours, weight in model.state_dict().items():
        found = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.(\w+)", ours)
        assert found, ours
        layer, module, kind = found.groups()
        theirs = _MODULES[module]
        if name == "gpt2" and theirs in ("attn_q", "attn_k", "attn_v"):
            theirs = "attn_qkv"  # one matrix, in the order in which they come
        block = f"blk.{layer}." if layer else ""
        parts.setdefault(f"{block}{theirs}.{kind}", []).append(weight)
    if config.tie_word_embeddings:
        del parts["output.weight"]
    for theirs, weights in parts.items():
        tensor = torch.cat(weights) if len(weights) > 1 else weights[0]
        if name == "llama" and re.search(r"attn_[qk]\.", theirs):
            tensor = _interleave(tensor, config.head_dim)
        yield theirs, tensor
        bias = theirs.replace(".weight", ".bias")
        if name == "gpt2" and theirs.startswith("blk.") and bias not in parts:
            yield bias, torch.zeros(len(tensor))
    if config.rope_parameters and config.rope_parameters["rope_type"] == "llama3":
        plain, _ = NanoGPTRotaryEmbedding.compute_default_rope_parameters(config)
        assert model.model.rotary_emb is not None
        yield "rope_freqs.weight", plain / model.model.rotary_emb.original_inv_freq


def _interleave(x: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of each head: RoPE pairs row i with i + D/2 here, 2i with 2i + 1 there."""
    return x.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _choose_type(theirs: str, tensor: Tensor, dtype: GGUFType) -> Any:
    """Return the type that the tensor is stored in; only matrices have fewer bits."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if tensor.dim() < 2 or theirs == "position_embd.weight":
        return GGMLQuantizationType.F32
    kind = GGMLQuantizationType[dtype.upper()]
    width, (block, _) = tensor.shape[-1], GGML_QUANT_SIZES[kind]
    if width % block:
        raise UserError(
            f"{theirs} has rows of {width} weights, and {dtype} takes {block} together: "
            "use dtype='f16'."
        )
    return kind


def _write_tensors(writer: Any, model: NanoGPTForCausalLM, name: str, dtype: GGUFType) -> None:
    """Write the whole file; twice over the tensors, so that never more than one is copied."""
    from gguf import GGML_QUANT_SIZES, quants

    for theirs, tensor in translate_tensors(model, name):
        kind = _choose_type(theirs, tensor, dtype)
        block, size = GGML_QUANT_SIZES[kind]
        num_bytes = tensor.numel() // block * size
        writer.add_tensor_info(theirs, tensor.shape, np.dtype("f4"), num_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for theirs, tensor in translate_tensors(model, name):
        kind = _choose_type(theirs, tensor, dtype)
        with np.errstate(over="ignore"):
            array = quants.quantize(tensor.float().contiguous().numpy(), kind)
        if array.dtype == np.float16 and not np.isfinite(array).all():
            raise UserError(f"{theirs} has weights beyond f16's 65504: use dtype='f32'.")
        writer.write_tensor_data(array)
    writer.close()
