"""The n-gram model that a trained model is held against, checked by counting with dictionaries."""

import math
from collections import Counter, defaultdict

import pytest

from hf_nanogpt.analysis.ngram import ngram_bits_per_byte

TRAIN = "the cat sat on the mat and the rat sat on the hat; " * 3
HELD_OUT = "the rat and the cat sat on a mat"


def count_bits(train: str, held_out: str, order: int) -> float:
    """Return the bits of `held_out` by the definition of Witten and Bell, one character a time."""
    after: dict[str, Counter] = defaultdict(Counter)
    for end in range(len(train)):
        for length in range(min(order, end + 1)):
            after[train[end - length : end]][train[end]] += 1

    def probability(context: str, character: str) -> float:
        seen = after[context]
        shorter = probability(context[1:], character) if context else 1 / (len(set(train)) + 1)
        if not seen:
            return shorter
        return (seen[character] + len(seen) * shorter) / (seen.total() + len(seen))

    return -sum(
        math.log2(probability(held_out[max(0, i - order + 1) : i], held_out[i]))
        for i in range(len(held_out))
    )


def test_bits_are_those_of_counting_by_hand():
    bits, order = ngram_bits_per_byte(TRAIN, HELD_OUT)
    by_order = [count_bits(TRAIN, HELD_OUT, n) for n in range(1, 8)]
    assert order == by_order.index(min(by_order)) + 1
    assert bits * len(HELD_OUT) == pytest.approx(min(by_order), rel=1e-9)


def test_bits_are_per_byte_and_an_unknown_character_costs_its_code_point():
    train, held_out = "äöü" * 40, "äöü" * 5
    assert ngram_bits_per_byte(train, held_out)[0] < 0.2
    unknown, _ = ngram_bits_per_byte(train, "我")
    assert unknown * 3 > math.log2(0x110000)


@pytest.mark.parametrize(("train", "held_out"), [("", "a"), ("a", ""), ("", "")])
def test_nothing_counted_has_no_figure(train, held_out):
    assert ngram_bits_per_byte(train, held_out) == (math.inf, 0)
