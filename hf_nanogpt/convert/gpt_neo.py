"""GPT-Neo (EleutherAI 2021), as transformers' `GPTNeoForCausalLM` stores it: GPT-3's banded layers.

Its scores are not divided by sqrt(head_dim), and its queries, keys and values have no biases.
"""

from typing import Any

from ..configuration_nanogpt import NanoGPTConfig
from . import gpt2
from .rules import (
    SCALE,
    SHARED_FIELDS,
    Format,
    export_dropouts,
    export_fields,
    import_dropouts,
    import_fields,
    plain_heads,
)

ROWS = (
    ("transformer.wte", "model.embed_tokens"),
    ("transformer.wpe", "model.embed_positions"),
    ("transformer.h.{n}.ln_1", "model.layers.{n}.input_layernorm"),
    ("transformer.h.{n}.attn.attention.q_proj", "model.layers.{n}.self_attn.q_proj", SCALE),
    ("transformer.h.{n}.attn.attention.k_proj", "model.layers.{n}.self_attn.k_proj"),
    ("transformer.h.{n}.attn.attention.v_proj", "model.layers.{n}.self_attn.v_proj"),
    ("transformer.h.{n}.attn.attention.out_proj", "model.layers.{n}.self_attn.o_proj"),
    ("transformer.h.{n}.ln_2", "model.layers.{n}.post_attention_layernorm"),
    ("transformer.h.{n}.mlp.c_fc", "model.layers.{n}.mlp.up_proj"),
    ("transformer.h.{n}.mlp.c_proj", "model.layers.{n}.mlp.down_proj"),
    ("transformer.ln_f", "model.norm"),
    ("lm_head", "lm_head"),
)
FIELDS = SHARED_FIELDS | {
    "max_position_embeddings": "max_position_embeddings",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "activation_function": "hidden_act",
    "layer_norm_epsilon": "norm_eps",
}
DROPOUTS = ("attention_dropout", "resid_dropout", "embed_dropout")
LAYER_TYPES = {"global": "full_attention", "local": "sliding_attention"}


def import_config(native: dict[str, Any]) -> dict[str, Any]:
    """Return our fields; transformers runs `attention_layers`, whatever the pattern says."""
    pattern = native["attention_layers"]
    fields = gpt2.FIXED | import_fields(native, FIELDS)
    fields["layer_types"] = [LAYER_TYPES[name] for name in pattern]
    if "local" in pattern:
        fields["sliding_window"] = native["window_size"]
    return fields | import_dropouts(native, *DROPOUTS) | plain_heads(fields)


def export_config(config: NanoGPTConfig) -> dict[str, Any]:
    """Return the fields of `GPTNeoConfig`."""
    names = {ours: name for name, ours in LAYER_TYPES.items()}
    pattern = [names[layer_type] for layer_type in config.layer_types or []]
    fields = export_fields(config, FIELDS) | export_dropouts(config, *DROPOUTS)
    window = {"window_size": config.sliding_window} if "local" in pattern else {}
    return fields | window | {"attention_types": [[pattern, 1]], "attention_layers": pattern}


FORMAT = Format(
    model_type="gpt_neo",
    rows=ROWS,
    import_config=import_config,
    export_config=export_config,
    ignored=r"transformer\.h\.\d+\.attn\.attention\.(bias|masked_bias)",
)
