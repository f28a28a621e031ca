"""GPT-Neo (EleutherAI 2021), as transformers' `GPTNeoForCausalLM` keeps it: GPT-3's banded layers.

Its scores are not divided by sqrt(head_dim), and its queries, keys and values have no biases.
"""

from typing import Any

from ..configuration_nanogpt import NanoGPTConfig
from . import gpt2
from .rules import SCALE, Format, one_dropout, plain_heads, rename, rename_back

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
FIELDS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "activation_function": "hidden_act",
    "layer_norm_epsilon": "norm_eps",
    "initializer_range": "initializer_range",
    "tie_word_embeddings": "tie_word_embeddings",
    "use_cache": "use_cache",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
DROPOUTS = ("resid_dropout", "embed_dropout", "attention_dropout")
KINDS = {"global": "full_attention", "local": "sliding_attention"}


def read_config(theirs: dict[str, Any]) -> dict[str, Any]:
    """Return our fields; `attention_types` is a list of (pattern, how many times)."""
    pattern = [kind for kinds, times in theirs["attention_types"] for kind in kinds * times]
    fields = gpt2.FIXED | rename(theirs, FIELDS)
    fields["layer_types"] = [KINDS[kind] for kind in pattern]
    if "local" in pattern:
        fields["sliding_window"] = theirs["window_size"]
    fields["dropout"] = one_dropout(theirs, *DROPOUTS)
    return fields | plain_heads(fields)


def write_config(config: NanoGPTConfig) -> dict[str, Any]:
    """Return the fields of `GPTNeoConfig`."""
    names = {ours: theirs for theirs, ours in KINDS.items()}
    pattern = [names[kind] for kind in config.layer_types or []]
    fields = rename_back(config, FIELDS) | dict.fromkeys(DROPOUTS, config.dropout)
    window = {"window_size": config.sliding_window} if "local" in pattern else {}
    return fields | window | {"attention_types": [[pattern, 1]]}


FORMAT = Format(
    model_type="gpt_neo",
    architecture="GPTNeoForCausalLM",
    rows=ROWS,
    read_config=read_config,
    write_config=write_config,
    ignored=r"transformer\.h\.\d+\.attn\.attention\.(bias|masked_bias)",
)
