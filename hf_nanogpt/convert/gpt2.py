"""GPT-2 (Radford et al. 2019), as transformers' `GPT2LMHeadModel` stores it."""

from typing import Any

from ..configuration_nanogpt import NanoGPTConfig
from .rules import (
    SHARED_FIELDS,
    SPLIT,
    TRANSPOSE,
    Format,
    export_dropouts,
    export_fields,
    import_dropouts,
    import_fields,
    plain_heads,
    require,
)

BLOCK_ROWS = (
    ("transformer.h.{n}.ln_1", "model.layers.{n}.input_layernorm"),
    ("transformer.h.{n}.attn.c_attn", "model.layers.{n}.self_attn.{qkv}_proj", TRANSPOSE, SPLIT),
    ("transformer.h.{n}.attn.c_proj", "model.layers.{n}.self_attn.o_proj", TRANSPOSE),
    ("transformer.h.{n}.ln_2", "model.layers.{n}.post_attention_layernorm"),
    ("transformer.h.{n}.mlp.c_fc", "model.layers.{n}.mlp.up_proj", TRANSPOSE),
    ("transformer.h.{n}.mlp.c_proj", "model.layers.{n}.mlp.down_proj", TRANSPOSE),
)
ROWS = (
    ("transformer.wte", "model.embed_tokens"),
    ("transformer.wpe", "model.embed_positions"),
    *BLOCK_ROWS,
    ("transformer.ln_f", "model.norm"),
    ("lm_head", "lm_head"),
)
FIELDS = SHARED_FIELDS | {
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "activation_function": "hidden_act",
    "layer_norm_epsilon": "norm_eps",
}
FIXED = {
    "position_embedding_type": "learned",
    "norm_type": "layernorm",
    "norm_position": "pre",
    "embedding_norm": False,
    "qk_norm": False,
    "mlp_type": "mlp",
    "attention_bias": True,
    "mlp_bias": True,
    "final_logit_softcapping": None,
}
DROPOUTS = ("attn_pdrop", "resid_pdrop", "embd_pdrop")


def import_config(native: dict[str, Any]) -> dict[str, Any]:
    """Return our fields. `reorder_and_upcast_attn` is left out: it only changes the rounding."""
    require(
        native,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    fields = FIXED | import_fields(native, FIELDS)
    fields["layer_types"] = ["full_attention"] * native["n_layer"]
    return fields | import_dropouts(native, *DROPOUTS) | plain_heads(fields)


def export_config(config: NanoGPTConfig) -> dict[str, Any]:
    """Return the fields of `GPT2Config`."""
    fields = export_fields(config, FIELDS) | export_dropouts(config, *DROPOUTS)
    return fields | {"n_ctx": config.max_position_embeddings}  # as in published files; MLX reads it


FORMAT = Format(
    model_type="gpt2",
    rows=ROWS,
    import_config=import_config,
    export_config=export_config,
    ignored=r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",
)
