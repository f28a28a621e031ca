"""Tokenizers made from one's own text: byte-level BPE, characters or plain bytes.

All three are the same machine, a byte-level BPE over 256 byte symbols, with different merges:
learned ones (`bpe`), those that join the bytes of each character seen (`char`), or none (`byte`).
So every Unicode text can be encoded, comes back exactly, and loads anywhere as a plain
`tokenizer.json`.
"""

import json
from collections.abc import Iterable
from typing import Literal, get_args

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import UserError

END_OF_TEXT = "<|endoftext|>"
TokenizerKind = Literal["bpe", "char", "byte"]


def train_tokenizer(
    texts: Iterable[str], *, kind: TokenizerKind = "bpe", vocab_size: int = 2048
) -> PreTrainedTokenizerFast:
    """Make a tokenizer from `texts`; `<|endoftext|>` begins and ends documents and pads.

    Args:
        texts: the training text, in pieces of any length; read once, as a stream.
        kind: `"bpe"` learns merges up to `vocab_size` tokens (Sennrich et al., arXiv:1508.07909;
            over bytes as in GPT-2); `"char"` makes one token of each character seen and spells the
            others in bytes; `"byte"` has the 256 bytes. The last two decide their own vocabulary
            size.

    Raises:
        UserError: `kind` is none of these, or `vocab_size` is below 257 (the bytes and
            `<|endoftext|>`) or more than the text can give.
    """
    if kind not in get_args(TokenizerKind):
        raise UserError(f"kind={kind!r} is unknown: choose bpe, char or byte.")
    if kind == "bpe":
        return _wrap(_train_bpe(texts, vocab_size))
    characters: set[str] = set()
    if kind == "char":
        for text in texts:
            characters.update(text)
    return _wrap(_join_characters(characters))


def token_byte_counts(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Return the bytes of text that each token stands for, (len(tokenizer),); 0 if special.

    Exact for byte-level tokenizers (ours, GPT-2's, Qwen's, Llama 3's): summed over an encoded text
    it gives the text's length in UTF-8. For others a token counts as the bytes it adds when
    decoded.
    """
    special = set(tokenizer.all_special_ids)
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    if _is_byte_level(tokenizer):
        counts = [len(token) for token in tokens]
    else:
        anchor = next(i for i in range(len(tokenizer)) if i not in special)
        start = len(tokenizer.decode([anchor]).encode())
        spelt = [tokenizer.decode([anchor, i]).encode() for i in range(len(tokenizer))]
        byte_tokens = [token.startswith("<0x") for token in tokens]
        counts = [
            1 if is_byte else len(text) - start
            for text, is_byte in zip(spelt, byte_tokens, strict=True)
        ]
    for i, token in tokenizer.added_tokens_decoder.items():  # spelt as they are
        counts[i] = len(token.content.encode())
    return torch.tensor([0 if i in special else count for i, count in enumerate(counts)])


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return False
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
    parts = decoder.get("decoders", [decoder])
    return any(part.get("type") == "ByteLevel" for part in parts)


def _train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
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
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (size := tokenizer.get_vocab_size()) < vocab_size:
        raise UserError(
            f"vocab_size={vocab_size} is more than this text can give, which is {size} tokens: "
            "lower vocab_size, give more text, or use tokenizer='char'."
        )
    return tokenizer


def _join_characters(characters: set[str]) -> Tokenizer:
    """Make a BPE whose only merges join the bytes of each of `characters` (ASCII needs none)."""
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


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Give the tokenizer the interface of transformers; it pads on the left, to generate."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
