"""Tokenizers: trained on the user's text, or loaded; and how many bytes their tokens stand for.

Each one trained here is a byte-level BPE over 256 byte symbols. They differ in their merges:
learned ones (`bpe`), those that join the bytes of each character seen (`char`), or none (`byte`).
So each encodes every Unicode text, decodes it exactly, and loads anywhere as a `tokenizer.json`.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from datasets.utils import are_progress_bars_disabled
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..checkpoint.foreign import read_tokenizer
from ..checkpoint.loading import TOKENIZER_FILES, download, split_revision
from ..errors import UserError, did_you_mean
from .conversations import get_text
from .documents import DataArguments, Documents
from .encoding import count_ids

END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"
UNUSED_SYMBOL = bytes_to_unicode()[0xFF]  # in a vocabulary; no text in UTF-8 has this byte
TokenizerKind = Literal["bpe", "char", "byte"]
TRAINED = get_args(TokenizerKind)
_LONG = 300  # characters
_RUN = re.compile(rf"\w{{{_LONG}}}|\s{{{_LONG}}}|[^\w\s]{{{_LONG}}}")
_BLANKS = re.compile(rf"\s{{{_LONG}}}")
_ENOUGH = 64_000_000  # characters: more text than this does not change a small vocabulary


def make_tokenizer(args: DataArguments, documents: Documents) -> PreTrainedTokenizerBase:
    """Train the tokenizer that `args` names on `documents`, or load it.

    Raises:
        UserError: as `train_tokenizer` and `load_tokenizer`.
    """
    if args.tokenizer not in TRAINED:
        return load_tokenizer(args.tokenizer)
    texts = _limit(map(get_text, documents))
    kind = cast(TokenizerKind, args.tokenizer)
    most = args.vocab_size
    return train_tokenizer(texts, kind=kind, vocab_size=most, exact=args.exact_vocab_size)


def _limit(texts: Iterable[str]) -> Iterator[str]:
    size = 0
    for text in texts:
        yield text
        if (size := size + len(text)) > _ENOUGH:
            return


def load_tokenizer(name: str | Path, *, needs_eos: bool = True) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or Hub id; text to train on needs an eos between documents.

    Raises:
        UserError: nothing is found under this name, it is damaged, or it has no eos_token.
    """
    if "/" not in str(name) and not Path(name).is_dir():
        raise UserError(
            f"tokenizer={str(name)!r} must be bpe, char, byte, a folder or a Hub id."
            f"{did_you_mean(str(name), TRAINED)}"
        )
    place, revision = split_revision(name)
    folder = Path(place)
    if not folder.is_dir():
        what = "tokenizer (bpe, char, byte, or a folder)"
        try:
            folder = download(place, revision, TOKENIZER_FILES, what=what)
        except UserError as error:
            raise UserError(f"tokenizer={error}") from error
    tokenizer = read_tokenizer(folder)
    if needs_eos and tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer={name} has no eos_token, which must separate documents.")
    return tokenizer


def train_tokenizer(
    texts: Iterable[str],
    *,
    kind: TokenizerKind = "bpe",
    vocab_size: int = 2048,
    exact: bool = True,
) -> PreTrainedTokenizerFast:
    """Make a tokenizer from `texts`; `<|endoftext|>` begins and ends documents, `<|pad|>` pads.

    Padding has a token of its own because stock collators learn nothing of the padding token, and
    would never learn where a text ends. It takes the id of the byte 0xFF, which no text in UTF-8
    has, so that the size of a vocabulary and all other ids are as without it.

    Args:
        texts: the training text, in pieces of any length; read once, as a stream.
        kind: `"bpe"` learns merges up to `vocab_size` tokens (Sennrich et al., arXiv:1508.07909;
            over bytes as in GPT-2); `"char"` makes one token of each character seen and spells the
            others in bytes; `"byte"` has only the bytes. The last two decide their own vocabulary
            size.

    Raises:
        UserError: `kind` is unknown, or `vocab_size` is below 257 (the bytes and `<|endoftext|>`)
            or, if it is to be `exact`, more than the text can give.
    """
    if kind not in TRAINED:
        raise UserError(f"kind={kind!r} must be bpe, char or byte.{did_you_mean(kind, TRAINED)}")
    if kind == "bpe":
        tokenizer = _train_bpe(texts, vocab_size, exact)
    else:
        characters = set(chain.from_iterable(texts)) if kind == "char" else set()
        tokenizer = _join_characters(characters)
    return PreTrainedTokenizerFast(
        tokenizer_object=_add_padding(tokenizer),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        padding_side="left",  # to generate
        clean_up_tokenization_spaces=False,
    )


