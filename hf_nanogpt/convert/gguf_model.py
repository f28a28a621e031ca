"""What llama.cpp runs of ours: which of its architectures, and the keys that describe it there."""

from typing import Any, Literal

from ..configuration_nanogpt import NanoGPTConfig
from ..errors import UserError

GGUFType = Literal["f32", "f16", "q8_0"]
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}  # llama.cpp's numbers for most of a file's matrices

# What an architecture computes, as the values of our fields that it takes.
_ALL: dict[str, tuple] = {
    "norm_position": ("pre",),
    "embedding_norm": (False,),
    "final_logit_softcapping": (None,),
}
_ROPE = _ALL | {"norm_type": ("rmsnorm",), "mlp_type": ("glu",), "hidden_act": ("silu", "swish")}
ARCHITECTURES: dict[str, dict[str, tuple]] = {
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


def choose_architecture(config: NanoGPTConfig) -> str:
    """Return the architecture of llama.cpp that computes this, or raise a `UserError`."""
    learned = config.position_embedding_type == "learned"
    name = "gpt2" if learned else "qwen3" if config.qk_norm else "llama"
    allowed = dict(ARCHITECTURES[name])
    if "sliding_attention" in config.layer_types:
        allowed["sliding_window"] = (None,)
    if learned:
        allowed["num_key_value_heads"] = (config.num_attention_heads,)
        allowed["head_dim"] = (config.hidden_size / config.num_attention_heads,)
    obstacles = [
        f"{field}={getattr(config, field)!r} (it has {' or '.join(map(repr, values))})"
        for field, values in allowed.items()
        if getattr(config, field) not in values
    ]
    scalings = ["default", "linear"] + ["llama3"] * (name == "llama")
    kind = "default" if learned else config.rope_parameters["rope_type"]
    if kind not in scalings:
        obstacles.append(f"rope_parameters with rope_type={kind!r} (it has {', '.join(scalings)})")
    if obstacles:
        raise UserError(
            f"GGUF: llama.cpp would run this as {name}, in whose way stands {', '.join(obstacles)}."
        )
    return name


def describe_model(config: NanoGPTConfig, name: str, dtype: GGUFType) -> dict[str, Any]:
    """Return the keys of a GGUF file that say what the tensors are."""
    norm = "layer_norm_epsilon" if name == "gpt2" else "layer_norm_rms_epsilon"
    own: dict[str, Any] = {key: getattr(config, field) for key, field in _SIZES.items()}
    own[f"attention.{norm}"] = float(config.norm_eps)
    rope: Any = config.rope_parameters
    if rope:
        own["rope.dimension_count"] = config.head_dim
        own["rope.freq_base"] = float(rope["rope_theta"])
        if rope["rope_type"] == "linear":
            own |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    return {"general.file_type": _FILE_TYPES[dtype]} | {f"{name}.{k}": v for k, v in own.items()}
