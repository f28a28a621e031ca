"""A corpus tokenised once, in a folder that training maps into memory.

    tokenized.json     the settings; and, once the folder is complete, what is in it
    tokenizer/         the tokenizer
    train/00000.arrow  part of the training documents: a row of `input_ids` each, eos first
    validation/...

Each file is an Arrow stream, which `datasets.Dataset.from_file` opens too. It is written whole or
not at all, and where it ends depends only on the text: an interrupted run resumes after the last
file, and any number of processes writes the same bytes. (`Dataset.map` with `save_to_disk` would be
shorter, but cannot resume in the middle of a corpus.)
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .. import __version__
from ..checkpoint.writing import check_writable, clear_abandoned, staged_folder
from ..errors import UserError, one_line, without_secrets
from ..untrusted import read_json
from .conversations import MESSAGES, Documents
from .corpus import Corpus, prepare_tokenizer, tokenize_sides
from .datatrove import find_datatrove_files, load_datatrove_files
from .documents import DataArguments, count_bytes, load_documents
from .encoding import DocumentEncoder
from .packing import Tokens
from .processes import run_in_order
from .reading import explain_read_errors, hash_files
from .sources import TOKENIZED, find_files
from .token_files import find_token_files, load_token_files
from .tokenization import TRAINED, load_tokenizer

_CHARACTERS = 10_000_000  # of text in one file: the most that an interruption costs a process
_PACKAGES = ("datasets", "pyarrow", "tokenizers", "transformers")  # that decide the content
_NOT_THE_CONTENT = ("context_length", "num_proc")  # settings that change nothing in the folder


# Reading


def load_tokens(
    args: DataArguments, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[PreTrainedTokenizerBase, Tokens, Tokens]:
    """Return the tokenizer and the tokens of both sides: to train on, and to validate on."""
    corpus = prepare_data(args)
    tokenizer = prepare_tokenizer(args, corpus, tokenizer)
    return tokenizer, *tokenize_sides(args, corpus, tokenizer)


def prepare_data(args: DataArguments) -> Corpus:
    """Load the text, or open the tokens, that `args` names.

    Raises:
        UserError: as `load_documents`; or a folder of tokens is incomplete or does not fit.
    """
    folder = Path(args.data).expanduser()
    with explain_read_errors(without_secrets(args.data)):
        has_tokens = holds_tokens(folder)
    if not has_tokens:
        train, validation = load_documents(args)
        return Corpus(train, validation, num_bytes=count_bytes(validation))
    num_bytes = None
    if (folder / TOKENIZED).is_file():
        num_bytes = _read_description(folder).get("splits", {}).get("validation", {}).get("bytes")
        stored, train, validation = _load_folder(folder, args)
    elif find_token_files(folder):
        stored, train, validation = load_token_files(folder, args.tokenizer)
    else:
        stored, train, validation = load_datatrove_files(
            folder, args.tokenizer, args.validation_fraction
        )
    if args.validation_data:
        raise UserError(
            f"validation_data={without_secrets(args.validation_data)} cannot be used with "
            f"data={args.data}, which already holds tokens to validate on: leave it out."
        )
    return Corpus(train, validation, stored, num_bytes)


def holds_tokens(folder: Path) -> bool:
    """Say whether a folder holds tokens: ours, nanoGPT's .bin files, or datatrove's .ds files."""
    folder = folder.expanduser()
    found = find_token_files(folder) or find_datatrove_files(folder)
    return (folder / TOKENIZED).is_file() or bool(found)


def _load_folder(
    folder: Path, args: DataArguments
) -> tuple[PreTrainedTokenizerBase, Tokens, Tokens]:
    description = _read_description(folder)
    if "splits" not in description or not (folder / "tokenizer").is_dir():
        raise UserError(
            f"data={folder} is incomplete: run hf-nanogpt tokenize again with the same settings, "
            "and it resumes."
        )
    if args.tokenizer not in TRAINED:
        raise UserError(
            f"tokenizer={args.tokenizer} cannot be used with data={folder}, which is already "
            "tokenised: leave it out."
        )
    tokenizer = load_tokenizer(folder / "tokenizer")
    train, validation = (
        partial(_open_shards, folder / name, part["shards"], part["tokens"], tokenizer.eos_token_id)
        for name, part in description["splits"].items()
    )
    return tokenizer, train, validation


def _read_description(folder: Path) -> dict[str, Any]:
    try:
        description = read_json(folder / TOKENIZED)
        if not isinstance(description.get("settings"), dict):
            raise UserError("it has no settings")
    except UserError as error:
        raise UserError(
            f"{folder / TOKENIZED} is damaged ({error}): delete {folder} and tokenise again."
        ) from error
    return description


def _open_shards(folder: Path, shards: int, tokens: int, eos: int) -> list[np.ndarray]:
    pieces = [_open_shard(folder / _name(number)) for number in range(shards)]
    if (found := sum(map(len, pieces))) != tokens:
        raise UserError(f"data={folder} is damaged: it has {found:,} tokens, not {tokens:,}.")
    dtype = pieces[0].dtype if pieces else np.int64
    return [*pieces, np.array([eos], dtype=dtype)]


def _open_shard(path: Path) -> np.ndarray:
    try:
        with pa.memory_map(str(path)) as file:  # closed, it stays mapped, and no handle is used up
            [chunk] = pa.ipc.open_stream(file).read_all().column("input_ids").chunks
        return chunk.flatten().to_numpy()
    except (OSError, ValueError, KeyError) as error:  # Arrow's errors are among these
        raise UserError(
            f"data={path} is damaged or missing ({one_line(error)}): delete it and run the same "
            "hf-nanogpt tokenize again, which writes only what is missing."
        ) from error


# Writing


def tokenize_corpus(
    args: DataArguments, folder: str | Path, *, show_progress: bool = False
) -> dict[str, Any]:
    """Tokenise what `args` names into `folder`, or resume an earlier run that was interrupted.

    Returns:
        the content of `tokenized.json`: under `splits` the `tokens`, `bytes` (of text in UTF-8),
        `documents` and `shards` of `train` and `validation`.

    Raises:
        UserError: as `load_documents`; or the folder holds something else, or was begun with other
            settings or another source.
    """
    folder = Path(folder)
    description = _start_description(folder, args)
    documents, held_out = load_documents(args)
    if MESSAGES in (documents.column_names or []):
        raise UserError(
            f"data={without_secrets(args.data)} holds conversations ({MESSAGES}), which cannot be "
            "tokenised in advance: give them to hf-nanogpt train."
        )
    _check_source(folder, args, description, documents)
    try:
        tokenizer = _prepare(folder, args, description, documents)
        versions = {name: version(name) for name in _PACKAGES}
        description["vocab_size"] = len(tokenizer)
        description["versions"] = {"hf_nanogpt": __version__} | versions
        description["splits"] = {
            name: _write_split(folder / name, side, tokenizer, args.num_proc, show_progress)
            for name, side in (("train", documents), ("validation", held_out))
        }
        with staged_folder(folder) as staged:
            _write_json(staged / TOKENIZED, description)
    except OSError as error:
        raise UserError(
            f"{folder} could not be completed: {error}. When there is room, run the same command "
            "again, and it resumes."
        ) from error
    return description


def _start_description(folder: Path, args: DataArguments) -> dict[str, Any]:
    """Return the description that a run with the same settings began, or else a new one."""
    check_writable(folder, name="folder")
    settings = {k: v for k, v in asdict(args).items() if k not in _NOT_THE_CONTENT}
    for name in ("data", "validation_data"):  # the folder may be shared
        settings[name] = settings[name] and without_secrets(settings[name])
    if not (folder / TOKENIZED).is_file():
        if folder.is_dir() and any(p for p in folder.iterdir() if p.name[:8] != ".staged-"):
            raise UserError(f"{folder} exists and is not empty: choose another folder.")
        return {"settings": settings}
    description = _read_description(folder)
    for name, value in settings.items():
        if (earlier := description["settings"].get(name)) != value:
            raise UserError(
                f"{name}={value!r}, but {folder} was begun with {name}={earlier!r}: use that, or "
                "choose another folder."
            )
    return description


def _check_source(
    folder: Path, args: DataArguments, description: dict[str, Any], documents: Documents
) -> None:
    """Refuse files, or a dataset of the Hub, that changed since the folder was begun.

    A change in a stream from the Hub goes unnoticed.
    """
    names = [args.data, *([args.validation_data] if args.validation_data else [])]
    state: Any = hash_files([path for name in names for path in find_files(name)])
    if not state and isinstance(documents, Dataset):
        state = documents._fingerprint
    source = Hasher.hash(state)
    if description.setdefault("source", source) != source:
        raise UserError(
            f"data={without_secrets(args.data)} has changed since {folder} was begun: choose "
            "another folder."
        )


def _prepare(
    folder: Path, args: DataArguments, description: dict[str, Any], documents: Documents
) -> PreTrainedTokenizerBase:
    """Return the tokenizer in the folder, and write it there unless an earlier run did."""
    clear_abandoned(folder)
    if not (folder / "tokenizer").is_dir():
        tokenizer = prepare_tokenizer(args, Corpus(documents, documents))
        with staged_folder(folder) as staged:
            tokenizer.save_pretrained(staged / "tokenizer")
            _write_json(staged / TOKENIZED, description)
    return load_tokenizer(folder / "tokenizer")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_split(
    folder: Path,
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    num_proc: int | None,
    show_progress: bool,
) -> dict[str, int]:
    """Write the files of one side that are missing, and return the counts of all of them."""
    folder.mkdir(exist_ok=True)
    write = partial(_write_shard, folder, DocumentEncoder(tokenizer))
    counts = Counter(tokens=0, bytes=0, documents=0, shards=0)
    rows = None if isinstance(documents, IterableDataset) else len(documents)
    title = f"Tokenising {folder.name}"
    with tqdm(desc=title, total=rows, unit=" rows", disable=not show_progress) as bar:
        for found in run_in_order(write, enumerate(_group(documents)), num_proc):
            bar.update(found.pop("rows"))
            counts.update(found)
    return dict(counts)


def _group(documents: Documents) -> Iterator[tuple[list[str], list[bool]]]:
    """Yield the documents in groups of `_CHARACTERS` or a little more, one for each file."""
    texts: list[str] = []
    starts: list[bool] = []
    size = 0
    for batch in documents.iter(batch_size=64):
        for text, new in zip(batch["text"], batch.get("starts") or repeat(True), strict=False):
            texts.append(text)
            starts.append(new)
            size += len(text)
            if size >= _CHARACTERS:
                yield texts, starts
                texts, starts, size = [], [], 0
    if texts:
        yield texts, starts


def _write_shard(
    folder: Path, encode: DocumentEncoder, number: int, documents: tuple[list[str], list[bool]]
) -> dict[str, int]:
    """Write one file unless it exists, and return the counts of its content."""
    path, (texts, starts) = folder / _name(number), documents
    if path.exists():
        tokens = len(_open_shard(path))
    else:
        rows: list[np.ndarray] = []
        for i in range(0, len(texts), 64):  # few at a time, as lists of numbers are large
            rows += encode({"text": texts[i : i + 64], "starts": starts[i : i + 64]})["input_ids"]
        tokens = sum(map(len, rows))
        _write_rows(path, rows)
    size = sum(len(text.encode()) for text in texts)
    counts = {"tokens": tokens, "bytes": size, "documents": sum(starts), "shards": 1}
    return counts | {"rows": len(texts)}


def _write_rows(path: Path, rows: list[np.ndarray]) -> None:
    ends = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    column = pa.ListArray.from_arrays(pa.array(ends), pa.array(np.concatenate(rows)))
    batch = pa.record_batch([column], names=["input_ids"])
    part = path.with_suffix(".partial")
    with pa.OSFile(str(part), "wb") as file, pa.ipc.new_stream(file, batch.schema) as writer:
        writer.write_batch(batch)
    os.replace(part, path)


def _name(number: int) -> str:
    return f"{number:05}.arrow"
