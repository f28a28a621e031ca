"""LoRA through PEFT: small trainable matrices beside a model's frozen ones, merged at the end."""

import warnings
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.folder import explain_write_errors, staged_folder
from ..errors import UserError


def setting(default: Any, help: str) -> Any:
    """Return the field of a setting, with its help text."""
    return field(default=default, metadata={"help": help})


def check_at_least(minimum: int, settings: Any, *names: str) -> None:
    """Raise a `UserError` if one of the named settings is below the minimum; None is allowed."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < minimum:
            raise UserError(f"{name}={value} must be a whole number, at least {minimum}.")


@dataclass
class LoraArguments:
    """Whether to train all weights or a LoRA adapter (Hu et al. 2021, arXiv:2106.09685)."""

    lora: bool = setting(
        False, "Train a LoRA adapter for the model of --from, not all its weights."
    )
    lora_rank: int = setting(8, "Rank of the adapter's matrices.")
    lora_alpha: int = setting(16, "The adapter's output is scaled by alpha / rank.")

    def __post_init__(self):
        check_at_least(1, self, "lora_rank", "lora_alpha")
        for name in ("lora_rank", "lora_alpha"):
            value, default = getattr(self, name), LoraArguments.__dataclass_fields__[name].default
            if value != default and not self.lora:
                raise UserError(f"{name}={value} has no effect without --lora: add it.")
        if self.lora:
            try:
                import peft  # noqa: F401
            except ImportError as error:
                raise UserError(
                    "lora=True needs a package: pip install 'hf-nanogpt[finetune]'."
                ) from error


def add_adapter(
    model: PreTrainedModel,
    args: LoraArguments,
    *,
    with_embeddings: bool = False,
    revision: str | None = None,
) -> torch.nn.Module:
    """Return the model with a new adapter, which changes nothing yet; only it is trainable.

    Args:
        with_embeddings: train the whole embedding and head too, as new tokens need it.
        revision: the model's revision on the Hub, for whoever loads the adapter.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
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


def describe_adapter(model: Any, args: LoraArguments) -> str | None:
    """Return what a resumed LoRA training must have in common: its shape and the base weights."""
    if not args.lora:
        return None
    checksum = 0
    for tensor in model.state_dict().values():
        checksum = zlib.crc32(tensor.cpu().numpy().tobytes(), checksum)
    return f"rank {args.lora_rank}, alpha {args.lora_alpha}, of weights {checksum:08x}"
