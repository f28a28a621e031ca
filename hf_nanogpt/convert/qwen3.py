"""Qwen3 (Yang et al. 2025, arXiv:2505.09388), as transformers' `Qwen3ForCausalLM` keeps it.

Llama with norms on queries and keys, sliding windows, and no biases in the MLP. It is the twin of
our default architecture.
"""

from typing import Any

from ..configuration_nanogpt import NanoGPTConfig
from . import llama
from .rules import Format

NORMS = ("model.layers.{n}.self_attn.q_norm", "model.layers.{n}.self_attn.k_norm")
ROWS = llama.ROWS + tuple((name, name) for name in NORMS)


def read_config(theirs: dict[str, Any]) -> dict[str, Any]:
    """Return our fields; `layer_types` says which layers slide, whatever the other settings."""
    fields = llama.read_config(theirs | {"mlp_bias": False})
    fields |= {"qk_norm": True, "layer_types": theirs["layer_types"]}
    if "sliding_attention" in theirs["layer_types"]:
        fields["sliding_window"] = theirs["sliding_window"]
    return fields


def write_config(config: NanoGPTConfig) -> dict[str, Any]:
    """Return the fields of `Qwen3Config`."""
    fields = llama.write_config(config)
    del fields["mlp_bias"]
    kinds = list(config.layer_types or [])
    sliding = "sliding_attention" in kinds
    return fields | {
        "layer_types": kinds,
        "use_sliding_window": sliding,
        "sliding_window": config.sliding_window if sliding else None,
        "max_window_layers": kinds.index("sliding_attention") if sliding else len(kinds),
    }


FORMAT = Format(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    rows=ROWS,
    read_config=read_config,
    write_config=write_config,
    ignored=llama.FORMAT.ignored,
)
