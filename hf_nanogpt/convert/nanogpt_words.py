"""The tokenizer of a nanoGPT checkpoint: GPT-2's, or the characters of a `meta.pkl`.

A `meta.pkl` is a pickle, which can hold code: the reader here knows no names at all, so that
nothing that the file brings is run.
"""

import io
import pickle
from pathlib import Path
from pickletools import genops
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

from ..configuration_nanogpt import NanoGPTConfig
from .folders import load_tokenizer
from .nanogpt import GPT2_PADDED, GPT2_VOCABULARY

logger = logging.get_logger(__name__)

GPT2_TOKENIZER = "openai-community/gpt2"
_LARGEST = 64 * 2**20  # bytes of a meta.pkl: all characters of Unicode need half of it


def find_tokenizer(
    path: Path, tokenizer: str | Path | None, *, config: NanoGPTConfig
) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer that a `ckpt.pt` was trained with, and give its token ids to `config`.

    That is the given one (a folder, a Hub id or a `meta.pkl`), or that of a `meta.pkl` beside the
    checkpoint, or for a vocabulary of GPT-2's size GPT-2's. Where none can be had, the checkpoint
    is converted without, with a warning.

    Raises:
        ValueError: the tokenizer cannot be loaded, or has more tokens than the model.
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
        raise ValueError(
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


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings and containers of them, and refuses any name of code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it needs {module}.{name}")


def read_characters(path: Path) -> PreTrainedTokenizerFast:
    """Make a tokenizer of the characters in a `meta.pkl`; one that is not there cannot be encoded.

    Raises:
        ValueError: it is no such file, or it holds more than plain values.
    """
    try:
        if (size := path.stat().st_size) > _LARGEST:
            raise ValueError(f"it has {size:,} bytes, more than any alphabet needs")
        content = path.read_bytes()
        # A few bytes of a pickle can ask for a table of 2**32 places, which is made at once.
        puts = (place for operation, place, _ in genops(content) if "PUT" in operation.name)
        if any(place is not None and place > size for place in puts):
            raise ValueError("it numbers more values than it can hold")
        ids = _PlainUnpickler(io.BytesIO(content)).load()["stoi"]
        model = models.WordLevel(vocab=ids)
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(
            f"{path} was not loaded: a meta.pkl of nanoGPT holds plain values, with 'stoi' from "
            f"characters to numbers among them ({error}). Nothing in it was run."
        ) from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
