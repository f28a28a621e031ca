"""Named architectures: one row each, with the paper or code that the sizes come from."""

import copy
from typing import Any

from .configuration_nanogpt import NanoGPTConfig
from .errors import UserError, did_you_mean, settings_errors

_GPT: dict[str, Any] = {
    "vocab_size": 50257,
    "position_embedding_type": "learned",
    "norm_type": "layernorm",
    "norm_eps": 1e-5,
    "qk_norm": False,
    "hidden_act": "gelu_new",
    "mlp_type": "mlp",
    "attention_bias": True,
    "mlp_bias": True,
    "dropout": 0.1,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}
_GPT1 = _GPT | {
    "vocab_size": 40478,
    "max_position_embeddings": 512,
    "norm_position": "post",
    "bos_token_id": None,
    "eos_token_id": None,
}
# GPT-3 alternates dense and locally banded layers. The band was never published; 256 is GPT-Neo's.
_GPT3 = _GPT | {
    "max_position_embeddings": 2048,
    "dropout": 0.0,
    "sliding_window": 256,
    "layer_types": ["full_attention", "sliding_attention"],
}
_LLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "qk_norm": False,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN3: dict[str, Any] = {
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "initializer_range": 0.02,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
_NANOCHAT: dict[str, Any] = {
    "vocab_size": 65536,
    "max_position_embeddings": 2048,
    "norm_type": "rmsnorm_unweighted",
    "embedding_norm": True,
    "hidden_act": "relu2",
    "mlp_type": "mlp",
    "final_logit_softcapping": 15.0,
}


def _size(layers: int, width: int, heads: int, **more: Any) -> dict[str, Any]:
    return {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads, **more}


PRESETS: dict[str, dict[str, Any]] = {
    # Our own, with Qwen3's mathematics.
    "nano": _size(12, 768, 12),
    # Radford et al. 2018.
    "gpt1": _GPT1 | _size(12, 768, 12),
    # Radford et al. 2019, table 2.
    "gpt2": _GPT | _size(12, 768, 12),
    "gpt2-medium": _GPT | _size(24, 1024, 16),
    "gpt2-large": _GPT | _size(36, 1280, 20),
    "gpt2-xl": _GPT | _size(48, 1600, 25),
    # Brown et al. 2020 (arXiv:2005.14165), table 2.1. For 1.3B the paper prints 24 heads of 128,
    # which is not 2048 wide, and for 13B a width of 5140, which 40 heads do not divide.
    "gpt3-125m": _GPT3 | _size(12, 768, 12),
    "gpt3-350m": _GPT3 | _size(24, 1024, 16),
    "gpt3-760m": _GPT3 | _size(24, 1536, 16),
    "gpt3-1.3b": _GPT3 | _size(24, 2048, 16),
    "gpt3-2.7b": _GPT3 | _size(32, 2560, 32),
    "gpt3-6.7b": _GPT3 | _size(32, 4096, 32),
    "gpt3-13b": _GPT3 | _size(40, 5120, 40),
    "gpt3-175b": _GPT3 | _size(96, 12288, 96),
    # Touvron et al. 2023 (arXiv:2302.13971), table 2; MLP widths and norm_eps are those
    # of the released weights.
    "llama-7b": _LLAMA | _size(32, 4096, 32, intermediate_size=11008),
    "llama-13b": _LLAMA | _size(40, 5120, 40, intermediate_size=13824),
    "llama-33b": _LLAMA | _size(60, 6656, 52, intermediate_size=17920),
    "llama-65b": _LLAMA | _size(80, 8192, 64, intermediate_size=22016, norm_eps=1e-5),
    # Yang et al. 2025 (arXiv:2505.09388), table 1, and the released configurations.
    "qwen3-0.6b": _QWEN3 | _size(28, 1024, 16, intermediate_size=3072, tie_word_embeddings=True),
    "qwen3-1.7b": _QWEN3 | _size(28, 2048, 16, intermediate_size=6144, tie_word_embeddings=True),
    "qwen3-4b": _QWEN3 | _size(36, 2560, 32, intermediate_size=9728, tie_word_embeddings=True),
    "qwen3-8b": _QWEN3 | _size(36, 4096, 32, intermediate_size=12288),
    # nanochat's speedruns: the width is 64 times the depth, and heads have 128 dimensions.
    "nanochat-d12": _NANOCHAT | _size(12, 768, 6),
    "nanochat-d20": _NANOCHAT | _size(20, 1280, 10),
    "nanochat-d32": _NANOCHAT | _size(32, 2048, 16),
}

_SOURCES = {
    "nano": "this project; the mathematics of Qwen3",
    "gpt1": "Radford et al. 2018, Improving Language Understanding by Generative Pre-Training",
    "gpt2": "Radford et al. 2019, Language Models are Unsupervised Multitask Learners",
    "gpt3": "Brown et al. 2020, Language Models are Few-Shot Learners, arXiv:2005.14165",
    "llama": "Touvron et al. 2023, LLaMA, arXiv:2302.13971",
    "qwen3": "Yang et al. 2025, Qwen3 Technical Report, arXiv:2505.09388",
    "nanochat": "nanochat, which transformers has as NanoChatForCausalLM",
}

# Fields that a row may state, and what each depends on: a new value of the latter drops the former,
# which the configuration then derives again.
_DEPENDS = {
    "intermediate_size": {"hidden_size", "mlp_type"},
    "head_dim": {"hidden_size", "num_attention_heads"},
    "num_key_value_heads": {"num_attention_heads"},
    "rope_theta": {"position_embedding_type"},
}


def list_presets() -> list[str]:
    """Return the names that `load_preset` takes."""
    return list(PRESETS)


def describe_source(name: str) -> str:
    """Return the paper or code that a preset's sizes come from."""
    return _SOURCES[name.split("-")[0]]


def load_preset(name: str, **overrides: Any) -> NanoGPTConfig:
    """Return the configuration of a named architecture, with any field replaced.

    nanoGPT's names of fields work, too (`n_layer`, `n_head`, `n_embd`, `block_size`, `bias`). If an
    override makes another field of the preset wrong, that field is derived again: a new
    `hidden_size` changes the width of the MLP. An unknown name or field raises a `UserError`.

    >>> load_preset("gpt2", n_layer=6, n_head=6, n_embd=384).intermediate_size
    1536
    """
    if name not in PRESETS:
        hint = did_you_mean(name, PRESETS)
        raise UserError(f"preset={name!r} is unknown.{hint} Known: {', '.join(PRESETS)}.")
    row = copy.deepcopy(PRESETS[name])
    with settings_errors(of_rope=True):
        if "bias" in overrides:
            bias = overrides.pop("bias")
            overrides = dict.fromkeys(("attention_bias", "mlp_bias"), bias) | overrides
        overrides = NanoGPTConfig.resolve_names(overrides)
        return NanoGPTConfig(**_override(row, overrides))


def _override(row: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a row with overrides, without what these make wrong."""
    before = NanoGPTConfig(**row | {"layer_types": None})
    changed = {key for key, value in overrides.items() if getattr(before, key, None) != value}
    kept = {key: row[key] for key in row if not _DEPENDS.get(key, set()) & changed}
    # The override's rope parameters keep the row's base unless they have their own.
    ropes = [overrides.get(key) for key in ("rope_parameters", "rope_scaling")]
    if any(isinstance(rope, dict) and "rope_theta" in rope for rope in ropes):
        kept.pop("rope_theta", None)
    # A smaller vocabulary lacks the row's special tokens.
    size = overrides.get("vocab_size", before.vocab_size)
    for key in ("bos_token_id", "eos_token_id"):
        if isinstance(size, int) and (kept.get(key) or 0) >= size:
            del kept[key]
    if (kept | overrides).get("sliding_window") is None:
        kept.pop("layer_types", None)  # no layer can slide
    # A row states the pattern of its layers, which repeats.
    if "layer_types" not in overrides and (pattern := kept.get("layer_types")):
        layers = (kept | overrides)["num_hidden_layers"]
        kept["layer_types"] = [pattern[i % len(pattern)] for i in range(layers)]
    if "sliding_attention" not in ((kept | overrides).get("layer_types") or ["sliding_attention"]):
        kept.pop("sliding_window", None)
    return kept | overrides
