"""The tokenizer in a GGUF file: byte-level BPE as ours, GPT-2's, Llama 3's, Qwen's and SmolLM's."""

import json
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils import logging

from ..errors import UserError

logger = logging.get_logger(__name__)

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")
_ISOLATED = {"type": "Split", "behavior": "Isolated", "invert": False}
# llama.cpp's names for how text is split before the merges. The columns are the steps before
# ByteLevel, whether ByteLevel then splits by GPT-2's expression, and the model's `ignore_merges`.
_SPLITS: tuple[tuple[list, bool, bool, str], ...] = (
    ([], True, False, "gpt-2"),
    ([{"type": "Digits", "individual_digits": True}], True, False, "smollm"),
    ([_ISOLATED | {"pattern": {"Regex": QWEN_SPLIT}}], False, False, "qwen2"),
    ([_ISOLATED | {"pattern": {"Regex": LLAMA3_SPLIT}}], False, True, "llama-bpe"),
)
# Bytes that only control characters and unassigned ones have, or no text in UTF-8 at all.
RARE_BYTES = {*range(32), 0x7F, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)} - {*b"\t\n\r"}
_NO_MERGES = ["ÿ ÿ"]  # llama.cpp wants at least one; byte 255, twice, is in no UTF-8 text
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def describe_tokenizer(
    tokenizer: PreTrainedTokenizerBase, *, vocab_size: int, ends: int | list[int] | None = None
) -> dict[str, Any]:
    """Return the keys of a GGUF file that make llama.cpp encode and decode as the tokenizer does.

    Ids from the tokenizer's end to the model's `vocab_size` are marked as unused. llama.cpp cannot
    normalise text to composed characters (NFC) as Qwen's tokenizer does: there the prompt must be
    composed already. Both leave out a control character that the vocabulary lacks (SmolLM2's lacks
    six), but may merge what stands around it differently. A text ends at `ends`, by default at the
    tokenizer's eos.

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
    special = _special_tokens(tokenizer, tokenizer.eos_token_id if ends is None else ends)
    for name, token in special.items():
        if name.endswith("_token_id") and token >= vocab_size:
            raise UserError(
                f"GGUF: {name}={token} is outside the vocabulary of {vocab_size} tokens."
            )
    keys |= special
    return {f"tokenizer.ggml.{k}": v for k, v in keys.items()} | _chat_templates(tokenizer)


def _name_split(parts: dict[str, Any]) -> str:
    """Return llama.cpp's name for how the tokenizer splits text; refuse what it cannot repeat."""
    model, splitter = parts["model"], parts["pre_tokenizer"] or {}
    *before, last = splitter.get("pretokenizers", [splitter])
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if (
        model["type"] != "BPE"
        or last.get("type") != "ByteLevel"
        or any(model.get(option) for option in options)
    ):
        raise UserError(
            f"GGUF: the tokenizer ({model['type']}, {last.get('type')}) is not a byte-level BPE, "
            "and only those can be written."
        )
    symbols = bytes_to_unicode()
    missing = [f"0x{i:02X}" for i in {*range(256)} - RARE_BYTES if symbols[i] not in model["vocab"]]
    if missing:
        raise UserError(
            f"GGUF: the tokenizer has no token for the bytes {', '.join(missing[:5])}, and "
            "llama.cpp would encode text with them differently."
        )

    rules = before, last["use_regex"], bool(model.get("ignore_merges"))
    name = next((name for *known, name in _SPLITS if tuple(known) == rules), None)
    if name is None or last["add_prefix_space"]:
        raise UserError(
            "GGUF: the tokenizer splits text by rules that are not GPT-2's, Llama 3's, Qwen's or "
            f"SmolLM's, and llama.cpp could not repeat them: {json.dumps(splitter)}."
        )
    if (normalizer := parts["normalizer"]) and normalizer != {"type": "NFC"}:
        raise UserError(f"GGUF: llama.cpp cannot repeat the tokenizer's normalizer {normalizer}.")
    for added in parts["added_tokens"]:
        if added["lstrip"] or added["rstrip"] or added["single_word"]:
            raise UserError(f"GGUF: llama.cpp cannot strip around the token {added['content']!r}.")
    return name


def _chat_templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the chat template; of several, `default` is the one that llama.cpp uses by itself."""
    templates = tokenizer.chat_template or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    others = {name: text for name, text in templates.items() if name != "default"}
    keys: dict[str, Any] = {f"tokenizer.chat_template.{k}": text for k, text in others.items()}
    if others:
        keys["tokenizer.chat_templates"] = list(others)
    if "default" in templates:
        keys["tokenizer.chat_template"] = templates["default"]
    return keys


def _special_tokens(
    tokenizer: PreTrainedTokenizerBase, ends: int | list[int] | None
) -> dict[str, Any]:
    """Return the ids of special tokens, and whether a prompt begins with one."""
    if ends is None or ends == []:
        raise UserError(
            f"GGUF: there is no eos_token_id ({ends}) to end a text, and llama.cpp would use token "
            "11: set it in generation_config.json."
        )
    first, *others = dict.fromkeys(ends) if isinstance(ends, list) else [ends]
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
