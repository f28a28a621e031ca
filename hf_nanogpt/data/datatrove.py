"""The .ds files of datatrove's tokenizer: token ids, and in files beside them where documents end.

`NAME.ds` has ids of 2 or 4 bytes, and an eos behind each document; `NAME.ds.index` the end of each
document, in tokens, as 8 bytes. In `NAME.ds.metadata`, which may be missing, the first line is the
tokenizer and the bytes of an id, such as `gpt2|2`.
"""

from functools import partial
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from .packing import Tokens
from .token_files import check_ids
from .tokenization import TRAINED, load_tokenizer


def find_datatrove_files(place: Path) -> list[Path]:
    """List the .ds files in a folder, or the file that is named; there may be none."""
    if place.suffix == ".ds" and place.is_file():
        return [place]
    return sorted(place.glob("*.ds"))


def load_datatrove_files(
    place: Path, tokenizer_name: str, validation_fraction: float
) -> tuple[PreTrainedTokenizerBase, Tokens, Tokens]:
    """Return the tokenizer and the tokens to train on and to validate on.

    The tokenizer is the one that is named, or else that of the metadata. The last documents are
    held out, about `validation_fraction` of the tokens.

    Raises:
        UserError: a file is missing or damaged, or the tokenizer is missing or not the right one.
    """
    paths = find_datatrove_files(place)
    ends = [_read_ends(path) for path in paths]
    tokenizer = _find_tokenizer(paths[0], tokenizer_name)
    eos = tokenizer.eos_token_id
    for path, last in zip(paths, ends, strict=True):
        ids = _map_file(path)
        check_ids(path, ids, tokenizer)
        if (ids[last - 1] != eos).any():
            raise UserError(
                f"data={path} has documents that do not end with token {eos}, the eos of the "
                "tokenizer: tokenise them with its eos_token, or give the tokenizer that was used."
            )
    # Cut between two documents of all files.
    before = np.cumsum([0, *(last[-1] for last in ends)])
    all_ends = np.concatenate([last + start for last, start in zip(ends, before, strict=False)])
    cut = int(all_ends[np.abs(all_ends - all_ends[-1] * (1 - validation_fraction)).argmin()])
    if cut == before[-1]:
        raise UserError(
            f"data={place} has too few documents to hold out validation_fraction="
            f"{validation_fraction}: give another fraction, or more documents."
        )
    train, validation = (
        partial(_open, paths, *side, eos) for side in ((0, cut), (cut, int(before[-1])))
    )
    return tokenizer, train, validation


def _find_tokenizer(path: Path, name: str) -> PreTrainedTokenizerBase:
    if name not in TRAINED:
        return load_tokenizer(name)
    metadata = Path(f"{path}.metadata")
    lines = metadata.read_text(encoding="utf-8").splitlines() if metadata.is_file() else []
    stored = lines[0].rpartition("|")[0] or lines[0] if lines else "none"
    try:
        return load_tokenizer(stored)
    except UserError as error:
        raise UserError(
            f"tokenizer={name} cannot be trained on {path}, which holds token ids, and the "
            f"tokenizer in its metadata, {stored}, was not loaded: give the folder or Hub id of "
            "the tokenizer that was used."
        ) from error


def _read_ends(path: Path) -> np.ndarray:
    """Return the end of each document that has tokens, in tokens."""
    index = Path(f"{path}.index")
    if not index.is_file():
        raise UserError(f"data={path} has no {index.name}, which says where documents end.")
    if Path(f"{path}.loss").is_file():
        raise UserError(
            f"data={path} comes with {path.name}.loss, a mask of tokens that are not to be learnt, "
            "which is not supported: move that file away to learn all tokens."
        )
    content = index.read_bytes()
    ends = np.unique(np.frombuffer(content[: len(content) // 8 * 8], dtype="<u8").astype(np.int64))
    ends = ends[ends > 0]
    if len(content) % 8 or not len(ends) or path.stat().st_size not in (2 * ends[-1], 4 * ends[-1]):
        raise UserError(
            f"data={path} is damaged: it has {path.stat().st_size} bytes, which is not the length "
            f"of the documents in {index.name}."
        )
    return ends


def _map_file(path: Path) -> np.ndarray:
    ends = np.memmap(f"{path}.index", dtype="<u8", mode="r")
    width = path.stat().st_size // int(ends.max())  # bytes
    return np.memmap(path, dtype=f"<u{width}", mode="r")


def _open(paths: list[Path], start: int, end: int, eos: int) -> list[np.ndarray]:
    """Return the tokens from `start` to `end` of all files, with an eos in front."""
    pieces = []
    for path in paths:
        ids = _map_file(path)
        pieces.append(ids[max(0, start) : max(0, end)])
        start, end = start - len(ids), end - len(ids)
    return [np.array([eos], dtype=pieces[0].dtype), *(piece for piece in pieces if len(piece))]
