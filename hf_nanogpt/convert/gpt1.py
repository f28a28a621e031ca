"""GPT-1 (Radford et al. 2018), as transformers' `OpenAIGPTLMHeadModel` keeps it."""

from typing import Any

from ..configuration_nanogpt import NanoGPTConfig
from ..errors import UserError
from . import gpt2
from .rules import SPLIT, TRANSPOSE, Format, one_dropout, plain_heads, rename, rename_back

ROWS = (
    ("transformer.tokens_embed", "model.embed_tokens"),
    ("transformer.positions_embed", "model.embed_positions"),
    ("transformer.h.{n}.attn.c_attn", "model.layers.{n}.self_attn.{qkv}_proj", TRANSPOSE, SPLIT),
    ("transformer.h.{n}.attn.c_proj", "model.layers.{n}.self_attn.o_proj", TRANSPOSE),
    ("transformer.h.{n}.ln_1", "model.layers.{n}.input_layernorm"),
    ("transformer.h.{n}.mlp.c_fc", "model.layers.{n}.mlp.up_proj", TRANSPOSE),
    ("transformer.h.{n}.mlp.c_proj", "model.layers.{n}.mlp.down_proj", TRANSPOSE),
    ("transformer.h.{n}.ln_2", "model.layers.{n}.post_attention_layernorm"),
    ("lm_head", "lm_head"),
)
# GPT-2's fields without those that GPT-1 lacks.
FIELDS = {
    theirs: ours
    for theirs, ours in gpt2.FIELDS.items()
    if theirs not in ("n_inner", "activation_function", "use_cache")
}
FIXED = gpt2.FIXED | {"norm_position": "post"}
# Its "gelu" means the tanh form; each name that is no key here is none of OpenAIGPTConfig's either.
ACTIVATIONS = {"gelu": "gelu_new", "relu": "relu", "silu": "silu", "swish": "silu"}


def read_config(theirs: dict[str, Any]) -> dict[str, Any]:
    """Return our fields; the MLP is always four times as wide as the model."""
    if theirs["afn"] not in ACTIVATIONS:
        raise UserError(f"afn={theirs['afn']!r} is none of GPT-1's: {', '.join(ACTIVATIONS)}.")
    fields = FIXED | rename(theirs, FIELDS)
    fields["hidden_act"] = ACTIVATIONS[theirs["afn"]]
    fields["intermediate_size"] = 4 * theirs["n_embd"]
    fields["layer_types"] = ["full_attention"] * theirs["n_layer"]
    fields["dropout"] = one_dropout(theirs, *gpt2.DROPOUTS)
    return fields | plain_heads(fields)


def write_config(config: NanoGPTConfig) -> dict[str, Any]:
    """Return the fields of `OpenAIGPTConfig`."""
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    dropouts = dict.fromkeys(gpt2.DROPOUTS, config.dropout)
    return rename_back(config, FIELDS) | dropouts | {"afn": names.get(config.hidden_act, "gelu")}


FORMAT = Format(
    model_type="openai-gpt",
    architecture="OpenAIGPTLMHeadModel",
    rows=ROWS,
    read_config=read_config,
    write_config=write_config,
    ignored=r"transformer\.(position_ids|h\.\d+\.attn\.bias)",
)
