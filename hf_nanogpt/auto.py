"""Make `model_type = "nanogpt"` known to transformers' Auto classes, by being imported."""

import warnings
from importlib.metadata import version

import transformers
from transformers import AutoConfig

from . import modeling_nanogpt
from .configuration_nanogpt import NanoGPTConfig

# The oldest first. Checkpoints load in all of these without hf_nanogpt; the package itself needs
# the release that pyproject.toml names.
TESTED_TRANSFORMERS = ("5.4.0", "5.8.1", "5.12.1", "5.17.0", "5.20.2", "5.23.0", "5.24.0")


def warn_of_newer(installed: str | None = None) -> None:
    """Warn if the first two numbers of the installed transformers are newer than any tested.

    The third number does not count: such a release mends faults and renames nothing.
    """
    installed = installed or version("transformers")
    if _number(installed) > _number(TESTED_TRANSFORMERS[-1]):
        warnings.warn(
            f"transformers {installed} is newer than {TESTED_TRANSFORMERS[-1]}, the newest that "
            "this version of hf_nanogpt was tested with. `hf-nanogpt doctor` checks in seconds "
            "whether its results are right.",
            stacklevel=2,
        )


def _number(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".")[:2] if part.isdecimal())


warn_of_newer()
AutoConfig.register(NanoGPTConfig.model_type, NanoGPTConfig, exist_ok=True)
for _name, _auto_class in modeling_nanogpt._AUTO_CLASSES.items():
    getattr(transformers, _auto_class).register(
        NanoGPTConfig, getattr(modeling_nanogpt, _name), exist_ok=True
    )
