"""Qwen2 and Qwen2.5 (arXiv:2407.10671, 2412.15115), as `Qwen2ForCausalLM` stores them.

Llama with biases on queries, keys and values only, with sliding windows, and without `head_dim`.
"""

from typing import Any

from ..configuration_nanogpt import NanoGPTConfig
from . import llama, qwen3
from .rules import Format, plain_heads


def import_config(native: dict[str, Any]) -> dict[str, Any]:
    """Return our fields; the bias of the output projection, which Qwen2 lacks, becomes zero."""
    heads = native["hidden_size"] // native["num_attention_heads"]
    fields = qwen3.import_config(native | {"attention_bias": True, "head_dim": heads})
    return fields | {"qk_norm": False, "head_dim": plain_heads(fields)["head_dim"]}


def export_config(config: NanoGPTConfig) -> dict[str, Any]:
    """Return the fields of `Qwen2Config`."""
    fields = qwen3.export_config(config)
    del fields["attention_bias"], fields["head_dim"]
    return fields


FORMAT = Format(
    model_type="qwen2",
    rows=llama.ROWS,
    import_config=import_config,
    export_config=export_config,
    ignored=llama.FORMAT.ignored,
)
