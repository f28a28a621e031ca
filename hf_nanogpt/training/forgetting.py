"""What fine-tuning costs in general ability: the loss on the text of the training before.

The folder of a checkpoint may be published, so it holds only the name of a text. Where that lies on
this machine is kept in the cache folder of Hugging Face.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub.constants import HF_HOME
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..analysis.plots import replace_file
from ..checkpoint.loading import load_checkpoint
from ..data.documents import DataArguments, count_bytes, load_documents, take_characters
from ..data.sources import STDLIB
from ..errors import UserError
from ..evaluation import evaluate
from ..hub.publishable import publish_place, read_command
from ..untrusted import path_inside, read_json
from .callbacks import warn_if_unwritable

_MOST = 100_000  # characters that are measured: a second or two
_PLACES = Path(HF_HOME) / "hf_nanogpt" / "texts.json"


@dataclass(frozen=True)
class OldText:
    """The held-out text of an earlier training: what it is called, where it is, what it says."""

    name: str
    place: str  # a full path, or the library of Python
    documents: Dataset
    settings: dict[str, Any]  # of `evaluate`


def find_old_text(start_from: str | Path) -> OldText | None:
    """Return the text that a checkpoint was validated on, if its folder names it and it is here.

    Only the library of Python and files of this machine are read, never an address, which somebody
    else may have written into the folder. They must have as many bytes as were measured then. They
    are where a training on this machine has found them, or under their name.
    """
    folder = Path(start_from)
    try:
        path = path_inside(folder, "metrics.json")
        metrics = read_json(path) if path.is_file() else {}
        flags = read_command(metrics["eval_command"])
        name, fraction = flags["data"], float(flags["held_out"])
        known = _read_places().get(_identify(name, metrics["eval_bytes"]), name)
        if (place := find_place(known) or find_place(name)) is None:
            return None
        column = flags.get("text_column", "text")
        args = DataArguments(data=place, validation_fraction=fraction, text_column=column)
        held_out = load_documents(args)[1]
        if not isinstance(held_out, Dataset) or count_bytes(held_out) != metrics["eval_bytes"]:
            return None
        length = int(flags["context_length"]) if "context_length" in flags else None
    except (UserError, KeyError, TypeError, ValueError, OSError):
        return None
    mask = "no_document_mask" not in flags
    settings = {"context_length": length, "document_mask": mask}
    documents = Dataset.from_list(list(take_characters(held_out, _MOST)))
    return OldText(name, place, documents, settings)


def find_place(data: str) -> str | None:
    """Return the full path of a text that is on this machine, or None; Python's library is itself.

    An address, which somebody else may have written, is not on this machine.
    """
    path = Path(data).expanduser()
    is_here = os.path.exists(path)  # Path.exists raises where permissions forbid a look
    return data if data == STDLIB else str(path.resolve()) if is_here else None


def remember_place(data: str, metrics: dict[str, Any]) -> None:
    """Keep where a text that was measured lies, so that `find_old_text` finds it from elsewhere."""
    if data == STDLIB or (place := find_place(data)) is None:
        return
    places = _read_places() | {_identify(publish_place(data), metrics["eval_bytes"]): place}
    with warn_if_unwritable(str(_PLACES)):
        replace_file(_PLACES, (json.dumps(places, indent=2) + "\n").encode())


def _identify(name: str, num_bytes: int) -> str:
    return f"{name}, {num_bytes} bytes held out"


def _read_places() -> dict[str, str]:
    try:
        return read_json(_PLACES) if _PLACES.is_file() else {}
    except (UserError, OSError):  # damaged, or in a folder that may not be read
        return {}


def tell_forgetting(trainer: Any, start_from: str | Path, data: str) -> dict[str, Any]:
    """Return what a training on `data` cost on the text before, as metrics; none if it is gone."""
    old = find_old_text(start_from)
    if old is None or old.place == find_place(data):
        return {}
    tokenizer = trainer.processing_class
    return {"old_text": measure_forgetting(old, start_from, trainer.model, tokenizer)}


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
