"""How well counting does: an n-gram model of the same text, to hold a trained model against.

Interpolated Witten-Bell smoothing (Witten & Bell 1991, "The zero-frequency problem"): after a
context that was seen N times, with T different characters, a share T / (N + T) of the probability
goes to the model with one character less of context. The last one gives each character the same.
"""

import math

import numpy as np

_MAX_ORDER = 7  # characters; longer contexts are too rare to help
_MAX_TRAINING = 4_000_000  # characters; the last ones, if there are more


def ngram_bits_per_byte(train: str, held_out: str) -> tuple[float, int]:
    """Return bits per UTF-8 byte of `held_out` after counting `train`, and the best order.

    The best order is chosen on the held-out text, which favours the n-gram model slightly. Returns
    `(inf, 0)` if either text is empty.
    """
    if not train or not held_out:
        return math.inf, 0
    ids, size = _number_characters(train[-_MAX_TRAINING:])
    tests = np.array([ids.get(character, size) for character in held_out])
    known = np.array([ids[character] for character in train[-_MAX_TRAINING:]])
    unknown = int((tests == size).sum())
    # A character that was never seen has one number, and costs its code point in addition.
    probability = np.full(len(tests), 1 / (size + 1))
    extra = unknown * math.log2(0x110000)
    best, best_order = math.inf, 0
    width = max(1, size.bit_length())
    for order in range(1, min(_MAX_ORDER, 63 // width) + 1):
        probability = _interpolate(known, tests, order, width, probability)
        bits = extra - float(np.log2(probability).sum())
        if bits < best:
            best, best_order = bits, order
    return best / len(held_out.encode("utf-8", "surrogatepass")), best_order


def _number_characters(text: str) -> tuple[dict[str, int], int]:
    ids = {character: number for number, character in enumerate(sorted(set(text)))}
    return ids, len(ids)


def _interpolate(
    known: np.ndarray, tests: np.ndarray, order: int, width: int, shorter: np.ndarray
) -> np.ndarray:
    """Return each test character's probability after its `order - 1` characters before it."""
    grams, counts = np.unique(_pack(known, order, width), return_counts=True)
    # The last `width` bits of a gram are its last character, the others the context.
    contexts, starts, types = np.unique(grams >> width, return_index=True, return_counts=True)
    totals = np.add.reduceat(counts, starts)
    asked = _pack(tests, order, width)
    seen = _look_up(grams, counts, asked)
    total, distinct = (_look_up(contexts, values, asked >> width) for values in (totals, types))
    longer = shorter.copy()  # the first characters have no full context
    mixed = (seen + distinct * shorter[order - 1 :]) / np.maximum(total + distinct, 1)
    longer[order - 1 :] = np.where(total > 0, mixed, shorter[order - 1 :])
    return longer


def _pack(ids: np.ndarray, order: int, width: int) -> np.ndarray:
    """Return every run of `order` ids as one integer of `order * width` bits."""
    packed = np.zeros(max(0, len(ids) - order + 1), dtype=np.int64)
    for position in range(order):
        packed = (packed << width) | ids[position : position + len(packed)]
    return packed


def _look_up(keys: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Return the value of each asked key, 0 where there is none; `keys` are sorted."""
    if not len(keys):
        return np.zeros(len(asked), dtype=np.int64)
    places = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[places] == asked, values[places], 0)
