"""A corpus tokenised once, in a folder that training reads by memory mapping.

    tokenized.json     what it was made from; and, once it is whole, what is in it
    tokenizer/         the tokenizer
    train/00000.arrow  a piece of the training documents, one `input_ids` a row, eos before each
    validation/...

Such a file is an Arrow stream, which `datasets.Dataset.from_file` opens too. Each is written whole
or not at all, and where one ends depends on the text alone: a run that was stopped goes on after
the last one, and any number of processes writes the same bytes.
"""

import json
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import repeat
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .. import __version__
from ..checkpoint.folder import check_writable, clear_abandoned, staged_folder
from ..errors import UserError, without_secrets
from ..untrusted import read_json
from .conversations import MESSAGES, add_chat_template
from .documents import (
    TOKENIZED,
    TOKENIZERS,
    DataArguments,
    Documents,
    find_files,
    load_documents,
    load_tokenizer,
)
from .encoding import DocumentEncoder
from .packing import Tokens, tokenize_documents
from .token_files import find_token_files, load_token_files

_CHARACTERS = 10_000_000  # of text in one file; a run that is stopped loses no more per process
_SPLITS = ("train", "validation")
_NOT_THE_CONTENT = ("context_length", "num_proc")  # settings that change nothing in the folder


# Reading


@dataclass(frozen=True)
class Corpus:
    """What there is to train and to validate on: text, or the tokens that a folder holds.

    Attributes:
        train, validation: documents, or with a `tokenizer`, their tokens.
        tokenizer: the tokenizer of the tokens; None for text.
    """

    train: Documents | Tokens
    validation: Documents | Tokens
    tokenizer: PreTrainedTokenizerBase | None = None


def prepare_data(args: DataArguments) -> Corpus:
    """Load the text, or open the tokens, that `args` names.

    Raises:
        UserError: as `load_documents`; or a folder of tokens is not whole, or has validation data
            of its own.
    """
    folder = Path(args.data).expanduser()
    if (folder / TOKENIZED).is_file():
        tokenizer, train, validation = _load_folder(folder, args)
    elif find_token_files(folder):
        tokenizer, train, validation = load_token_files(folder, args)
    else:
        return Corpus(*load_documents(args))
    if args.validation_data:
        raise UserError(
            f"validation_data={without_secrets(args.validation_data)} cannot be used with "
            f"data={args.data}, which holds tokens, also those to validate on: leave it out."
        )
    return Corpus(train, validation, tokenizer)


def prepare_tokenizer(
    args: DataArguments,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    max_length: int | None = None,
) -> PreTrainedTokenizerBase:
    """Return a checkpoint's `tokenizer`, or that of the corpus, or a new one; with its template.

    `max_length` is the context of the model that goes with it.

    Raises:
        UserError: the tokens of the corpus are not of that tokenizer, or none can be loaded or
            trained.
    """
    stored = corpus.tokenizer
    if tokenizer and stored and not stored.get_vocab().items() <= tokenizer.get_vocab().items():
        raise UserError(
            f"data={args.data} was tokenised by another tokenizer than the checkpoint has: give "
            "the folder that its training began with."
        )
    tokenizer = tokenizer or stored or load_tokenizer(args, corpus.train)
    add_chat_template(tokenizer, args.chat_template)
    if max_length:
        tokenizer.model_max_length = max_length
    return tokenizer


def tokenize_sides(
    args: DataArguments, corpus: Corpus, tokenizer: PreTrainedTokenizerBase
) -> tuple[Tokens, Tokens]:
    """Return the tokens to train on and to validate on."""
    if corpus.tokenizer:
        return corpus.train, corpus.validation
    tokenise = partial(tokenize_documents, tokenizer=tokenizer, num_proc=args.num_proc)
    return tokenise(corpus.train), tokenise(corpus.validation)


