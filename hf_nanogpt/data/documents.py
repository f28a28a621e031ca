"""From sources to documents: files, tables and the Hub, and which documents are held out."""

import glob
import math
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from datasets import (
    Dataset,
    Features,
    IterableDataset,
    NamedSplit,
    Value,
    load_dataset,
)
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..checkpoint.folder import TOKENIZER_FILES, download, split_revision, unreachable
from ..checkpoint.foreign import read_tokenizer
from ..errors import UserError, without_secrets
from .conversations import MESSAGES, Documents, check_chat_template, read_conversations
from .tokenization import TokenizerKind, train_tokenizer
from .web import download_text, is_address

logger = logging.get_logger(__name__)

STDLIB = "python-stdlib"
TOKENIZED = "tokenized.json"  # describes the folder that it is in, which `hf-nanogpt tokenize` made
TOKENIZERS = ("bpe", "char", "byte")
_TABLES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_PIECE = 100_000  # characters of a long text that are handled at a time
_TOKENIZER_BYTES = 64_000_000  # more text than this does not change a small vocabulary
_FEW = 20  # with fewer documents than this, each gives its tail to validation


@dataclass
class DataArguments:
    """Where the text comes from and how it becomes tokens."""

    data: str = field(
        default=STDLIB,
        metadata={
            "help": "Text to train on: a file, folder, glob or URL of UTF-8 text, or a file, "
            "folder or glob of .jsonl, .csv or .parquet tables (of texts, or of conversations in "
            f"a column {MESSAGES}), a Hub dataset id, "
            f"{STDLIB} (the source code of Python's standard library), or tokens: a folder that "
            "hf-nanogpt tokenize made, or one with nanoGPT's train.bin and val.bin."
        },
    )
    validation_data: str | None = field(
        default=None,
        metadata={"help": "Text to validate on; by default part of `data` is held out."},
    )
    validation_fraction: float = field(
        default=0.1, metadata={"help": "Share of `data` that is held out, by document."}
    )
    text_column: str = field(
        default="text", metadata={"help": "Column of a table that holds the text."}
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub dataset."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    streaming: bool = field(
        default=False, metadata={"help": "Read a table or Hub dataset as a stream."}
    )
    validation_documents: int = field(
        default=200, metadata={"help": "Documents to hold out of a stream."}
    )
    tokenizer: str = field(
        default="bpe",
        metadata={
            "help": "bpe, char, byte, or the folder or Hub id of a tokenizer; a tokenised folder "
            "brings its own."
        },
    )
    vocab_size: int = field(
        default=2048, metadata={"help": "Size of the vocabulary for tokenizer=bpe."}
    )
    context_length: int | None = field(
        default=None, metadata={"help": "Tokens in a block; by default the model's context."}
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "chatml: give the tokenizer this template for conversations and its special "
            "tokens, unless it has one."
        },
    )
    num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise."})

    def __post_init__(self):
        check_chat_template(self.chat_template)
        if not 0 < self.validation_fraction < 1:
            raise UserError(
                f"validation_fraction={self.validation_fraction} must be between 0 and 1, "
                "for example 0.1."
            )
        if self.num_proc is not None and self.num_proc < 1:
            raise UserError(f"num_proc={self.num_proc} is not possible: give 1 or more.")


def load_documents(args: DataArguments) -> tuple[Documents, Documents]:
    """Load `args.data` and return its training and validation documents, rows with a `text`.

    Which documents are held out depends on their text alone (a checksum), not on their order; of a
    corpus of fewer than 20 text files the end of each is held out, of so small a table the last
    rows.

    Raises:
        UserError: the source is missing, empty or no text, or too small to hold anything out.
    """
    if args.validation_data:
        return _read(args.data, args, 0.0)[0], _read(args.validation_data, args, 0.0)[0]
    train, validation = _read(args.data, args, args.validation_fraction)
    if _is_empty(validation) or _is_empty(train):
        raise UserError(
            f"data={without_secrets(args.data)} is too small to hold out validation_fraction="
            f"{args.validation_fraction} of it: give more text, a larger fraction, or "
            "validation_data."
        )
    return train, validation


def load_text(data: str, *, text_column: str = "text") -> Documents:
    """Return all documents of `data` (see `DataArguments`), nothing held out."""
    return _read(data, DataArguments(text_column=text_column), 0.0)[0]


def _is_empty(documents: Documents) -> bool:
    return next(iter(documents), None) is None


def _read(data: str, args: DataArguments, fraction: float) -> tuple[Documents, Documents]:
    files, data = find_files(data), without_secrets(data)  # the latter is for messages
    if files and files[0].suffix not in _TABLES:
        return _read_texts(data, files, fraction)
    return _read_table(data, files, args, fraction)


# Text files


