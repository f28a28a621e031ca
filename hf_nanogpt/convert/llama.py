"""LLaMA (Touvron et al. 2023, arXiv:2302.13971), as transformers' `LlamaForCausalLM` keeps it."""

from copy import deepcopy
from typing import Any

from ..configuration_nanogpt import NanoGPTConfig
from .rules import Format, one_dropout, rename, rename_back

LAYER = "model.layers.{n}"
MODULES = (
    "model.embed_tokens",
    f"{LAYER}.input_layernorm",
    f"{LAYER}.self_attn.q_proj",
    f"{LAYER}.self_attn.k_proj",
    f"{LAYER}.self_attn.v_proj",
    f"{LAYER}.self_attn.o_proj",
    f"{LAYER}.post_attention_layernorm",
    f"{LAYER}.mlp.gate_proj",
    f"{LAYER}.mlp.up_proj",
    f"{LAYER}.mlp.down_proj",
    "model.norm",
    "lm_head",
)
ROWS = tuple((name, name) for name in MODULES)  # our names are Llama's
FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
    "hidden_act": "hidden_act",
    "rms_norm_eps": "norm_eps",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "initializer_range": "initializer_range",
    "tie_word_embeddings": "tie_word_embeddings",
    "use_cache": "use_cache",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
FIXED = {
    "position_embedding_type": "rope",
    "norm_type": "rmsnorm",
    "norm_position": "pre",
    "embedding_norm": False,
    "qk_norm": False,
    "mlp_type": "glu",
    "final_logit_softcapping": None,
}


def read_config(theirs: dict[str, Any]) -> dict[str, Any]:
    """Return our fields; `rope_parameters` mean the same, whatever their type."""
    fields = FIXED | rename(theirs, FIELDS)
    fields["rope_parameters"] = deepcopy(theirs["rope_parameters"])
    fields["layer_types"] = ["full_attention"] * theirs["num_hidden_layers"]
    fields["dropout"] = one_dropout(theirs, "attention_dropout", everywhere=False)
    return fields


def write_config(config: NanoGPTConfig) -> dict[str, Any]:
    """Return the fields of `LlamaConfig`."""
    more = {"rope_parameters": deepcopy(config.rope_parameters), "attention_dropout": 0.0}
    return rename_back(config, FIELDS) | more


FORMAT = Format(
    model_type="llama",
    architecture="LlamaForCausalLM",
    rows=ROWS,
    read_config=read_config,
    write_config=write_config,
    ignored=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
)
