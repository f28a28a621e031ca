"""The tokenizer of a nanoGPT checkpoint: GPT-2's, or the characters of a `meta.pkl`.

A `meta.pkl` is a pickle, which can hold code: the reader here knows no names at all, so that
nothing that the file brings is run.
"""

from pathlib import Path

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..configuration_nanogpt import NanoGPTConfig
from ..data.token_files import read_characters
from ..errors import UserError
from .folders import load_tokenizer
from .nanogpt import GPT2_PADDED, GPT2_VOCABULARY

logger = logging.get_logger(__name__)

GPT2_TOKENIZER = "openai-community/gpt2"


def find_tokenizer(
    path: Path, tokenizer: str | Path | None, *, config: NanoGPTConfig
) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer that a `ckpt.pt` was trained with, and give its token ids to `config`.

    That is the given one (a folder, a Hub id or a `meta.pkl`), or that of a `meta.pkl` beside the
    checkpoint, or for a vocabulary of GPT-2's size GPT-2's. Where none can be had, the checkpoint
    is converted without, with a warning.

    Raises:
        UserError: the tokenizer cannot be loaded, or has more tokens than the model.
    """
    beside = path.parent / "meta.pkl"
    if tokenizer is None and beside.is_file():
        tokenizer = beside
    if tokenizer is not None and Path(tokenizer).suffix == ".pkl":
        found = read_characters(Path(tokenizer))
    else:
        found = load_tokenizer(tokenizer) if tokenizer else _load_gpt2s(config.vocab_size)
    if found is None:
        logger.warning(f"No tokenizer was found for {path}: name one, or the folder has none.")
        return None
    if (largest := max(found.get_vocab().values())) >= config.vocab_size:
        raise UserError(
            f"tokenizer={tokenizer} has a token number {largest}, but vocab_size="
            f"{config.vocab_size} in {path}: it is not the one that the model was trained with."
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(found, name))
    return found


def _load_gpt2s(vocab_size: int) -> PreTrainedTokenizerBase | None:
    if not GPT2_VOCABULARY <= vocab_size <= GPT2_PADDED:
        return None
    try:
        return load_tokenizer(GPT2_TOKENIZER)
    except ValueError as error:
        logger.warning(str(error))
        return None
