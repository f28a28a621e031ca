"""What fine-tuning costs in general ability: the loss on the text of the training before."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.loading import load_checkpoint
from ..data.documents import DataArguments, count_bytes, load_documents, take_characters
from ..data.sources import STDLIB
from ..errors import UserError
from ..evaluation import evaluate
from ..hub.publishable import publish_place, read_command
from ..untrusted import path_inside, read_json

_MOST = 100_000  # characters that are measured: a second or two


@dataclass(frozen=True)
class OldText:
    """The held-out text of an earlier training: its first documents, and what it was called."""

    name: str
    documents: Dataset
    settings: dict[str, Any]  # of `evaluate`


def find_old_text(start_from: str | Path) -> OldText | None:
    """Return the text that a checkpoint was validated on, if its folder names it and it is here.

    Only the library of Python and files of this machine are read, never an address, which somebody
    else may have written into the folder. They must have as many bytes as were measured then.
    """
    folder = Path(start_from)
    try:
        path = path_inside(folder, "metrics.json")
        metrics = read_json(path) if path.is_file() else {}
        flags = read_command(metrics["eval_command"])
        name, fraction = flags["data"], float(flags["held_out"])
        here = Path(name)
        if name != STDLIB and not (here.is_file() or here.is_dir()):
            return None
        column = flags.get("text_column", "text")
        args = DataArguments(data=name, validation_fraction=fraction, text_column=column)
        held_out = load_documents(args)[1]
        if not isinstance(held_out, Dataset) or count_bytes(held_out) != metrics["eval_bytes"]:
            return None
        length = int(flags["context_length"]) if "context_length" in flags else None
    except (UserError, KeyError, TypeError, ValueError, OSError):
        return None
    mask = "no_document_mask" not in flags
    settings = {"context_length": length, "document_mask": mask}
    return OldText(name, Dataset.from_list(list(take_characters(held_out, _MOST))), settings)


def measure_forgetting(
    old: OldText, start_from: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Return bits per byte of the old text, before and after."""
    start: Any
    start, own = load_checkpoint(start_from)
    before = evaluate(start.to(model.device), old.documents, tokenizer=own, **old.settings)
    after = evaluate(model, old.documents, tokenizer=tokenizer, **old.settings)
    return {
        "data": publish_place(old.name),
        "eval_bytes": after.num_bytes,
        "before": before.bits_per_byte,
        "after": after.bits_per_byte,
    }
