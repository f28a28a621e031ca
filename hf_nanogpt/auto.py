"""Make `model_type = "nanogpt"` known to transformers' Auto classes, by being imported."""

import transformers
from transformers import AutoConfig

from . import modeling_nanogpt
from .configuration_nanogpt import NanoGPTConfig
from .releases import warn_of_newer

warn_of_newer()
AutoConfig.register(NanoGPTConfig.model_type, NanoGPTConfig, exist_ok=True)
for _name, _auto_class in modeling_nanogpt._AUTO_CLASSES.items():
    getattr(transformers, _auto_class).register(
        NanoGPTConfig, getattr(modeling_nanogpt, _name), exist_ok=True
    )
