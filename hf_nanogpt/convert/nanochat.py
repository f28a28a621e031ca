"""nanochat, as transformers' `NanoChatForCausalLM` stores it.

Its norms have no weights, and its RoPE rotates in the other direction. It normalises queries and
keys after the rotation, we do so before; both are the same, since a rotation changes no lengths.
"""

from typing import Any

from ..configuration_nanogpt import NanoGPTConfig
from . import llama
from .rules import SWAP_HALVES, Format

ATTENTION = f"{llama.LAYER}.self_attn"
ROWS = (
    ("model.embed_tokens", "model.embed_tokens"),
    (f"{ATTENTION}.q_proj", f"{ATTENTION}.q_proj", SWAP_HALVES),
    (f"{ATTENTION}.k_proj", f"{ATTENTION}.k_proj", SWAP_HALVES),
    (f"{ATTENTION}.v_proj", f"{ATTENTION}.v_proj"),
    (f"{ATTENTION}.o_proj", f"{ATTENTION}.o_proj"),
    (f"{llama.LAYER}.mlp.fc1", f"{llama.LAYER}.mlp.up_proj"),
    (f"{llama.LAYER}.mlp.fc2", f"{llama.LAYER}.mlp.down_proj"),
    ("lm_head", "lm_head"),
)
FIXED = {
    "norm_type": "rmsnorm_unweighted",
    "embedding_norm": True,
    "qk_norm": True,
    "mlp_type": "mlp",
}


def import_config(native: dict[str, Any]) -> dict[str, Any]:
    """Return our fields.

    YaRN and LongRoPE multiply cos and sin by a factor. nanochat's norm after the rotation removes
    it, so in our model it must be 1.
    """
    head_dim = native.get("head_dim") or native["hidden_size"] // native["num_attention_heads"]
    fields = llama.import_config(native | {"mlp_bias": False, "head_dim": head_dim}) | FIXED
    fields["final_logit_softcapping"] = native["final_logit_softcapping"]
    rope = fields["rope_parameters"]
    if rope and rope["rope_type"] in ("yarn", "longrope"):
        rope["attention_factor"] = 1.0
    return fields


def export_config(config: NanoGPTConfig) -> dict[str, Any]:
    """Return the fields of `NanoChatConfig`, which has no `head_dim`, though its model reads it."""
    fields = llama.export_config(config)
    del fields["mlp_bias"]
    if config.head_dim == config.hidden_size / config.num_attention_heads:
        del fields["head_dim"]
    cap = config.final_logit_softcapping
    return fields | {"final_logit_softcapping": None if cap is None else float(cap)}


FORMAT = Format(
    model_type="nanochat",
    rows=ROWS,
    import_config=import_config,
    export_config=export_config,
    newer=r"value_embeds|ve_gate|resid_lambdas|x0_lambdas|smear_|backout_lambda",
)
