"""GPT-2 (Radford et al. 2019), as transformers' `GPT2LMHeadModel` keeps it."""

from typing import Any

from ..configuration_nanogpt import NanoGPTConfig
from .rules import SPLIT, TRANSPOSE, Format, expect, one_dropout, plain_heads, rename, rename_back

ROWS = (
    ("transformer.wte", "model.embed_tokens"),
    ("transformer.wpe", "model.embed_positions"),
    ("transformer.h.{n}.ln_1", "model.layers.{n}.input_layernorm"),
    ("transformer.h.{n}.attn.c_attn", "model.layers.{n}.self_attn.{qkv}_proj", TRANSPOSE, SPLIT),
    ("transformer.h.{n}.attn.c_proj", "model.layers.{n}.self_attn.o_proj", TRANSPOSE),
    ("transformer.h.{n}.ln_2", "model.layers.{n}.post_attention_layernorm"),
    ("transformer.h.{n}.mlp.c_fc", "model.layers.{n}.mlp.up_proj", TRANSPOSE),
    ("transformer.h.{n}.mlp.c_proj", "model.layers.{n}.mlp.down_proj", TRANSPOSE),
    ("transformer.ln_f", "model.norm"),
    ("lm_head", "lm_head"),
)
FIELDS = {
    "vocab_size": "vocab_size",
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "activation_function": "hidden_act",
    "layer_norm_epsilon": "norm_eps",
    "initializer_range": "initializer_range",
    "tie_word_embeddings": "tie_word_embeddings",
    "use_cache": "use_cache",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
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
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def read_config(theirs: dict[str, Any]) -> dict[str, Any]:
    """Return our fields (`reorder_and_upcast_attn` only changes the rounding, and is left out)."""
    expect(
        theirs,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    fields = FIXED | rename(theirs, FIELDS)
    fields["layer_types"] = ["full_attention"] * theirs["n_layer"]
    fields["dropout"] = one_dropout(theirs, *DROPOUTS)
    return fields | plain_heads(fields)


def write_config(config: NanoGPTConfig) -> dict[str, Any]:
    """Return the fields of `GPT2Config`."""
    return rename_back(config, FIELDS) | dict.fromkeys(DROPOUTS, config.dropout)


FORMAT = Format(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    rows=ROWS,
    read_config=read_config,
    write_config=write_config,
    ignored=r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",
)
