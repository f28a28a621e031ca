"""What the exports to a single file, GGUF and ONNX, ask before they write."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..checkpoint.folder import load_checkpoint
from ..errors import UserError
from ..modeling_nanogpt import NanoGPTForCausalLM


def check_new_file(destination: str | Path, suffix: str) -> Path:
    """Return a path that ends in `suffix` and does not exist, or raise a `UserError`."""
    destination = Path(destination)
    if destination.suffix != suffix:
        raise UserError(f"destination={destination} must be a path that ends in {suffix}.")
    check_free(destination)
    return destination


def check_free(path: Path) -> None:
    """Raise a `UserError` where something exists already."""
    if path.exists():
        raise UserError(f"destination={path} exists already: choose another name.")


def load_own(checkpoint: str | Path) -> tuple[NanoGPTForCausalLM, PreTrainedTokenizerBase]:
    """Load one of our checkpoints, or raise a `UserError` if it is another's."""
    model, tokenizer = load_checkpoint(checkpoint)
    if not isinstance(model, NanoGPTForCausalLM):
        raise UserError(f"{checkpoint} is no {NanoGPTForCausalLM.__name__}: convert it first.")
    return model, tokenizer