def _train_bpe(texts: Iterable[str], vocab_size: int, exact: bool) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size <= len(alphabet):
        raise UserError(
            f"vocab_size={vocab_size} is too small for byte-level BPE: give at least "
            f"{len(alphabet) + 1} (the 256 bytes and {END_OF_TEXT}), or use tokenizer='byte'."
        )
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=sys.stderr.isatty() and not are_progress_bars_disabled(),
    )
    tokenizer.train_from_iterator(_cut_runs(texts), trainer)
    if exact and (size := tokenizer.get_vocab_size()) < vocab_size:
        raise UserError(
            f"This text gives a BPE only {size} tokens, not vocab_size={vocab_size}: give more "
            f"text, tokenizer='char', or vocab_size={size} or less."
        )
    return tokenizer


def _cut_runs(texts: Iterable[str]) -> Iterator[str]:
    """Cut runs of letters, blanks or signs, which the trainer takes for one word.

    Its time grows with the square of their length. Encoding does not cut them.
    """
    for text in texts:
        start = 0
        # Most texts have none, which this finds out faster.
        if max(map(len, text.split()), default=0) >= _LONG or _BLANKS.search(text):
            for run in _RUN.finditer(text):
                yield text[start : run.end()]
                start = run.end()
        yield text[start:]


def _join_characters(characters: set[str]) -> Tokenizer:
    """Make a BPE with only the merges that join the bytes of each character (ASCII needs none)."""
    vocabulary = [END_OF_TEXT, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges: dict[tuple[str, str], None] = {}  # an ordered set
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    for character in sorted(characters):
        [(symbols, _)] = spell(character)
        for end in range(1, len(symbols)):
            merges[symbols[:end], symbols[end]] = None
    vocabulary += ["".join(pair) for pair in merges]
    ids = {token: i for i, token in enumerate(vocabulary)}
    return _byte_level(models.BPE(vocab=ids, merges=list(merges)))


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def _add_padding(tokenizer: Tokenizer) -> Tokenizer:
    """Return the tokenizer with `<|pad|>` in place of the byte 0xFF."""
    parts = json.loads(tokenizer.to_str())
    vocabulary = parts["model"]["vocab"]
    vocabulary[PADDING] = vocabulary.pop(UNUSED_SYMBOL)
    tokenizer = Tokenizer.from_str(json.dumps(parts))
    tokenizer.add_special_tokens([PADDING])
    return tokenizer


def token_byte_counts(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Return the bytes of text that each token stands for, (largest id + 1,); 0 if special.

    The sum over an encoded text is the length of the text in UTF-8 for byte-level tokenizers that
    change nothing in a text (ours, GPT-2's, Llama 3's). It is not for those that normalise it
    (Qwen's), or put a space in front of it (Llama 2's). For tokenizers that are not byte-level, a
    token counts as the bytes that it adds when decoded.
    """
    special, spell = set(tokenizer.all_special_ids), token_speller(tokenizer)
    ids = range(count_ids(tokenizer))
    return torch.tensor([0 if i in special else len(spell(i)) for i in ids])


def token_speller(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], bytes]:
    """Return a function from a token id to what the token spells, in UTF-8 or a part of it.

    An id without a token spells nothing.
    """
    is_byte_level = _is_byte_level(tokenizer)
    # Gemma adds runs of blanks, which it writes as it does in other tokens: they are decoded.
    added = {
        i: token.content.encode()
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.special or is_byte_level
    }
    tokens = {i: token for token, i in tokenizer.get_vocab().items()}
    byte_of = {symbol: bytes([byte]) for byte, symbol in bytes_to_unicode().items()}
    # Others are decoded behind another token, as decoders drop the space at the start of a text.
    anchor = min(tokens.keys() - added.keys(), default=0)
    decode: Callable[[list[int]], Any] = tokenizer.decode  # a text, or of batches a list
    start = 0 if is_byte_level or not tokens else len(decode([anchor]).encode())

    def spell(i: int) -> bytes:
        if i in added or i not in tokens:  # an added token stands for what it spells
            return added.get(i, b"")
        if is_byte_level:  # one symbol a byte
            return b"".join(byte_of.get(symbol, symbol.encode()) for symbol in tokens[i])
        if re.fullmatch("<0x[0-9A-F]{2}>", tokens[i]):  # a byte, which alone may not decode
            return bytes.fromhex(tokens[i][3:5])
        return decode([anchor, i]).encode()[start:]

    return spell


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return False
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
    parts = decoder.get("decoders", [decoder])
    return any(part.get("type") == "ByteLevel" for part in parts)
