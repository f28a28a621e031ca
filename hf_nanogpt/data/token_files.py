"""The .bin files of nanoGPT's data preparation (and llm.c's): token ids, two bytes each."""

import io
import pickle
from functools import partial
from pathlib import Path
from pickletools import genops
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import UserError, explain_errors
from .packing import Tokens
from .tokenization import TRAINED, load_tokenizer

_END_OF_TEXT = 50256  # GPT-2's, between documents
_MAGIC = 20240520  # begins a file of llm.c, which has a header of 256 numbers of 4 bytes
_HEADER = 1024
_AT_ONCE = 2**26  # ids checked at a time
_LARGEST_META = 64 * 2**20  # bytes of a meta.pkl: all characters of Unicode need half of that


def find_token_files(folder: Path, side: str = "train") -> list[Path]:
    """List `train.bin`, or numbered files such as `part_train_000001.bin`; there may be none."""
    return sorted([*folder.glob(f"*{side}.bin"), *folder.glob(f"*{side}_[0-9]*.bin")])


def load_token_files(
    folder: Path, tokenizer_name: str
) -> tuple[PreTrainedTokenizerBase, Tokens, Tokens]:
    """Return the tokenizer and the tokens of `train.bin` and `val.bin` in a folder.

    The tokenizer is the folder or Hub id that is named, which must be GPT-2's, or is made from the
    characters in a `meta.pkl`, which is read without running anything in it.

    Raises:
        UserError: a file is missing or damaged, there is no tokenizer, or an id is not in it.
    """
    tokenizer = _find_tokenizer(folder, tokenizer_name)
    train, validation = (find_token_files(folder, side) for side in ("train", "val"))
    if not validation:
        raise UserError(f"data={folder} has no val.bin with the tokens to validate on.")
    for path in (*train, *validation):
        check_ids(path, _map_file(path), tokenizer)
    return tokenizer, partial(_map_files, train), partial(_map_files, validation)


def _find_tokenizer(folder: Path, name: str) -> PreTrainedTokenizerBase:
    meta = folder / "meta.pkl"
    if name in TRAINED and meta.is_file():
        return read_characters(meta)
    if name in TRAINED:
        raise UserError(
            f"tokenizer={name} cannot be trained on {folder}, which holds token ids, not text: "
            "give the folder or Hub id of GPT-2's tokenizer, or put the meta.pkl into the folder."
        )
    tokenizer = load_tokenizer(name)
    if tokenizer.eos_token_id != _END_OF_TEXT:
        raise UserError(
            f"tokenizer={name} has the eos_token_id {tokenizer.eos_token_id}, but in {folder} "
            f"token {_END_OF_TEXT} separates documents: give GPT-2's tokenizer."
        )
    return tokenizer


def _map_files(paths: list[Path]) -> list[np.ndarray]:
    return [_map_file(path) for path in paths]


def _map_file(path: Path) -> np.ndarray:
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise UserError(f"data={path} is damaged: it has {size} bytes, and each token id takes 2.")
    with path.open("rb") as file:
        has_header = int.from_bytes(file.read(4), "little") == _MAGIC
    return np.memmap(path, dtype="<u2", mode="r", offset=_HEADER if has_header else 0)


def check_ids(path: Path, ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a `UserError` if the ids in a file are not all of the tokenizer."""
    largest = max(tokenizer.get_vocab().values())
    for start in range(0, len(ids), _AT_ONCE):
        if (found := int(ids[start : start + _AT_ONCE].max())) > largest:
            raise UserError(
                f"data={path} has a token {found}, but the largest id of the tokenizer is "
                f"{largest}: they do not belong together."
            )


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings and containers of them, and refuses any name of code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it needs {module}.{name}")


def read_characters(path: Path) -> PreTrainedTokenizerFast:
    """Make a tokenizer from the characters in a `meta.pkl`; it cannot encode any others.

    Raises:
        UserError: it is not such a file, or it holds more than plain values.
    """
    with explain_errors(
        f"{path} was not loaded, and nothing in it was run: a meta.pkl must hold plain values, "
        "with 'stoi' from characters to numbers among them"
    ):
        if (size := path.stat().st_size) > _LARGEST_META:
            raise UserError(f"it has {size:,} bytes, more than any alphabet needs")
        content = path.read_bytes()
        # A few bytes of a pickle can ask for a table of 2**32 places, which is made at once.
        puts = (place for operation, place, _ in genops(content) if "PUT" in operation.name)
        if any(place is not None and place > size for place in puts):
            raise UserError("it numbers more values than it can hold")
        model = models.WordLevel(vocab=_PlainUnpickler(io.BytesIO(content)).load()["stoi"])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
