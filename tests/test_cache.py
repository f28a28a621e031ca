"""Caches: whatever is remembered, the logits and the generated tokens are those without a cache."""

import copy

import pytest
import torch
from conftest import cache_of, tiny_model
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

LENGTH = 20


def make_cache(kind, config):
    if kind == "static":
        return StaticCache(config=config, max_cache_len=LENGTH)
    return DynamicCache(config=config)


@torch.no_grad()
def in_chunks(model, ids, sizes, cache, *, with_positions=False):
    """Return the logits of `ids` fed in pieces, each reading what the cache holds of the others."""
    pieces, start = [], 0
    for piece in ids.split(sizes, dim=1):
        stop = start + piece.shape[1]
        given = {"position_ids": torch.arange(start, stop)[None]} if with_positions else {}
        pieces.append(model(piece, past_key_values=cache, **given).logits)
        start = stop
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("sizes", [[1] * 20, [12, 8], [2, 9, 1, 8]], ids=["ones", "two", "four"])
def test_cached_logits_equal_uncached(family, kind, sizes, tokens):
    model = tiny_model(family)
    cached = in_chunks(model, tokens, sizes, make_cache(kind, model.config))
    with torch.no_grad():
        uncached = model(tokens, use_cache=False)
    assert cache_of(uncached) is None
    torch.testing.assert_close(cached, uncached.logits, rtol=0, atol=1e-5)


def test_position_ids_default_to_the_cached_length(family, tokens):
    model = tiny_model(family)
    default = in_chunks(model, tokens, [12, 8], DynamicCache(config=model.config))
    given = in_chunks(
        model, tokens, [12, 8], DynamicCache(config=model.config), with_positions=True
    )
    assert torch.equal(default, given)


def test_model_makes_its_own_cache(tokens):
    model = tiny_model("gpt3")
    cache = cache_of(model(tokens))
    assert isinstance(cache, DynamicCache)
    assert cache.get_seq_length() == LENGTH


def test_sliding_layer_remembers_only_its_window(tokens):
    model = tiny_model("gpt3")
    window, kinds = model.config.sliding_window, model.config.layer_types
    cache = cache_of(model(tokens))
    model(tokens[:, :1], past_key_values=cache)
    kept = [layer.keys.shape[-2] for layer in cache.layers]
    assert window < LENGTH
    assert kept == [LENGTH + 1 if kind == "full_attention" else window - 1 for kind in kinds]


def test_grouped_cache_holds_only_the_key_value_heads(tokens):
    model = tiny_model("llama")
    keys = cache_of(model(tokens)).layers[0].keys
    assert keys.shape == (2, model.config.num_key_value_heads, LENGTH, model.config.head_dim)


def test_greedy_token_is_the_largest_logit(family, tokens):
    model = tiny_model(family, eos_token_id=None)
    ids = tokens
    with torch.no_grad():
        for _ in range(5):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    mask = torch.ones_like(tokens)
    assert torch.equal(
        model.generate(tokens, attention_mask=mask, max_new_tokens=5, do_sample=False), ids
    )


def test_generate_uses_the_cache_of_transformers():
    for family, kinds in (
        ("nano", {DynamicLayer}),
        ("gpt3", {DynamicLayer, DynamicSlidingWindowLayer}),
    ):
        given = {"max_new_tokens": 2, "return_dict_in_generate": True}
        output = tiny_model(family).generate(torch.tensor([[5, 6]]), **given)
        assert {type(layer) for layer in cache_of(output).layers} == kinds


def test_shallow_copies_of_a_cache_layer_go_separate_ways(tokens):
    model = tiny_model("nano")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        in_chunks(model, tokens[:, :12], [10, 2], cache)
        branch = copy.copy(cache)
        branch.layers = [copy.copy(layer) for layer in cache.layers]
        model(tokens[:, :4], past_key_values=branch)
        rest = model(tokens[:, 12:], past_key_values=cache).logits
        expected = model(tokens, use_cache=False).logits[:, 12:]
    torch.testing.assert_close(rest, expected, rtol=0, atol=1e-5)


def test_copies_of_a_cache_go_separate_ways(tokens):
    model = tiny_model("nano")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        in_chunks(model, tokens[:, :12], [10, 1, 1], cache)
        other = copy.deepcopy(cache)
        model(tokens[:, :4], past_key_values=other)
        rest = model(tokens[:, 12:], past_key_values=cache).logits
        expected = model(tokens, use_cache=False).logits[:, 12:]
    torch.testing.assert_close(rest, expected, rtol=0, atol=1e-5)
