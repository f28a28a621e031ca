"""LoRA (Hu et al. 2021, arXiv:2106.09685) through PEFT: train small matrices, then merge them."""

import warnings
import zlib
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.writing import explain_write_errors, staged_folder
from .arguments import NanoGPTTrainingArguments


def add_adapter(
    model: PreTrainedModel,
    args: NanoGPTTrainingArguments,
    *,
    with_embeddings: bool = False,
    revision: str | None = None,
) -> Any:
    """Return a PeftModel with a new adapter, which changes nothing yet; only it is trainable.

    Args:
        with_embeddings: train the whole embedding and head too, as new tokens need it.
        revision: the model's revision on the Hub, for whoever loads the adapter.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",  # all matrices but the output head
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        modules_to_save=["embed_tokens", "lm_head"] if with_embeddings else None,
        revision=revision,
        ensure_weight_tying=with_embeddings and model.config.tie_word_embeddings,
    )
    with warnings.catch_warnings():  # PEFT asks for something by its former name
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, config)


def merge_adapter(
    model: Any, tokenizer: PreTrainedTokenizerBase, output_dir: str | Path, *, save: bool
) -> PreTrainedModel:
    """Return the model with its adapter merged in; save the adapter as `output_dir/adapter`.

    The tokenizer saved with it tells PEFT how many rows the embedding of the base model needs.
    """
    run = Path(output_dir)
    if save:
        with explain_write_errors(run / "adapter", run=run), staged_folder(run) as folder:
            model.save_pretrained(folder / "adapter")
            tokenizer.save_pretrained(folder / "adapter")
    return model.merge_and_unload()


def describe_adapter(model: Any, args: NanoGPTTrainingArguments) -> str | None:
    """Return what a resumed LoRA training must have in common: its shape and the base weights."""
    if not args.lora:
        return None
    checksum = 0
    for tensor in model.state_dict().values():
        checksum = zlib.crc32(tensor.cpu().numpy().tobytes(), checksum)
    return f"rank {args.lora_rank}, alpha {args.lora_alpha}, of weights {checksum:08x}"
