"""What counting letters does on the same text: a figure to hold the trained model against."""

from typing import Any

from datasets import Dataset

from ..analysis.ngram import ngram_bits_per_byte
from ..data.corpus import Corpus
from ..data.documents import take_characters

# Characters, from the start of each side. Counting takes about a second per million.
_COUNTED, _MEASURED = 2_000_000, 400_000


def measure_ngram(corpus: Corpus) -> dict[str, Any] | None:
    """Return bits per byte and order of the best n-gram model of a text; None if it is not text.

    Conversations, streams and stored tokens are not counted.
    """
    sides = []
    for documents, most in ((corpus.train, _COUNTED), (corpus.validation, _MEASURED)):
        if not isinstance(documents, Dataset) or "text" not in documents.column_names:
            return None
        sides.append("".join(row["text"] for row in take_characters(documents, most)))
    bits, order = ngram_bits_per_byte(*sides)
    counted, measured = map(len, sides)
    figures = {"bits_per_byte": bits, "order": order}
    return figures | {"counted_characters": counted, "measured_characters": measured}
