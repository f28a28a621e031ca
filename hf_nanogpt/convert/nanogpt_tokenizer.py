"""The tokenizer of a nanoGPT checkpoint: GPT-2's, or the characters of a `meta.pkl`.

A `meta.pkl` is a pickle, which can contain code. Its reader refuses every name of code, so that
nothing in the file is run.
"""

from pathlib import Path

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..configuration_nanogpt import NanoGPTConfig
from ..data.token_files import read_characters
from ..errors import UserError
from .folders import load_tokenizer
from .nanogpt import GPT2_VOCABULARY

logger = logging.get_logger(__name__)

GPT2_TOKENIZER = "openai-community/gpt2"


def find_tokenizer(
    path: Path, tokenizer: str | Path | None, *, config: NanoGPTConfig
) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer that a `ckpt.pt` was trained with, and copy its token ids to `config`.

    It is `tokenizer` (a folder, a Hub id or a `meta.pkl`), else a `meta.pkl` next to the
    checkpoint, else GPT-2's if the vocabulary has its size. If none is found, a warning says so.

    Raises:
        UserError: the tokenizer cannot be loaded, or has more tokens than the model.
    """
    neighbour = path.parent / "meta.pkl"
    if tokenizer is None and neighbour.is_file():
        tokenizer = neighbour
    if not tokenizer:
        found = _load_gpt2_tokenizer() if config.vocab_size in GPT2_VOCABULARY else None
    elif Path(tokenizer).suffix == ".pkl":
        found = read_characters(Path(tokenizer))
    else:
        found = load_tokenizer(tokenizer)
    if found is None:
        logger.warning(f"No tokenizer was found for {path}: give one, or the folder has none.")
        return None
    if (largest := max(found.get_vocab().values())) >= config.vocab_size:
        raise UserError(
            f"tokenizer={tokenizer} has a token number {largest}, but vocab_size="
            f"{config.vocab_size} in {path}: the model was trained with another tokenizer."
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(found, name))
    return found


def _load_gpt2_tokenizer() -> PreTrainedTokenizerBase | None:
    try:
        return load_tokenizer(GPT2_TOKENIZER)
    except UserError as error:  # the Hub cannot be reached
        logger.warning(str(error))
        return None
