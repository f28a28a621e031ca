"""The tokenizer in a GGUF file: byte-level BPE as ours, GPT-2's, Qwen's and Llama 3's."""

import json
from typing import Any

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

from ..data.tokenization import UNUSED_SYMBOL
from ..errors import UserError

logger = logging.get_logger(__name__)

# llama.cpp's names for how text is split before the merges, by regular expression and
# `ignore_merges`. ByteLevel has GPT-2's expression built in; the others stand in a Split before it.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")
_SPLITS = {(None, False): "gpt-2", (QWEN_SPLIT, False): "qwen2", (LLAMA3_SPLIT, True): "llama-bpe"}
_NO_MERGES = ["ÿ ÿ"]  # llama.cpp wants at least one; byte 255, twice, is in no UTF-8 text
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def describe_tokenizer(
    tokenizer: PreTrainedTokenizerBase, *, vocab_size: int, ends: int | list[int] | None = None
) -> dict[str, Any]:
    """Return the keys of a GGUF file that make llama.cpp encode and decode as the tokenizer does.

    Ids from the tokenizer's end to the model's `vocab_size` are marked as unused. llama.cpp cannot
    normalise text to composed characters (NFC) as Qwen's tokenizer does: there the prompt must be
    composed already. A text ends at `ends`, by default at the tokenizer's eos.

    Raises:
        UserError: the tokenizer is not a byte-level BPE, or llama.cpp would encode differently.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"GGUF: {type(tokenizer).__name__} has no tokenizer.json to write.")
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    split = _name_split(parts)

    # A row for each id: the token and its type.
    vocabulary = parts["model"]["vocab"] | {t["content"]: t["id"] for t in parts["added_tokens"]}
    if (size := max(vocabulary.values()) + 1) > vocab_size:
        raise UserError(f"GGUF: the tokenizer has {size} tokens, but vocab_size={vocab_size}.")
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    for token, i in vocabulary.items():
        tokens[i], types[i] = token, _NORMAL
    for added in parts["added_tokens"]:
        types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED

    keys = {
        "model": "gpt2",  # llama.cpp's name for byte-level BPE
        "pre": split,
        "tokens": tokens,
        "token_type": types,
        "merges": [" ".join(merge) for merge in parts["model"]["merges"]] or _NO_MERGES,
    }
    keys |= _special_tokens(tokenizer, tokenizer.eos_token_id if ends is None else ends)
    more = {"tokenizer.chat_template": tokenizer.chat_template} if tokenizer.chat_template else {}
    return {f"tokenizer.ggml.{k}": v for k, v in keys.items()} | more


def _name_split(parts: dict[str, Any]) -> str:
    """Return llama.cpp's name for how the tokenizer splits text; refuse what it cannot repeat."""
    model, splitter = parts["model"], parts["pre_tokenizer"] or {}
    *before, last = splitter.get("pretokenizers", [splitter])
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    bytes_needed = set(pre_tokenizers.ByteLevel.alphabet()) - {UNUSED_SYMBOL}
    if (
        model["type"] != "BPE"
        or last.get("type") != "ByteLevel"
        or any(model.get(option) for option in options)
        or not bytes_needed <= set(model["vocab"])
    ):
        raise UserError(
            f"GGUF: the tokenizer ({model['type']}, {last.get('type')}) is not a byte-level BPE, "
            "and only those can be written."
        )

    # At most one Split before ByteLevel, with an expression that llama.cpp knows.
    expressions = [step.get("pattern", {}).get("Regex") for step in before] or [None]
    name = _SPLITS.get((expressions[0], bool(model.get("ignore_merges"))))
    isolated = all(s.get("behavior") == "Isolated" and not s["invert"] for s in before)
    known = len(before) < 2 and isolated and last["use_regex"] == (not before)
    if name is None or not known or last["add_prefix_space"]:
        raise UserError(
            "GGUF: the tokenizer splits text by rules that are not GPT-2's, Qwen's or Llama 3's, "
            f"and llama.cpp could not repeat them: {json.dumps(splitter)}."
        )
    if (normalizer := parts["normalizer"]) and normalizer != {"type": "NFC"}:
        raise UserError(f"GGUF: llama.cpp cannot repeat the tokenizer's normalizer {normalizer}.")
    for added in parts["added_tokens"]:
        if added["lstrip"] or added["rstrip"] or added["single_word"]:
            raise UserError(f"GGUF: llama.cpp cannot strip around the token {added['content']!r}.")
    return name


def _special_tokens(
    tokenizer: PreTrainedTokenizerBase, ends: int | list[int] | None
) -> dict[str, Any]:
    """Return the ids of special tokens, and whether a prompt begins with one."""
    first, *others = ends if isinstance(ends, list) else [ends]
    if first is None:
        raise UserError("GGUF: the tokenizer has no eos_token, and llama.cpp would use token 11.")
    bare = tokenizer("a", add_special_tokens=False).input_ids
    whole, bos = tokenizer("a").input_ids, tokenizer.bos_token_id
    if whole not in (bare, [bos, *bare]):
        raise UserError(f"GGUF: the tokenizer turns {bare} into {whole}: only BOS can be added.")
    keys = {
        "eos_token_id": first,
        "bos_token_id": first if bos is None else bos,
        "add_bos_token": whole != bare,
    }
    if others:  # llama.cpp's other key for it; there is no third
        keys["eot_token_id"] = others[0]
    if others[1:]:
        logger.warning(f"GGUF: a file holds two ids that end a text: {others[1:]} are left out.")
    if tokenizer.pad_token_id is not None:
        keys["padding_token_id"] = tokenizer.pad_token_id
    return keys
