"""The native twin of a configuration: which class of transformers computes the same."""

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.utils import logging

from ..configuration_nanogpt import NanoGPTConfig
from ..errors import UserError
from . import gpt1, gpt2, gpt_neo, llama, nanochat, qwen3
from .rules import Format

logger = logging.get_logger(__name__)

# In the order in which a twin is looked for.
FORMATS: dict[str, Format] = {
    "qwen3": qwen3.FORMAT,
    "llama": llama.FORMAT,
    "gpt2": gpt2.FORMAT,
    "gpt_neo": gpt_neo.FORMAT,
    "gpt1": gpt1.FORMAT,
    "nanochat": nanochat.FORMAT,
}
TRAINING_ONLY = {"dropout", "initializer_range", "use_cache"}
BIASES = {"attention_bias", "mlp_bias"}  # those that we lack are filled with zeros


def find_native_twin(config: NanoGPTConfig) -> str | None:
    """Return the first of `FORMATS` that expresses this configuration, or `None`.

    GPT-Neo has no biases on queries, keys and values: a model that trained them has a twin only
    where they stayed zero, which `export_checkpoint` checks.
    """
    return next((name for name in FORMATS if not find_obstacles(config, name)), None)


def find_obstacles(config: NanoGPTConfig, name: str) -> list[str]:
    """Return what of a configuration is lost on the way to a format and back, in words."""
    native = FORMATS[name]
    back = native.read_config(native.write_config(config))
    lost = [
        f"{field}={_say(getattr(config, field))} (it has {_say(value)})"
        for field, value in back.items()
        if getattr(config, field) != value
        and field not in TRAINING_ONLY
        and not (field in BIASES and value)
    ]
    if lost:
        return lost
    try:
        _build(config, native)
    except Exception as error:  # each class checks its fields in its own way
        return [" ".join(str(error).split())]
    return []


def make_native_config(config: NanoGPTConfig, name: str) -> tuple[str, PreTrainedConfig]:
    """Return the name and the configuration of the same model in a native format.

    Args:
        name: one of `FORMATS`, or `"auto"` for the twin.

    Raises:
        UserError: fields of ours stand in the way, which the message names.
    """
    if name == "auto":
        name = find_native_twin(config) or _nearest(config)
    if lost := find_obstacles(config, name):
        raise UserError(
            f"The configuration has no twin in {name}, in whose way stands {', '.join(lost)}: "
            "change that and train again, or share the checkpoint as it is, which loads with "
            "trust_remote_code=True."
        )
    native = _build(config, FORMATS[name])
    dropout = FORMATS[name].read_config(native.to_dict())["dropout"]
    if dropout != config.dropout:
        logger.warning(f"dropout={config.dropout} has no place in {name} and is left out.")
    return name, native


def _build(config: NanoGPTConfig, native: Format) -> PreTrainedConfig:
    fields = native.write_config(config)
    if config.initializer_range is None:
        del fields["initializer_range"]
    return CONFIG_MAPPING[native.model_type](**fields)


def _say(value: object) -> str:
    return repr(sorted(set(value)) if isinstance(value, list) else value)  # layers by their kinds


def _nearest(config: NanoGPTConfig) -> str:
    return min(FORMATS, key=lambda name: len(find_obstacles(config, name)))
