"""nanochat, as transformers' `NanoChatForCausalLM` keeps it.

Norms have no weights, and RoPE turns the other way round. It normalises queries and keys after the
rotation, ours before, which is the same, since a rotation changes no lengths.
"""

from typing import Any

from ..configuration_nanogpt import NanoGPTConfig
from . import llama
from .rules import SWAP_HALVES, Format

ROWS = (
    ("model.embed_tokens", "model.embed_tokens"),
    ("model.layers.{n}.self_attn.q_proj", "model.layers.{n}.self_attn.q_proj", SWAP_HALVES),
    ("model.layers.{n}.self_attn.k_proj", "model.layers.{n}.self_attn.k_proj", SWAP_HALVES),
    ("model.layers.{n}.self_attn.v_proj", "model.layers.{n}.self_attn.v_proj"),
    ("model.layers.{n}.self_attn.o_proj", "model.layers.{n}.self_attn.o_proj"),
    ("model.layers.{n}.mlp.fc1", "model.layers.{n}.mlp.up_proj"),
    ("model.layers.{n}.mlp.fc2", "model.layers.{n}.mlp.down_proj"),
    ("lm_head", "lm_head"),
)
FIXED = {
    "norm_type": "rmsnorm_unweighted",
    "embedding_norm": True,
    "qk_norm": True,
    "mlp_type": "mlp",
}


def read_config(theirs: dict[str, Any]) -> dict[str, Any]:
    """Return our fields.

    The factor that YaRN and LongRoPE put on cos and sin is lost in their norm after the rotation,
    so ours must be 1.
    """
    head_dim = theirs.get("head_dim") or theirs["hidden_size"] // theirs["num_attention_heads"]
    fields = llama.read_config(theirs | {"mlp_bias": False, "head_dim": head_dim}) | FIXED
    fields["final_logit_softcapping"] = theirs["final_logit_softcapping"]
    rope = fields["rope_parameters"]
    if rope and rope["rope_type"] in ("yarn", "longrope"):
        rope["attention_factor"] = 1.0
    return fields


def write_config(config: NanoGPTConfig) -> dict[str, Any]:
    """Return the fields of `NanoChatConfig`; `head_dim` is none, but its model looks for it."""
    fields = llama.write_config(config)
    del fields["mlp_bias"]
    if config.head_dim == config.hidden_size / config.num_attention_heads:
        del fields["head_dim"]
    cap = config.final_logit_softcapping
    return fields | {"final_logit_softcapping": None if cap is None else float(cap)}


FORMAT = Format(
    model_type="nanochat",
    architecture="NanoChatForCausalLM",
    rows=ROWS,
    read_config=read_config,
    write_config=write_config,
    newer=r"value_embeds|ve_gate|resid_lambdas|x0_lambdas|smear_|backout_lambda",
)
