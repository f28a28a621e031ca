"""Qwen3 (Yang et al. 2025, arXiv:2505.09388), as transformers' `Qwen3ForCausalLM` stores it.

Llama with norms on queries and keys, with sliding windows, and without biases in the MLP. Our
default architecture is exported as this.
"""

from typing import Any

from ..configuration_nanogpt import NanoGPTConfig
from . import llama
from .rules import Format

NORMS = (f"{llama.LAYER}.self_attn.q_norm", f"{llama.LAYER}.self_attn.k_norm")
ROWS = llama.ROWS + tuple((name, name) for name in NORMS)


def import_config(native: dict[str, Any]) -> dict[str, Any]:
    """Return our fields; `layer_types` alone says which layers slide."""
    fields = llama.import_config(native | {"mlp_bias": False})
    fields |= {"qk_norm": True, "layer_types": native["layer_types"]}
    if "sliding_attention" in native["layer_types"]:
        fields["sliding_window"] = native["sliding_window"]
    return fields


def export_config(config: NanoGPTConfig) -> dict[str, Any]:
    """Return the fields of `Qwen3Config`."""
    fields = llama.export_config(config)
    del fields["mlp_bias"]
    layer_types = list(config.layer_types or [])
    sliding = "sliding_attention" in layer_types
    first = layer_types.index("sliding_attention") if sliding else len(layer_types)
    return fields | {
        "layer_types": layer_types,
        "use_sliding_window": sliding,
        "sliding_window": config.sliding_window if sliding else None,
        "max_window_layers": first,
    }


FORMAT = Format(
    model_type="qwen3",
    rows=ROWS,
    import_config=import_config,
    export_config=export_config,
    ignored=llama.FORMAT.ignored,
)
