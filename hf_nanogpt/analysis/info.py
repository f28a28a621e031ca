"""Figures of a model that follow from its configuration alone, without any weights."""

from pathlib import Path

import torch

from ..checkpoint.foreign import CONFIG, read_config
from ..checkpoint.loading import check_checkpoint, download, split_revision
from ..configuration_nanogpt import NanoGPTConfig
from ..convert import find_native_format
from ..errors import UserError, did_you_mean, explain_errors
from ..flops import count_flops
from ..modeling_nanogpt import NanoGPTForCausalLM
from ..presets import PRESETS, describe_source, load_preset


def describe(model: str) -> dict[str, str]:
    """Return the figures of a preset, a checkpoint folder or a Hub id, with units, to print.

    Raises:
        UserError: it is none of these, or a checkpoint of another architecture.
    """
    config = load_config(model)
    failure = f"{model}: its configuration (config.json) cannot be built"
    with explain_errors(failure), torch.device("meta"):
        lm = NanoGPTForCausalLM(config)
    total = lm.num_parameters()
    tables = [lm.model.embed_tokens, lm.model.embed_positions]
    embedding = sum(table.weight.numel() for table in tables if table is not None)
    flops = count_flops(lm)
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    heads = f"{config.num_attention_heads} of width {config.head_dim}"
    tied = "tied" if config.tie_word_embeddings else "untied"
    return {
        "layers": f"{config.num_hidden_layers:,}",
        "width": f"{config.hidden_size:,}",
        "heads": f"{heads}, {config.num_key_value_heads} for keys and values",
        "MLP width": f"{config.intermediate_size:,} ({config.mlp_type}, {config.hidden_act})",
        "context": f"{config.max_position_embeddings:,} tokens, "
        f"{config.position_embedding_type} positions",
        "norm": f"{config.norm_type}, {config.norm_position}",
        "vocabulary": f"{config.vocab_size:,}, {tied} head",
        "exports as": find_native_format(config) or "no native format",
        "parameters": f"{total:,}",
        "  without embeddings": f"{total - embedding:,}",
        "FLOPs per token, serving": f"{flops:.4g} (at full context)",
        "FLOPs per token, training": f"{3 * flops:.4g}",
        "memory to serve, fp32": _format_bytes(4 * total),
        "memory to serve, bf16": _format_bytes(2 * total),
        "memory to train, fp32 AdamW": f"{_format_bytes(16 * total)} and activations",
        "KV cache per token, fp32": _format_bytes(4 * cached),
        "KV cache per token, bf16": _format_bytes(2 * cached),
        **({"from": describe_source(model)} if model in PRESETS else {}),
    }


def load_config(model: str) -> NanoGPTConfig:
    """Return the configuration of a preset, a folder or a Hub id; raise as `describe` does."""
    if model in PRESETS:
        return load_preset(model)
    try:
        name, revision = split_revision(check_checkpoint(model))
    except UserError as error:
        hint = did_you_mean(model, PRESETS)
        raise UserError(f"{error} Presets: {', '.join(PRESETS)}.{hint}") from error
    folder = Path(name) if Path(name).is_dir() else download(name, revision, [CONFIG])
    config = read_config(folder)
    if not isinstance(config, NanoGPTConfig):
        raise UserError(f"{name} is a {config.model_type} model, not {NanoGPTConfig.model_type}.")
    return config


def _format_bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:,.4g} TiB"
