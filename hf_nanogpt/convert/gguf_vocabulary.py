"""The tokenizer in a GGUF file: byte-level BPE as ours, GPT-2's, Qwen's and Llama 3's."""

import json
from typing import Any

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import UserError

# How text is split before the merges: what llama.cpp calls it. Its "gpt-2" is the expression that
# is built into ByteLevel; the others are a Split before it, by expression and `ignore_merges`.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    (None, False): "gpt-2",
    (_LLAMA3.replace("{1,3}", ""), False): "qwen2",
    (_LLAMA3, True): "llama-bpe",
}
# llama.cpp wants at least one merge; byte 255, twice, is in no UTF-8 text.
_NO_MERGES = ["ÿ ÿ"]
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase, *, vocab_size: int) -> dict[str, Any]:
    """Return the keys of a GGUF file that make llama.cpp encode and decode as the tokenizer does.

    Ids beyond the tokenizer's, up to the model's `vocab_size`, are marked as unused. Qwen's
    normalisation to composed characters (NFC) does not exist in llama.cpp: there the prompt must
    come composed.

    Raises:
        UserError: the tokenizer is no byte-level BPE, or one that llama.cpp would not repeat.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"GGUF: {type(tokenizer).__name__} has no tokenizer.json to be written.")
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    split = _name_split(parts)
    vocabulary = parts["model"]["vocab"] | {t["content"]: t["id"] for t in parts["added_tokens"]}
    if (size := max(vocabulary.values()) + 1) > vocab_size:
        raise UserError(f"GGUF: the tokenizer has {size} tokens, and vocab_size={vocab_size}.")
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    for token, i in vocabulary.items():
        tokens[i], types[i] = token, _NORMAL
    for added in parts["added_tokens"]:
        types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    keys = {
        "model": "gpt2",  # llama.cpp's word for byte-level BPE
        "pre": split,
        "tokens": tokens,
        "token_type": types,
        "merges": [" ".join(merge) for merge in parts["model"]["merges"]] or _NO_MERGES,
    }
    keys |= _special_tokens(tokenizer)
    more = {"tokenizer.chat_template": tokenizer.chat_template} if tokenizer.chat_template else {}
    return {f"tokenizer.ggml.{k}": v for k, v in keys.items()} | more


def _name_split(parts: dict[str, Any]) -> str:
    """Return llama.cpp's name for the way the tokenizer splits text, or say why it has none."""
    model, splitter = parts["model"], parts["pre_tokenizer"] or {}
    steps = splitter.get("pretokenizers", [splitter])
    last, before = steps[-1], steps[:-1]
    odd = [
        key
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
        if model.get(key)
    ]
    bytes_missing = set(pre_tokenizers.ByteLevel.alphabet()) - set(model["vocab"])
    if model["type"] != "BPE" or last.get("type") != "ByteLevel" or odd or bytes_missing:
        raise UserError(
            f"GGUF: the tokenizer ({model['type']}, {last.get('type')}) is no byte-level BPE, the "
            "only kind that can be written."
        )
    expressions = [step.get("pattern", {}).get("Regex") for step in before] or [None]
    name = _SPLITS.get((expressions[0], bool(model.get("ignore_merges"))))
    plain = all(s.get("behavior") == "Isolated" and not s["invert"] for s in before)
    whole = len(before) < 2 and plain and last["use_regex"] == (not before)
    if name is None or not whole or last["add_prefix_space"]:
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


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the ids of special tokens, and whether a prompt begins with one."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            "GGUF: the tokenizer has no eos_token, and llama.cpp would take token 11 for it."
        )
    bare = tokenizer("a", add_special_tokens=False).input_ids
    whole, bos = tokenizer("a").input_ids, tokenizer.bos_token_id
    if whole not in (bare, [bos, *bare]):
        raise UserError(f"GGUF: the tokenizer puts {whole} around {bare}: only BOS can be told.")
    keys = {
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.eos_token_id if bos is None else bos,
        "add_bos_token": whole != bare,
    }
    if tokenizer.pad_token_id is not None:
        keys["padding_token_id"] = tokenizer.pad_token_id
    return keys