def find_files(data: str) -> list[Path]:
    """List the files that `data` names; none means that it can only be a Hub id."""
    if is_address(data):
        return [download_text(data)]
    path = Path(data).expanduser()
    if not data.strip():
        raise UserError(f"data={data!r} names nothing: give a file, a folder or a Hub id.")
    if data == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
        files = [p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts)]
    elif (path / TOKENIZED).is_file():
        raise UserError(
            f"data={data} holds tokens, and text is needed here: name what they were made from."
        )
    elif path.is_dir():
        files = [
            p for p in path.rglob("*") if not any(x[0] == "." for x in p.relative_to(path).parts)
        ]
    elif path.is_file():
        return [path]
    else:
        files = [Path(p) for p in glob.glob(str(path), recursive=True)]
        if not files and not _may_be_hub_id(data):
            raise UserError(f"data={data} was not found: there is no such file, folder or match.")
        if not files:
            return []
    files = sorted(p for p in files if p.is_file() and p.stat().st_size)
    texts = [p for p in files if p.suffix not in _TABLES and _is_text(p)]
    tables = [p for p in files if p.suffix in _TABLES]
    if tables and texts:
        raise UserError(
            f"data={data} mixes tables ({tables[0].name}) and texts: give a glob for one."
        )
    if not texts and not tables:
        raise UserError(f"data={data} holds no UTF-8 text and no .jsonl, .csv or .parquet file.")
    if skipped := len(files) - len(texts) - len(tables):
        logger.warning(f"{skipped} of the files in {data} are no UTF-8 text and are left out.")
    return tables or texts


def _may_be_hub_id(data: str) -> bool:
    """Say whether `data` has the form user/name, where a name may end in a version."""
    user, slash, name = data.partition("/")
    suffix = Path(name).suffix.lstrip(".")
    file = Path(user).is_dir() or (suffix and not suffix.isdecimal())
    return bool(user and slash and name) and not file and not set(name) & set("/*?[")


def _is_text(path: Path) -> bool:
    """Say whether a file begins as UTF-8 text (the rest is checked when it is read)."""
    with path.open("rb") as file:
        head = file.read(8192)
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:
            return False
    return b"\0" not in head


def _read_texts(data: str, files: list[Path], fraction: float) -> tuple[Dataset, Dataset]:
    for path in files:
        if path.stat().st_size < 8192 and not path.read_bytes().strip():
            raise UserError(f"data={path} is empty: there is nothing to train on.")
        if not _is_text(path):
            raise UserError(f"data={path} is not UTF-8 text: convert it, or name the right file.")
    # Sizes and times are among the arguments, so that a changed text is not served from the cache.
    # (A tuple: `from_generator` would hand a list to the generator one element at a time.)
    state = tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files)
    try:
        kept = _write_texts(state, fraction, held_out=False)
        return kept, _write_texts(state, fraction, held_out=True) if fraction else kept
    except Exception as error:
        cause = error.__cause__ or error
        if isinstance(cause, UnicodeDecodeError):
            raise UserError(f"data={data} is not UTF-8 text: {cause}.") from error
        raise


def _write_texts(state: tuple, fraction: float, *, held_out: bool) -> Dataset:
    """Write one side of the split to an Arrow file in the cache, and map it into memory."""
    features = Features({"text": Value("large_string"), "starts": Value("bool")})
    settings: dict[str, Any] = {"state": state, "held_out": held_out}
    if len(state) < _FEW:
        generate: Callable[..., Iterator[dict]] = _generate_tails
        settings["fraction"] = fraction
    else:
        generate = _generate_whole_texts
        firsts = (next(_read_pieces(name), "") for name, *_ in state)
        settings["threshold"] = _find_threshold(firsts, fraction) if fraction else 0
    if next(generate(**settings), None) is None:
        return Dataset.from_dict({"text": [], "starts": []}, features=features)
    return Dataset.from_generator(
        generate,
        gen_kwargs=settings,
        features=features,
        fingerprint=Hasher.hash(("texts", _PIECE, settings)),
        split=NamedSplit("validation" if held_out else "training"),
    )


def _generate_whole_texts(state: tuple, threshold: int, held_out: bool) -> Iterator[dict]:
    """Yield the pieces of each text on one side of the split; `starts` marks the first of each."""
    for name, *_ in state:
        pieces = _read_pieces(name)
        first = next(pieces, "")
        if (_checksum(first) < threshold) == held_out:
            yield {"text": first, "starts": True}
            yield from ({"text": piece, "starts": False} for piece in pieces)


def _generate_tails(state: tuple, fraction: float, held_out: bool) -> Iterator[dict]:
    """Yield either the last `fraction` of each text's characters, or what comes before it."""
    for name, *_ in state:
        cut = math.floor(sum(map(len, _read_pieces(name))) * (1 - fraction))
        at, starts = 0, True
        for piece in _read_pieces(name):
            split = max(0, min(cut - at, len(piece)))
            at += len(piece)
            if text := piece[split:] if held_out else piece[:split]:
                yield {"text": text, "starts": starts}
                starts = False


