"""GGUF, the one-file format of llama.cpp, which runs our models as its gpt2, llama or qwen3.

Tensor and key names are those of llama.cpp's loaders; `gguf`, an optional package, writes the
bytes. `gguf_tokenizer.py` has the keys that describe the tokenizer.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..generation import find_ends
from ..modeling_nanogpt import NanoGPTForCausalLM, NanoGPTRotaryEmbedding
from .folders import check_new_file, load_our_model, written_folder
from .gguf_tokenizer import describe_tokenizer

GGUFType = Literal["f32", "f16", "q8_0"]
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}  # llama.cpp's numbers for most of a file's matrices

# What each of llama.cpp's architectures computes: for fields of ours, the values that it takes.
_ALL: dict[str, tuple] = {
    "norm_position": ("pre",),
    "embedding_norm": (False,),
    "final_logit_softcapping": (None,),
}
_ROPE = _ALL | {"norm_type": ("rmsnorm",), "mlp_type": ("glu",), "hidden_act": ("silu", "swish")}
_ARCHITECTURES: dict[str, dict[str, tuple]] = {
    "gpt2": _ALL
    | {
        "norm_type": ("layernorm",),
        "mlp_type": ("mlp",),
        "hidden_act": ("gelu_new", "gelu_pytorch_tanh"),  # the same function
        "qk_norm": (False,),
    },
    "llama": _ROPE,
    "qwen3": _ROPE | {"attention_bias": (False,), "mlp_bias": (False,)},
}
_SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "vocab_size": "vocab_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
}
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
    """Write one of our checkpoints with its tokenizer as a file that llama.cpp runs.

    A model with learned positions becomes a gpt2, one with `qk_norm` a qwen3, any other a llama.
    `dtype="f16"` halves the matrices, `"q8_0"` gives them 8 bits and a scale for each 32 weights;
    vectors and positions stay in f32, as in llama.cpp's own files.

    Args:
        checkpoint: a folder or Hub id of ours.
        destination: a path that ends in `.gguf` and does not exist; its folder is made.

    Raises:
        UserError: llama.cpp cannot express a setting of the model or would read the tokenizer
            differently, a weight is too large for f16, rows do not divide by 32 for q8_0, the
            package `gguf` is missing, or the destination cannot be written.
    """
    if dtype not in get_args(GGUFType):
        raise UserError(f"dtype={dtype!r} is unknown: choose f32, f16 or q8_0.")
    destination = check_new_file(destination, ".gguf")
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise UserError("GGUF needs a package: pip install 'hf-nanogpt[gguf]'.") from error

    model, tokenizer = load_our_model(checkpoint)
    name = choose_architecture(model.config)
    keys = describe_model(model.config, name, dtype)
    keys |= describe_tokenizer(
        tokenizer, vocab_size=model.config.vocab_size, ends=find_ends(model, tokenizer)
    )
    with written_folder(destination.parent, file=destination) as staged:
        writer = gguf.GGUFWriter(staged / destination.name, name)
        add: dict[type, Any] = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        for key, value in keys.items():
            add[type(value)](key, value)
        _write_tensors(writer, model, name, dtype)
    return destination


# The model's description


def choose_architecture(config: Any) -> str:
    """Return the architecture of llama.cpp that computes this model, or raise a `UserError`."""
    learned = config.position_embedding_type == "learned"
    name = "gpt2" if learned else "qwen3" if config.qk_norm else "llama"
    allowed = dict(_ARCHITECTURES[name])
    if "sliding_attention" in config.layer_types:
        allowed["sliding_window"] = (None,)
    if learned:
        allowed["num_key_value_heads"] = (config.num_attention_heads,)
        allowed["head_dim"] = (config.hidden_size / config.num_attention_heads,)
    obstacles = [
        f"{field}={getattr(config, field)!r} (only {' or '.join(map(repr, values))})"
        for field, values in allowed.items()
        if getattr(config, field) not in values
    ]
    scalings = ["default", "linear"] + ["llama3"] * (name == "llama")
    rope_type = "default" if learned else config.rope_parameters["rope_type"]
    if rope_type not in scalings:
        obstacles.append(f"rope_type={rope_type!r} (only {', '.join(scalings)})")
    if obstacles:
        raise UserError(
            f"GGUF: llama.cpp would run this model as {name}, which cannot express "
            f"{', '.join(obstacles)}."
        )
    return name


def describe_model(config: Any, name: str, dtype: GGUFType) -> dict[str, Any]:
    """Return the keys of a GGUF file that describe the model."""
    norm = "layer_norm_epsilon" if name == "gpt2" else "layer_norm_rms_epsilon"
    keys = {key: getattr(config, field) for key, field in _SIZES.items()}
    keys[f"attention.{norm}"] = float(config.norm_eps)
    if rope := config.rope_parameters:
        keys["rope.dimension_count"] = config.head_dim
        keys["rope.freq_base"] = float(rope["rope_theta"])
        if rope["rope_type"] == "linear":
            keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    return {"general.file_type": _FILE_TYPES[dtype]} | {f"{name}.{k}": v for k, v in keys.items()}


# The tensors


def translate_tensors(model: NanoGPTForCausalLM, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors with llama.cpp's names, as the architecture wants them, one at a time."""
    config: Any = model.config
    # Collect what goes into each of its tensors: gpt2 wants one matrix for queries, keys, values.
    parts: dict[str, list[Tensor]] = {}
    for ours, weight in model.state_dict().items():
        found = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.(weight|bias)", ours)
        assert found, ours
        layer, module, suffix = found.groups()
        path = _MODULES[module]
        if name == "gpt2" and path in ("attn_q", "attn_k", "attn_v"):
            path = "attn_qkv"
        block = f"blk.{layer}." if layer else ""
        parts.setdefault(f"{block}{path}.{suffix}", []).append(weight)
    if config.tie_word_embeddings:
        del parts["output.weight"]

    for path, weights in parts.items():
        tensor = torch.cat(weights) if len(weights) > 1 else weights[0]
        if name == "llama" and re.search(r"attn_[qk]\.", path):
            tensor = _interleave(tensor, config.head_dim)
        yield path, tensor
        bias = path.replace(".weight", ".bias")
        if name == "gpt2" and path.startswith("blk.") and bias not in parts:
            yield bias, torch.zeros(len(tensor))  # it has biases everywhere

    if config.rope_parameters and config.rope_parameters["rope_type"] == "llama3":
        plain, _ = NanoGPTRotaryEmbedding.compute_default_rope_parameters(config)
        assert model.model.rotary_emb is not None
        yield "rope_freqs.weight", plain / model.model.rotary_emb.original_inv_freq


