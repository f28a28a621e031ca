"""LLaMA (Touvron et al. 2023, arXiv:2302.13971), as transformers' `LlamaForCausalLM` stores it."""

from copy import deepcopy
from typing import Any

from ..configuration_nanogpt import NanoGPTConfig
from .rules import (
    SHARED_FIELDS,
    Format,
    export_dropouts,
    export_fields,
    import_dropouts,
    import_fields,
)

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
FIELDS = SHARED_FIELDS | {
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


def import_config(native: dict[str, Any]) -> dict[str, Any]:
    """Return our fields; `rope_parameters` of any type mean the same in both."""
    fields = FIXED | import_fields(native, FIELDS)
    fields["rope_parameters"] = deepcopy(native["rope_parameters"])
    fields["layer_types"] = ["full_attention"] * native["num_hidden_layers"]
    return fields | import_dropouts(native, "attention_dropout", everywhere=False)


def export_config(config: NanoGPTConfig) -> dict[str, Any]:
    """Return the fields of `LlamaConfig`."""
    more = export_dropouts(config, "attention_dropout")
    more["rope_parameters"] = deepcopy(config.rope_parameters)
    return export_fields(config, FIELDS) | more


FORMAT = Format(
    model_type="llama",
    rows=ROWS,
    import_config=import_config,
    export_config=export_config,
    ignored=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
)