def _read_pieces(name: str) -> Iterator[str]:
    """Yield a text file in pieces that end at a line's end, every character as it stands."""
    with open(name, encoding="utf-8", newline="") as file:
        while piece := file.read(_PIECE):
            yield piece + file.readline()


def _checksum(text: str) -> int:
    return zlib.crc32(text.encode("utf-8", "replace"))


def _find_threshold(texts: Iterable[str], fraction: float) -> int:
    """Return the checksum below which texts are held out: about `fraction`, at least one."""
    return max(int(fraction * 2**32), min(map(_checksum, texts)) + 1)


# Tables and the Hub


def _read_table(
    data: str, files: list[Path], args: DataArguments, fraction: float
) -> tuple[Documents, Documents]:
    if empty := next((p for p in files if p.stat().st_size == 0), None):
        raise UserError(f"data={empty} is empty: there is nothing to train on.")
    try:
        if files:
            names = [str(p) for p in files]
            kind = _TABLES[files[0].suffix]
            table = load_dataset(kind, data_files=names, split="train", streaming=args.streaming)
        else:
            table = load_dataset(
                data, args.dataset_config, split=args.dataset_split, streaming=args.streaming
            )
        first: dict = next(iter(table), {})
    except Exception as error:
        if isinstance(error, OSError) and not files:
            raise UserError(f"data={unreachable(data, 'file or folder', error)}") from error
        why = error.__cause__ or error  # `datasets` says only that something went wrong
        raise UserError(f"data={data} cannot be read as a table: {why}") from error
    columns = table.column_names or list(first)
    column = MESSAGES if args.text_column == "text" and "text" not in columns else args.text_column
    if column == MESSAGES and isinstance(first.get(MESSAGES), list):
        table = read_conversations(table, columns, data=data)
    else:
        table = _read_column(table, columns, first, args, data)
    table = table.filter(_has_text)
    if not fraction:
        return table, table
    if isinstance(table, Dataset) and len(table) < _FEW:
        kept = len(table) - math.ceil(len(table) * fraction)
        return table.select(range(kept)), table.select(range(kept, len(table)))
    threshold = int(fraction * 2**32)
    validation = table.filter(_is_below, fn_kwargs={"threshold": threshold})
    if isinstance(validation, IterableDataset):
        validation = Dataset.from_list(list(validation.take(args.validation_documents)))
    elif len(validation) == 0:
        threshold = _find_threshold((row["text"] for row in table), fraction)
        validation = table.filter(_is_below, fn_kwargs={"threshold": threshold})
    train = table.filter(_is_not_below, fn_kwargs={"threshold": threshold})
    return train, validation


def _read_column(
    table: Documents, columns: list[str], first: dict, args: DataArguments, data: str
) -> Documents:
    if args.text_column not in columns:
        raise UserError(
            f"text_column={args.text_column!r} is not in {data}; its columns are: "
            f"{', '.join(columns)}."
        )
    if not isinstance(first.get(args.text_column), str | None):
        raise UserError(
            f"text_column={args.text_column!r} of {data} holds no text, but for example "
            f"{first[args.text_column]!r}; its columns are: {', '.join(columns)}."
        )
    table = table.select_columns(args.text_column)
    return table if args.text_column == "text" else table.rename_column(args.text_column, "text")


def _has_text(row: dict) -> bool:
    return bool(row["text"])


def _is_below(row: dict, threshold: int) -> bool:
    return _checksum(row["text"]) < threshold


def _is_not_below(row: dict, threshold: int) -> bool:
    return not _is_below(row, threshold)


# The tokenizer


def load_tokenizer(args: DataArguments, documents: Documents) -> PreTrainedTokenizerBase:
    """Train the tokenizer that `args` names on `documents`, or load it from a folder or the Hub."""
    if args.tokenizer in TOKENIZERS:
        texts = (row["text"] for row in documents)
        return train_tokenizer(
            _limit(texts), kind=cast(TokenizerKind, args.tokenizer), vocab_size=args.vocab_size
        )
    if "/" not in args.tokenizer and not Path(args.tokenizer).is_dir():
        raise UserError(
            f"tokenizer={args.tokenizer!r} is none of bpe, char, byte, no folder and no Hub id."
        )
    name, revision = split_revision(args.tokenizer)
    folder = Path(name)
    if not folder.is_dir():
        try:
            what = "tokenizer (bpe, char, byte, or a folder)"
            folder = download(name, revision, TOKENIZER_FILES, what=what)
        except ValueError as error:
            raise UserError(f"tokenizer={error}") from error
    tokenizer = read_tokenizer(folder)
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer={args.tokenizer} has no eos_token, which separates documents.")
    return tokenizer


def _limit(texts: Iterable[str]) -> Iterator[str]:
    size = 0
    for text in texts:
        yield text
        if (size := size + len(text)) > _TOKENIZER_BYTES:
            return
