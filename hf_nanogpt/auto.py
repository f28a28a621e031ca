"""Make `model_type = "nanogpt"` known to transformers' Auto classes; importing it is enough."""

import warnings
from importlib.metadata import version

import transformers
from transformers import AutoConfig

from .configuration_nanogpt import NanoGPTConfig
from .modeling_nanogpt import AUTO_CLASSES

# From old to new. Checkpoints load in all of these without hf_nanogpt; the package itself needs
# the release that pyproject.toml names.
TESTED_TRANSFORMERS = ("5.4.0", "5.8.1", "5.12.1", "5.17.0", "5.20.2", "5.23.0", "5.24.0")


def warn_of_newer(installed: str | None = None) -> None:
    """Warn if the first two numbers of the installed transformers are newer than any tested.

    The third number does not count: such a release fixes faults and renames nothing.
    """
    installed = installed or version("transformers")
    if _number(installed) > _number(TESTED_TRANSFORMERS[-1]):
        warnings.warn(
            f"transformers {installed} is newer than {TESTED_TRANSFORMERS[-1]}, the newest that "
            "this version of hf_nanogpt was tested with. `hf-nanogpt doctor` checks in seconds "
            "that its results are right.",
            stacklevel=2,
        )


def _number(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".")[:2] if part.isdecimal())


warn_of_newer()
AutoConfig.register(NanoGPTConfig.model_type, NanoGPTConfig, exist_ok=True)
for auto_class, model_class in AUTO_CLASSES.items():
    getattr(transformers, auto_class).register(NanoGPTConfig, model_class, exist_ok=True)
