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


@dataclass
class LoraArguments:
    """Whether to train all weights or a LoRA adapter (Hu et al. 2021, arXiv:2106.09685)."""

    lora: bool = field(
        default=False, metadata={"help": "Train a LoRA adapter of --from, not all of its weights."}
    )
    lora_rank: int = field(default=8, metadata={"help": "Rank of what each matrix can change by."})
    lora_alpha: int = field(default=16, metadata={"help": "The change is scaled by alpha / rank."})

    def __post_init__(self):
        for name in ("lora_rank", "lora_alpha"):
            value = getattr(self, name)
            if value < 1:
                raise UserError(f"{name}={value} is not possible: give 1 or more.")
            if not self.lora and value != LoraArguments.__dataclass_fields__[name].default:
                raise UserError(f"{name}={value} has a meaning with --lora only: add it.")
        if self.lora:
            _check_peft()


def _check_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UserError("lora=True needs a package: pip install 'hf-nanogpt[finetune]'.") from error


def add_adapter(
    model: PreTrainedModel,
    args: LoraArguments,
    *,
    with_embeddings: bool = False,
    revision: str | None = None,
) -> torch.nn.Module:
    """Return the model with a new adapter, which alone is trainable and changes nothing yet.

    Args:
        with_embeddings: embedding and head are trained whole beside it, as new tokens need it.
        revision: of the model on the Hub, for whoever loads the adapter.
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
    """Return the model of a `PeftModel` with the adapter added in, kept as `output_dir/adapter`.

    The tokenizer beside it tells PEFT how many rows the embedding has to have below it.
    """
    run = Path(output_dir)
    if save:
        with explain_write_errors(run / "adapter", run=run), staged_folder(run) as folder:
            model.save_pretrained(folder / "adapter")
            tokenizer.save_pretrained(folder / "adapter")
    return model.merge_and_unload()


def describe_adapter(model: Any, args: LoraArguments) -> str | None:
    """Return what a LoRA training cannot be resumed without: its shape and the weights below."""
    if not args.lora:
        return None
    checksum = 0
    for tensor in model.state_dict().values():
        checksum = zlib.crc32(tensor.cpu().numpy().tobytes(), checksum)
    return f"rank {args.lora_rank}, alpha {args.lora_alpha}, of weights {checksum:08x}"
