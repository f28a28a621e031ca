"""GPT-1 (Radford et al. 2018), as transformers' `OpenAIGPTLMHeadModel` stores it.

GPT-2 with its norms after the sublayers, and none at the end.
"""

from typing import Any

from ..configuration_nanogpt import NanoGPTConfig
from ..errors import UserError
from . import gpt2
from .rules import (
    Format,
    export_dropouts,
    export_fields,
    import_dropouts,
    import_fields,
    plain_heads,
)

ROWS = (
    ("transformer.tokens_embed", "model.embed_tokens"),
    ("transformer.positions_embed", "model.embed_positions"),
    *gpt2.BLOCK_ROWS,
    ("lm_head", "lm_head"),
)
ABSENT = ("n_inner", "activation_function", "use_cache")  # GPT-2's fields that GPT-1 lacks
FIELDS = {name: ours for name, ours in gpt2.FIELDS.items() if name not in ABSENT}
FIXED = gpt2.FIXED | {"norm_position": "post"}
# Its "gelu" is the tanh form.
ACTIVATIONS = {"gelu": "gelu_new", "relu": "relu", "silu": "silu", "swish": "silu"}


def import_config(native: dict[str, Any]) -> dict[str, Any]:
    """Return our fields; the MLP is always four times as wide as the model."""
    if native["afn"] not in ACTIVATIONS:
        raise UserError(f"afn={native['afn']!r} is unknown in GPT-1: {', '.join(ACTIVATIONS)}.")
    fields = FIXED | import_fields(native, FIELDS)
    fields["hidden_act"] = ACTIVATIONS[native["afn"]]
    fields["intermediate_size"] = 4 * native["n_embd"]
    fields["layer_types"] = ["full_attention"] * native["n_layer"]
    return fields | import_dropouts(native, *gpt2.DROPOUTS) | plain_heads(fields)


def export_config(config: NanoGPTConfig) -> dict[str, Any]:
    """Return the fields of `OpenAIGPTConfig`."""
    names = {ours: name for name, ours in reversed(ACTIVATIONS.items())}
    dropouts = export_dropouts(config, *gpt2.DROPOUTS)
    activation = names.get(config.hidden_act, "gelu")
    return export_fields(config, FIELDS) | dropouts | {"afn": activation}


FORMAT = Format(
    model_type="openai-gpt",
    rows=ROWS,
    import_config=import_config,
    export_config=export_config,
    ignored=r"transformer\.(position_ids|h\.\d+\.attn\.bias)",
)