def _interleave(x: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of each head: our RoPE pairs row i with i + D/2, theirs 2i with 2i + 1."""
    return x.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _choose_type(path: str, tensor: Tensor, dtype: GGUFType) -> Any:
    """Return the type to store a tensor in; only matrices get fewer bits."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if tensor.dim() < 2 or path == "position_embd.weight":
        return GGMLQuantizationType.F32
    ggml_type = GGMLQuantizationType[dtype.upper()]
    width, (block, _) = tensor.shape[-1], GGML_QUANT_SIZES[ggml_type]
    if width % block:
        raise UserError(
            f"{path} has rows of {width} weights, and {dtype} packs {block} together: use "
            "dtype='f16'."
        )
    return ggml_type


def _write_tensors(writer: Any, model: NanoGPTForCausalLM, name: str, dtype: GGUFType) -> None:
    """Write the whole file, in two passes so that only one tensor is copied at a time."""
    from gguf import GGML_QUANT_SIZES, quants

    # First pass: the table of names, shapes and types, which comes before the data.
    for path, tensor in translate_tensors(model, name):
        ggml_type = _choose_type(path, tensor, dtype)
        block, size = GGML_QUANT_SIZES[ggml_type]
        num_bytes = tensor.numel() // block * size
        writer.add_tensor_info(path, tensor.shape, np.dtype("f4"), num_bytes, raw_dtype=ggml_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    # Second pass: the data.
    for path, tensor in translate_tensors(model, name):
        ggml_type = _choose_type(path, tensor, dtype)
        with np.errstate(over="ignore"):
            array = quants.quantize(tensor.float().contiguous().numpy(), ggml_type)
        if array.dtype == np.float16 and not np.isfinite(array).all():
            raise UserError(f"{path} has weights beyond f16's 65504: use dtype='f32'.")
        writer.write_tensor_data(array)
    writer.close()
