"""What a training needs before its first step: data, tokenizer, model and the blocks to learn."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..checkpoint.loading import load_checkpoint
from ..configuration_nanogpt import NanoGPTConfig
from ..cpu_kernels import use_cpu_kernels
from ..data.conversations import fit_model
from ..data.corpus import Corpus, tokenize_sides
from ..data.documents import DataArguments
from ..data.encoding import count_ids, is_learnt
from ..data.packing import PackedBlocks, PackedStream, cut_blocks
from ..errors import UserError, without_secrets
from ..evaluation import check_context_length
from ..modeling_nanogpt import NanoGPTForCausalLM
from ..presets import load_preset
from .arguments import LONGEST, NanoGPTTrainingArguments

Blocks: TypeAlias = PackedBlocks | PackedStream


@dataclass(frozen=True)
class Start:
    """The checkpoint that training continues from; `num_tokens` is the size of its vocabulary."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    num_tokens: int


def load_start(checkpoint: str | Path, architecture: dict[str, Any]) -> Start:
    """Load the checkpoint that training continues from, in float32, as the optimizer needs it."""
    if architecture:
        raise UserError(
            f"{checkpoint} has its own architecture, so {', '.join(architecture)} cannot be set: "
            "leave it out, and use a recipe without it, such as finetune."
        )
    model, tokenizer = load_checkpoint(checkpoint)
    if (model_type := model.config.model_type) != NanoGPTConfig.model_type:
        raise UserError(
            f"{checkpoint} is a model of type {model_type!r}: convert it first by hf-nanogpt "
            f"convert {checkpoint} FOLDER, then train --from FOLDER."
        )
    if tokenizer is None or tokenizer.eos_token_id is None:
        raise UserError(f"{checkpoint} has no tokenizer with an eos_token to end documents with.")
    return Start(model.float().train(), tokenizer, len(tokenizer))


def prepare_config(
    architecture: dict[str, Any], data_args: DataArguments, start: Start | None
) -> tuple[NanoGPTConfig, int]:
    """Return the configuration of the model to train, and the length of its blocks in tokens.

    The blocks are as long as the context; of a model to start from, at most `LONGEST` tokens. An
    impossible architecture is refused here, not after minutes of preparing data for it.
    `prepare_model` completes a new configuration by what only the tokenizer knows.
    """
    length = data_args.context_length
    if start:
        config = cast(NanoGPTConfig, start.model.config)
        if length is None:  # few machines can train the whole context of a large model
            length = min(config.max_position_embeddings, LONGEST)
    else:
        config = make_config(architecture, vocab_size=data_args.vocab_size)
    return config, check_context_length(config, length)


def make_config(architecture: dict[str, Any], **fields: Any) -> NanoGPTConfig:
    """Return the configuration of parsed architecture settings, with `fields` added."""
    overrides = {name: value for name, value in architecture.items() if name != "preset"}
    return load_preset(architecture.get("preset", "nano"), **overrides, **fields)


def prepare_model(
    config: NanoGPTConfig,
    data_args: DataArguments,
    args: NanoGPTTrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    start: Start | None,
) -> PreTrainedModel:
    """Return a new model for the tokenizer's vocabulary, or the one that training continues from.

    With a chat template, its `generate()` stops at the end of a message.
    """
    # `known` is how many tokens of the tokenizer the model has rows for.
    if start:
        model, known = start.model, start.num_tokens
    else:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        special = {name: getattr(tokenizer, name) for name in names}
        config.update({"vocab_size": count_ids(tokenizer)} | special)
        set_seed(args.seed)
        model, known = NanoGPTForCausalLM(config), len(tokenizer)
    # The chat template may have added tokens to the tokenizer of a checkpoint.
    if data_args.chat_template:
        fit_model(model, tokenizer, known=known)
    use_cpu_kernels(model)
    return model


def prepare_blocks(
    data_args: DataArguments,
    args: NanoGPTTrainingArguments,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
) -> tuple[Blocks, Blocks]:
    """Tokenise the corpus, and cut it into the blocks to train and to validate on.

    Blocks of fewer than `min_train_tokens` tokens raise the passes over them, `num_train_epochs`.

    Raises:
        UserError: nothing can be learnt from the blocks, or they never end.
    """
    train, validation = tokenize_sides(data_args, corpus, tokenizer)
    # The seed shuffles a stream; blocks on disk are shuffled by Trainer, and cut by the seed.
    seed = args.seed if args.data_seed is None else args.data_seed
    cut: dict[str, Any] = {"context_length": length, "eos_token_id": tokenizer.eos_token_id}
    blocks = cut_blocks(train, seed=seed, **cut)
    # Refuse blocks from which nothing can be learnt, and a training without an end.
    if isinstance(blocks, PackedStream):
        if args.max_steps <= 0:
            raise UserError(f"max_steps={args.max_steps}: a stream has no end, so give max_steps.")
    elif len(blocks) == 1 and (tokens := len(blocks[0]["input_ids"])) < length:
        raise UserError(
            f"The training text has {tokens} tokens, fewer than one block of context_length="
            f"{length}: give more text, or a smaller block_size or context_length."
        )
    elif not _have_targets(blocks):
        raise UserError(
            "The training data has no message of the assistant, so there is nothing to learn."
        )
    elif _repeats_one_token(blocks, tokenizer.eos_token_id):
        raise UserError(
            f"data={without_secrets(data_args.data)} is one character or token over and over, so "
            "there is nothing to learn: give other text."
        )
    if isinstance(blocks, PackedBlocks) and args.max_steps <= 0:
        passes = math.ceil(args.min_train_tokens / (blocks.num_tokens - blocks.num_padding))
        args.num_train_epochs = max(args.num_train_epochs, passes)
    held_out = cut_blocks(validation, **cut)
    held_out.num_bytes = corpus.num_bytes
    if not _have_targets(held_out):
        raise UserError(
            "The validation data has no text, or no message of the assistant, so there is nothing "
            "to measure: give other validation_data, or hold out more."
        )
    return blocks, held_out


def _have_targets(blocks: Blocks) -> bool:
    """Say whether there is a token to predict; nothing predicts the first one of a block."""
    return any(is_learnt(block["input_ids"])[1:].any() for block in iter(blocks))


def _repeats_one_token(blocks: PackedBlocks, eos_token_id: int | None) -> bool:
    """Say whether all tokens but those between documents are the same."""
    seen: set[int] = set()
    for block in iter(blocks):
        seen.update(np.unique(block["input_ids"]).tolist())
        if len(seen - {eos_token_id}) > 1:
            return False
    return True
