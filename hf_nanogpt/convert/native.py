"""The native equivalent of a configuration: which class of transformers computes the same."""

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.utils import logging

from ..configuration_nanogpt import NanoGPTConfig
from ..errors import UserError, settings_errors
from . import gpt1, gpt2, gpt_neo, llama, nanochat, opt, qwen2, qwen3
from .rules import Format

logger = logging.get_logger(__name__)

# The first that can express a model is its native equivalent.
FORMATS: dict[str, Format] = {
    "qwen3": qwen3.FORMAT,
    "llama": llama.FORMAT,
    "qwen2": qwen2.FORMAT,
    "gpt2": gpt2.FORMAT,
    "gpt_neo": gpt_neo.FORMAT,
    "gpt1": gpt1.FORMAT,
    "opt": opt.FORMAT,
    "nanochat": nanochat.FORMAT,
}
# What NanoGPTConfig has no field for, in well-known models that are not among these.
OBSTACLES = {
    "gemma": "it scales its embeddings and adds 1 to the weights of its norms",
    "gemma2": "it has attn_logit_softcapping, query_pre_attn_scalar and norms after each sublayer",
    "gemma3": "it reads images, too",
    "gemma3_text": "it has query_pre_attn_scalar, two RoPE bases and norms after each sublayer",
    "gpt_neox": "it has use_parallel_residual and rotary_pct",
    "gptj": "its attention and MLP are parallel, and it has rotary_dim",
    "mistral": "its layers slide; where sliding_window is null, set model_type to llama",
    "phi": "its attention and MLP are parallel, and it has partial_rotary_factor",
    "phi3": "its matrices are fused (qkv_proj, gate_up_proj)",
    "smollm3": "it has no_rope_layers, which have no positions",
}
_TRAINING_ONLY = {"dropout", "attention_dropout", "initializer_range", "use_cache"}
_INITS = {"initializer_range", "init_std"}
_BIASES = {"attention_bias", "mlp_bias"}  # where we have none, the export fills in zeros


def find_native_format(config: NanoGPTConfig) -> str | None:
    """Return the first of `FORMATS` that expresses this configuration, or `None`.

    GPT-Neo has no biases on queries, keys and values, and Qwen2 none after the heads. They are
    returned for a model that has them; `export_checkpoint` then checks that they stayed zero.
    """
    return next((name for name in FORMATS if not find_obstacles(config, name)), None)


def find_obstacles(config: NanoGPTConfig, name: str) -> list[str]:
    """Return the settings that a format cannot express, each as text: `qk_norm=True (only False)`.

    A format can express those that come back unchanged after an export and an import.
    """
    native = FORMATS[name]
    imported = native.import_config(native.export_config(config))
    lost = [
        f"{field}={_show(getattr(config, field))} (only {_show(value)})"
        for field, value in imported.items()
        if getattr(config, field) != value
        and field not in _TRAINING_ONLY
        and not (field in _BIASES and value)
    ]
    if lost:
        return lost
    try:
        _build(config, native)
    except UserError as error:
        return [str(error)]
    return []


def make_native_config(config: NanoGPTConfig, name: str) -> tuple[str, PreTrainedConfig]:
    """Return the name and the configuration of the same model in a native format.

    Args:
        name: one of `FORMATS`, or `"auto"` for the first that expresses the model.

    Raises:
        UserError: the format cannot express the model; the message names the settings.
    """
    if name == "auto":  # without a native equivalent, explain what the nearest format lacks
        name = min(FORMATS, key=lambda name: len(find_obstacles(config, name)))
    if lost := find_obstacles(config, name):
        raise UserError(
            f"{name} cannot express this model: {', '.join(lost)}. Change that and train again, or "
            "share the checkpoint as it is: it loads with trust_remote_code=True."
        )
    native = _build(config, FORMATS[name])
    if FORMATS[name].import_config(native.to_dict())["dropout"] != config.dropout:
        logger.warning(
            f"{name} has no dropout={config.dropout} of embeddings and layers: it was left out."
        )
    return name, native


def _build(config: NanoGPTConfig, native: Format) -> PreTrainedConfig:
    fields = native.export_config(config)
    if config.initializer_range is None:  # each class then has a default of its own
        fields = {name: value for name, value in fields.items() if name not in _INITS}
    with settings_errors(of_rope=True):
        return CONFIG_MAPPING[native.model_type](**fields)


def _show(value: object) -> str:
    return repr(sorted(set(value)) if isinstance(value, list) else value)  # a list has all layers
