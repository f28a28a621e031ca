"""Figures of a model that follow from its configuration alone; no weights are made or read."""

import difflib
from pathlib import Path

import torch

from ..checkpoint.folder import check_checkpoint, download, split_revision
from ..checkpoint.foreign import CONFIG, explain_errors, read_config
from ..configuration_nanogpt import NanoGPTConfig
from ..convert import find_native_twin
from ..errors import UserError
from ..flops import count_flops
from ..modeling_nanogpt import NanoGPTForCausalLM
from ..presets import PRESETS, describe_source, load_preset


def describe(model: str) -> dict[str, str]:
    """Return the figures of a preset, a checkpoint folder or a Hub id, with units, to print.

    Raises:
        UserError: it is none of them, or a checkpoint of another architecture.
    """
    config = load_config(model)
    source = {"from": describe_source(model)} if model in PRESETS else {}
    with (
        explain_errors(f"{model}: its configuration (config.json) cannot be built"),
        torch.device("meta"),
    ):
        lm = NanoGPTForCausalLM(config)
    total = lm.num_parameters()
    tables = [lm.model.embed_tokens, lm.model.embed_positions]
    embedding = sum(table.weight.numel() for table in tables if table is not None)
    context, flops = config.max_position_embeddings, count_flops(lm)
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return {
        "layers": f"{config.num_hidden_layers:,}",
        "width": f"{config.hidden_size:,}",
        "heads": f"{config.num_attention_heads} of {config.head_dim}, "
        f"{config.num_key_value_heads} for keys and values",
        "MLP width": f"{config.intermediate_size:,} ({config.mlp_type}, {config.hidden_act})",
        "context": f"{context:,} tokens, {config.position_embedding_type} positions",
        "norm": f"{config.norm_type}, {config.norm_position}",
        "vocabulary": f"{config.vocab_size:,}, "
        f"{'tied' if config.tie_word_embeddings else 'untied'} head",
        "native twin": find_native_twin(config) or "none",
        "parameters": f"{total:,}",
        "  without embeddings": f"{total - embedding:,}",
        "FLOPs per token, serving": f"{flops:.4g} (at full context)",
        "FLOPs per token, training": f"{3 * flops:.4g}",
        "memory to serve, fp32": _size(4 * total),
        "memory to serve, bf16": _size(2 * total),
        "memory to train, fp32 AdamW": f"{_size(16 * total)} and activations",
        "KV cache per token, fp32": _size(4 * cached),
        "KV cache per token, bf16": _size(2 * cached),
        **source,
    }


def load_config(model: str) -> NanoGPTConfig:
    """Return the configuration of a preset, a folder or a Hub id; raise as `describe` does."""
    if model in PRESETS:
        return load_preset(model)
    try:
        name, revision = split_revision(check_checkpoint(model))
    except ValueError as error:
        nearest = difflib.get_close_matches(model, PRESETS, n=1, cutoff=0.4)
        hint = f"Did you mean the preset {nearest[0]!r}?" if nearest else ""
        raise UserError(f"{error} Presets: {', '.join(PRESETS)}. {hint}") from error
    folder = Path(name) if Path(name).is_dir() else download(name, revision, [CONFIG])
    config = read_config(folder)
    if config.model_type != NanoGPTConfig.model_type:
        raise UserError(f"{name} is a {config.model_type} model, not {NanoGPTConfig.model_type}.")
    return config


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:,.4g} TiB"
