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

from ..errors import UserError
from .documents import TOKENIZERS, DataArguments, load_tokenizer
from .packing import Tokens

_END_OF_TEXT = 50256  # GPT-2's, between documents
_MAGIC = 20240520  # begins a file of llm.c, whose header is 256 numbers of 4 bytes
_HEADER = 1024
_AT_ONCE = 2**26
_LARGEST = 64 * 2**20  # bytes of a meta.pkl: all characters of Unicode need half of it


def find_token_files(folder: Path) -> list[Path]:
    """List the .bin files to train on in a folder; it may be none."""
    return _list_files(folder, "train")


def _list_files(folder: Path, side: str) -> list[Path]:
    """List `train.bin`, or the numbered `..._train_000001.bin` and so on."""
    return sorted([*folder.glob(f"*{side}.bin"), *folder.glob(f"*{side}_[0-9]*.bin")])


def load_token_files(
    folder: Path, args: DataArguments
) -> tuple[PreTrainedTokenizerBase, Tokens, Tokens]:
    """Return the tokenizer and the tokens of `train.bin` and `val.bin` in a folder.

    The tokenizer is the one `args` names, which must be GPT-2's, or that of the characters in a
    `meta.pkl`, which is read without running anything in it.

    Raises:
        UserError: a file is missing or damaged, there is no tokenizer, or an id is beyond it.
    """
    tokenizer = _find_tokenizer(folder, args)
    sides = [_list_files(folder, side) for side in ("train", "val")]
    if not sides[1]:
        raise UserError(f"data={folder} has no val.bin, which holds the tokens to validate on.")
    for path in (path for side in sides for path in side):
        _check_ids(path, tokenizer)
    train, validation = (partial(_map_files, side) for side in sides)
    return tokenizer, train, validation


def _find_tokenizer(folder: Path, args: DataArguments) -> PreTrainedTokenizerBase:
    meta = folder / "meta.pkl"
    if args.tokenizer in TOKENIZERS:
        if meta.is_file():
            return read_characters(meta)
        raise UserError(
            f"tokenizer={args.tokenizer} cannot be made from the token ids in {folder}: give the "
            "folder or Hub id of GPT-2's tokenizer, or put the meta.pkl there that belongs to them."
        )
    tokenizer = load_tokenizer(args, [])
    if tokenizer.eos_token_id != _END_OF_TEXT:
        raise UserError(
            f"tokenizer={args.tokenizer} has the eos_token_id {tokenizer.eos_token_id}, but in "
            f"{folder} token {_END_OF_TEXT} separates documents: give GPT-2's tokenizer."
        )
    return tokenizer


def _map_files(paths: list[Path]) -> list[np.ndarray]:
    return [_map_file(path) for path in paths]


def _map_file(path: Path) -> np.ndarray:
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise UserError(f"data={path} has {size} bytes, but each token id takes 2: it is damaged.")
    with path.open("rb") as file:
        has_header = int.from_bytes(file.read(4), "little") == _MAGIC
    return np.memmap(path, dtype="<u2", mode="r", offset=_HEADER if has_header else 0)


def _check_ids(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    ids, largest = _map_file(path), max(tokenizer.get_vocab().values())
    for start in range(0, len(ids), _AT_ONCE):
        if (found := int(ids[start : start + _AT_ONCE].max())) > largest:
            raise UserError(
                f"data={path} has a token {found}, but the tokenizer's last is {largest}: they do "
                "not belong together."
            )


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings and containers of them, and refuses any name of code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it needs {module}.{name}")


def read_characters(path: Path) -> PreTrainedTokenizerFast:
    """Make a tokenizer of the characters in a `meta.pkl`; one that is not there cannot be encoded.

    Raises:
        UserError: it is no such file, or it holds more than plain values.
    """
    try:
        if (size := path.stat().st_size) > _LARGEST:
            raise UserError(f"it has {size:,} bytes, more than any alphabet needs")
        content = path.read_bytes()
        # A few bytes of a pickle can ask for a table of 2**32 places, which is made at once.
        puts = (place for operation, place, _ in genops(content) if "PUT" in operation.name)
        if any(place is not None and place > size for place in puts):
            raise UserError("it numbers more values than it can hold")
        ids = _PlainUnpickler(io.BytesIO(content)).load()["stoi"]
        model = models.WordLevel(vocab=ids)
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(
            f"{path} was not loaded: a meta.pkl of nanoGPT holds plain values, with 'stoi' from "
            f"characters to numbers among them ({error}). Nothing in it was run."
        ) from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
