"""OPT (Zhang et al. 2022, arXiv:2205.01068), as transformers' `OPTForCausalLM` stores it.

GPT-2 with ReLU, whose table of positions begins with two rows that no token uses.
"""

from typing import Any

from ..configuration_nanogpt import NanoGPTConfig
from . import gpt2
from .rules import (
    SHARED_FIELDS,
    SKIP_TWO,
    Format,
    export_dropouts,
    export_fields,
    import_dropouts,
    import_fields,
    plain_heads,
    require,
)

LAYER = "model.decoder.layers.{n}"
ROWS = (
    ("model.decoder.embed_tokens", "model.embed_tokens"),
    ("model.decoder.embed_positions", "model.embed_positions", SKIP_TWO),
    (f"{LAYER}.self_attn_layer_norm", "model.layers.{n}.input_layernorm"),
    (f"{LAYER}.self_attn.q_proj", "model.layers.{n}.self_attn.q_proj"),
    (f"{LAYER}.self_attn.k_proj", "model.layers.{n}.self_attn.k_proj"),
    (f"{LAYER}.self_attn.v_proj", "model.layers.{n}.self_attn.v_proj"),
    (f"{LAYER}.self_attn.out_proj", "model.layers.{n}.self_attn.o_proj"),
    (f"{LAYER}.final_layer_norm", "model.layers.{n}.post_attention_layernorm"),
    (f"{LAYER}.fc1", "model.layers.{n}.mlp.up_proj"),
    (f"{LAYER}.fc2", "model.layers.{n}.mlp.down_proj"),
    ("model.decoder.final_layer_norm", "model.norm"),
    ("lm_head", "lm_head"),
)
FIELDS = {name: ours for name, ours in SHARED_FIELDS.items() if name != "initializer_range"} | {
    "init_std": "initializer_range",
    "max_position_embeddings": "max_position_embeddings",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "ffn_dim": "intermediate_size",
    "activation_function": "hidden_act",
}
DROPOUTS = ("attention_dropout", "dropout")  # none of the embeddings


def import_config(native: dict[str, Any]) -> dict[str, Any]:
    """Return our fields; opt-350m, which normalises afterwards, cannot be expressed."""
    require(
        native,
        do_layer_norm_before=True,
        _remove_final_layer_norm=False,
        layer_norm_elementwise_affine=True,
        word_embed_proj_dim=native["hidden_size"],
    )
    fields = gpt2.FIXED | import_fields(native, FIELDS) | {"norm_eps": 1e-5}
    fields |= dict.fromkeys(("attention_bias", "mlp_bias"), native["enable_bias"])
    fields["layer_types"] = ["full_attention"] * native["num_hidden_layers"]
    fields |= import_dropouts(native, *DROPOUTS, everywhere=False)
    return fields | plain_heads(fields)


def export_config(config: NanoGPTConfig) -> dict[str, Any]:
    """Return the fields of `OPTConfig`."""
    fields = export_fields(config, FIELDS) | export_dropouts(config, *DROPOUTS) | {"dropout": 0.0}
    biases = config.attention_bias or config.mlp_bias
    return fields | {"word_embed_proj_dim": config.hidden_size, "enable_bias": biases}


FORMAT = Format(
    model_type="opt",
    rows=ROWS,
    import_config=import_config,
    export_config=export_config,
)
