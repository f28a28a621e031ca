"""The releases of transformers with which all of this has been tried: `make compat` repeats it."""

import warnings
from importlib.metadata import version

# Our checkpoints load in these without our package; the package itself needs what pyproject.toml
# says. The oldest first.
TESTED_TRANSFORMERS = ("5.4.0", "5.8.1", "5.12.1", "5.17.0", "5.20.2", "5.23.0", "5.24.0")


def warn_of_newer(installed: str | None = None) -> None:
    """Warn if the installed transformers is newer than any that was tried, in its first two numbers.

    Its last number is left out: those releases mend faults and rename nothing.
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
