"""What `xz -9` needs for the text that the quickstart model is measured on.

A compressor that has read nothing pays for words that a trained model knows, so each row also tells
what it needs where training text comes first: none, as much as the model trained on, or all of it.

Run: python benchmarks/xz.py (half a minute; needs the Python version of the card for equal text)
"""

import json
import lzma
from pathlib import Path

from results_file import write_results

from hf_nanogpt import DataArguments, load_documents
from hf_nanogpt.data.sources import STDLIB

CARD = Path(__file__).parent.parent / "model_cards/quickstart/metrics.json"


def measure(training: bytes, unseen: bytes, read: int) -> dict[str, float]:
    """Return the bits that each byte of `unseen` adds after the first bytes of `training`."""
    first = training[:read]
    added = len(lzma.compress(first + unseen, preset=9)) - len(lzma.compress(first, preset=9))
    return {"bytes_first": len(first), "bits_per_byte": 8 * added / len(unseen)}


if __name__ == "__main__":
    card = json.loads(CARD.read_text(encoding="utf-8"))
    sides = load_documents(DataArguments(data=STDLIB, validation_fraction=0.03))
    training, unseen = ("".join(row["text"] for row in side).encode() for side in sides)
    if len(unseen) != card["eval_bytes"]:
        raise SystemExit(f"The card's text has {card['eval_bytes']} bytes, this {len(unseen)}.")
    trained_on = round(card["train_tokens"] * card["eval_bytes"] / card["eval_tokens"])
    rows = [measure(training, unseen, read) for read in (0, trained_on, len(training))]
    write_results("xz", {"rows": rows})