def load_tokens(
    args: DataArguments, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[PreTrainedTokenizerBase, Tokens, Tokens]:
    """Return the tokenizer, and the tokens to train on and to validate on, of what `args` names."""
    corpus = prepare_data(args)
    tokenizer = prepare_tokenizer(args, corpus, tokenizer)
    return tokenizer, *tokenize_sides(args, corpus, tokenizer)


def _load_folder(
    folder: Path, args: DataArguments
) -> tuple[PreTrainedTokenizerBase, Tokens, Tokens]:
    described = read_description(folder)
    if "splits" not in described:
        raise UserError(
            f"data={folder} is not whole, as hf-nanogpt tokenize was stopped: run it again with "
            "the same settings, and it goes on."
        )
    if args.tokenizer not in TOKENIZERS:
        raise UserError(
            f"tokenizer={args.tokenizer} cannot be used with data={folder}, which is tokenised "
            "already: leave it out."
        )
    tokenizer = load_tokenizer(DataArguments(tokenizer=str(folder / "tokenizer")), [])
    sides = [
        partial(_open_shards, folder / name, part["shards"], part["tokens"], tokenizer.eos_token_id)
        for name, part in described["splits"].items()
    ]
    return tokenizer, sides[0], sides[1]


def read_description(folder: Path) -> dict[str, Any]:
    """Return the content of a tokenised folder's `tokenized.json`."""
    path = folder / TOKENIZED
    try:
        described = read_json(path)
        described["settings"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is damaged ({error!r}): delete {folder} and tokenise again."
        ) from error
    return described


def _open_shards(folder: Path, shards: int, tokens: int, eos: int) -> list[np.ndarray]:
    pieces = [_open_shard(folder / _name(number)) for number in range(shards)]
    if (found := sum(map(len, pieces))) != tokens:
        raise UserError(f"data={folder} has {found:,} tokens, not {tokens:,}: it is damaged.")
    kind = pieces[0].dtype if pieces else np.int64
    return [*pieces, np.array([eos], dtype=kind)]


def _open_shard(path: Path) -> np.ndarray:
    try:
        with pa.memory_map(str(path)) as file:  # closed, it stays mapped, and no handle is used up
            [chunk] = pa.ipc.open_stream(file).read_all().column("input_ids").chunks
        return chunk.flatten().to_numpy()
    except (OSError, ValueError, KeyError) as error:  # Arrow's errors are among these
        raise UserError(
            f"data={path} is damaged or gone ({error}): delete it and run the same hf-nanogpt "
            "tokenize again, which writes only what is missing."
        ) from error


# Writing


def tokenize_corpus(
    args: DataArguments, folder: str | Path, *, show_progress: bool = False
) -> dict[str, Any]:
    """Tokenise what `args` names into `folder`, or go on where an earlier run was stopped.

    Returns:
        the content of `tokenized.json`: under `splits` the `tokens`, `bytes` (of text in UTF-8),
        `documents` and `shards` of `train` and `validation`.

    Raises:
        UserError: as `load_documents`; or the folder is no such one, or was begun with other
            settings or another source.
    """
    folder = Path(folder)
    described = _check_folder(folder, args)
    documents, held_out = load_documents(args)
    if MESSAGES in (documents.column_names or []):
        raise UserError(
            f"data={without_secrets(args.data)} holds conversations ({MESSAGES}), which are not "
            "tokenised ahead: give them to hf-nanogpt train."
        )
    _check_source(folder, args, described, documents)
    try:
        tokenizer = _begin(folder, args, described, documents)
        described |= {"vocab_size": len(tokenizer), "versions": _list_versions()}
        described["splits"] = {
            name: _write_split(folder / name, side, tokenizer, args.num_proc, show_progress)
            for name, side in zip(_SPLITS, (documents, held_out), strict=True)
        }
        with staged_folder(folder) as staged:
            _write_json(staged / TOKENIZED, described)
    except OSError as error:
        raise UserError(
            f"{folder} could not be written to its end: {error}. When there is room, run the same "
            "again, and it goes on."
        ) from error
    return described


def _list_versions() -> dict[str, str]:
    packages = ("datasets", "pyarrow", "tokenizers", "transformers")
    return {"hf_nanogpt": __version__} | {name: version(name) for name in packages}


def _check_folder(folder: Path, args: DataArguments) -> dict[str, Any]:
    """Return the description that a run with the same settings began, or else a new one."""
    check_writable(folder, name="folder")
    settings = {k: v for k, v in asdict(args).items() if k not in _NOT_THE_CONTENT}
    for name in ("data", "validation_data"):  # the folder may be shared
        settings[name] = settings[name] and without_secrets(settings[name])
    if not (folder / TOKENIZED).is_file():
        if folder.is_dir() and any(p for p in folder.iterdir() if p.name[:8] != ".staged-"):
            raise UserError(f"{folder} exists and is not empty: choose another folder.")
        return {"settings": settings}
    begun = read_description(folder)
    for name, value in settings.items():
        if begun["settings"].get(name) != value:
            raise UserError(
                f"{name}={value!r}, but {folder} was begun with {name}="
                f"{begun['settings'].get(name)!r}: give that, or choose another folder."
            )
    return begun


def _check_source(
    folder: Path, args: DataArguments, described: dict[str, Any], documents: Documents
) -> None:
    """Refuse a source whose files, or whose version on the Hub, are not those of the beginning.

    Of a stream from the Hub nothing is known.
    """
    names = [args.data, *([args.validation_data] if args.validation_data else [])]
    files = [(str(p), p.stat()) for name in names for p in find_files(name)]
    state: Any = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
    if not state and isinstance(documents, Dataset):
        state = documents._fingerprint
    source = Hasher.hash(state)
    if described.setdefault("source", source) != source:
        raise UserError(
            f"data={without_secrets(args.data)} has changed since {folder} was begun: choose "
            "another folder."
        )


def _begin(
    folder: Path, args: DataArguments, described: dict[str, Any], documents: Documents
) -> PreTrainedTokenizerBase:
    """Write the tokenizer and the description, unless an earlier run did, and return the former."""
    clear_abandoned(folder)
    if not (folder / "tokenizer").is_dir():
        tokenizer = prepare_tokenizer(args, Corpus(documents, documents))
        with staged_folder(folder) as staged:
            tokenizer.save_pretrained(staged / "tokenizer")
            _write_json(staged / TOKENIZED, described)
    return load_tokenizer(DataArguments(tokenizer=str(folder / "tokenizer")), documents)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_split(
    folder: Path,
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    num_proc: int | None,
    show_progress: bool,
) -> dict[str, int]:
    """Write the files of one side that are not there yet, and count what is in all of them."""
    folder.mkdir(exist_ok=True)
    encode = DocumentEncoder(tokenizer)
    counts = {"tokens": 0, "bytes": 0, "documents": 0, "shards": 0}
    bar = tqdm(
        desc=f"Tokenising {folder.name}",
        total=None if isinstance(documents, IterableDataset) else len(documents),
        unit=" rows",
        disable=not show_progress,
    )
    with ExitStack() as stack:
        stack.enter_context(bar)
        pool = _make_pool(num_proc)
        stack.callback(pool.shutdown, cancel_futures=True)
        pending: deque[tuple[Future, int]] = deque()

        def finish_one() -> None:
            future, rows = pending.popleft()
            counts["tokens"] += future.result()
            bar.update(rows)

        for texts, starts in _group(documents):
            path = folder / _name(counts["shards"])
            pending.append((pool.submit(_write_shard, path, texts, starts, encode), len(texts)))
            counts["shards"] += 1
            counts["documents"] += sum(starts)
            counts["bytes"] += sum(len(text.encode()) for text in texts)
            if len(pending) > 2 * (num_proc or 0):  # what waits is in memory
                finish_one()
        while pending:
            finish_one()
    return counts


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


def _write_shard(path: Path, texts: list[str], starts: list[bool], encode: DocumentEncoder) -> int:
    """Write one file unless it is there, and return the tokens in it."""
    if path.exists():
        return len(_open_shard(path))
    rows: list[np.ndarray] = []
    for i in range(0, len(texts), 64):  # few at a time, as lists of numbers are large
        rows += encode({"text": texts[i : i + 64], "starts": starts[i : i + 64]})["input_ids"]
    ends = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    column = pa.ListArray.from_arrays(pa.array(ends), pa.array(np.concatenate(rows)))
    batch = pa.record_batch([column], names=["input_ids"])
    staged = path.with_suffix(".partial")
    with pa.OSFile(str(staged), "wb") as file, pa.ipc.new_stream(file, batch.schema) as writer:
        writer.write_batch(batch)
    os.replace(staged, path)
    return int(ends[-1])


def _name(number: int) -> str:
    return f"{number:05}.arrow"


class _Here(Executor):
    """Does the work at once, in this process."""

    def submit(self, fn, /, *args, **kwargs) -> Future:
        future: Future = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def _make_pool(num_proc: int | None) -> Executor:
    if num_proc is None or num_proc == 1:
        return _Here()
    return ProcessPoolExecutor(num_proc, initializer=_start_worker)


def _start_worker() -> None:
    """Use one thread, and end when the process that started this one does, even if killed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that waits

    def follow() -> None:
        parent_process().join()  # type: ignore[union-attr]
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
