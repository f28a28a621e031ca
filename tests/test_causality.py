"""Who may see whom: the past only, the window only, one's own document only, never the padding.

Flex attention is compiled by default, which takes half a minute here; `force_eager` runs the same
masks and scores as plain tensor code.
"""

import contextlib

import pytest
import torch
from conftest import cache_of, tiny_model
from torch import nn

KERNELS = ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)]


@pytest.fixture(params=KERNELS)
def kernel(request):
    flex = request.param == "flex_attention"
    stance = torch.compiler.set_stance("force_eager") if flex else contextlib.nullcontext()
    with torch.no_grad(), stance:
        yield request.param


def logits_of(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, use_cache=False, **kwargs).logits


def with_token(ids, position, shift=7):
    """Return `ids` with the token at `position` exchanged for another one."""
    ids = ids.clone()
    ids[:, position] = (ids[:, position] + shift) % 61
    return ids


def test_last_token_changes_no_earlier_logit(family, kernel, tokens):
    model = tiny_model(family, attn_implementation=kernel)
    change = logits_of(model, with_token(tokens, -1)) - logits_of(model, tokens)
    assert change[:, :-1].abs().max() == 0.0
    assert change[:, -1].abs().max() > 0.01


def test_last_token_changes_no_earlier_logit_with_cache(family, kernel, tokens):
    model = tiny_model(family, attn_implementation=kernel)

    def steps(ids):
        prefill = model(ids[:, :12], use_cache=True)
        return model(ids[:, 12:], past_key_values=cache_of(prefill)).logits

    change = steps(with_token(tokens, -1)) - steps(tokens)
    assert change[:, :-1].abs().max() == 0.0
    assert change[:, -1].abs().max() > 0.01


def test_loss_gradient_reaches_no_future_embedding(family, tokens):
    model = tiny_model(family)
    embeds = model.get_input_embeddings()(tokens).detach().requires_grad_()
    model(inputs_embeds=embeds, use_cache=False).logits[:, 8].sum().backward()
    assert embeds.grad[:, 9:].abs().max() == 0.0
    assert embeds.grad[:, :9].abs().amax(-1).min() > 0.0


def test_decoder_with_unmasked_memory_leaks(tokens):
    # The tutorial's mistake: the inputs serve as memory too, and only self-attention is masked.
    torch.manual_seed(0)
    embed, layer = nn.Embedding(61, 32), nn.TransformerDecoderLayer(32, 4, batch_first=True)
    decoder, head = nn.TransformerDecoder(layer, 2).eval(), nn.Linear(32, 61)
    mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])

    def logits(ids):
        with torch.no_grad():
            return head(decoder(embed(ids), embed(ids), tgt_mask=mask, tgt_is_causal=True))

    change = logits(with_token(tokens, -1)) - logits(tokens)
    assert change[:, :-1].abs().max() > 0.01


def test_kernels_agree(family, kernel, tokens):
    reference = logits_of(tiny_model(family, attn_implementation="eager"), tokens)
    model = tiny_model(family, attn_implementation=kernel)
    assert model.config._attn_implementation == kernel
    torch.testing.assert_close(logits_of(model, tokens), reference, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 3])
def test_sliding_layers_see_their_window_and_nothing_before(layers, kernel, tokens):
    window, t = 4, 19
    model = tiny_model(
        "nano", n_layer=layers, sliding_window=window, attn_implementation=kernel
    )  # each layer looks window - 1 positions back
    reach = layers * (window - 1)
    before, first = with_token(tokens, t - reach - 1), with_token(tokens, t - reach)
    logits = logits_of(model, tokens)
    assert torch.equal(logits_of(model, before)[:, t], logits[:, t])
    assert (logits_of(model, first)[:, t] - logits[:, t]).abs().max() > 1e-4
    full = tiny_model("nano", n_layer=layers, attn_implementation=kernel)
    assert (logits_of(full, before) - logits_of(full, tokens))[:, t].abs().max() > 1e-4


def test_sliding_window_as_long_as_the_text_is_full_attention(tokens):
    full = logits_of(tiny_model("nano"), tokens)
    wide = logits_of(tiny_model("nano", sliding_window=20), tokens)
    torch.testing.assert_close(wide, full, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_grouped_queries_equal_repeated_key_value_heads(family, kernel, tokens):
    grouped = tiny_model(family, attn_implementation=kernel)
    heads, groups = grouped.config.num_attention_heads, grouped.config.num_key_value_heads
    assert groups < heads
    plain = tiny_model(family, attn_implementation=kernel, num_key_value_heads=heads)
    state = grouped.state_dict()
    for name in [n for n in state if "k_proj" in n or "v_proj" in n]:
        by_head = state[name].unflatten(0, (groups, -1))
        state[name] = by_head.repeat_interleave(heads // groups, dim=0).flatten(0, 1)
    plain.load_state_dict(state)
    torch.testing.assert_close(
        logits_of(plain, tokens), logits_of(grouped, tokens), rtol=0, atol=1e-5
    )


def test_packed_documents_equal_each_alone(family, kernel, tokens):
    model = tiny_model(family, attn_implementation=kernel)
    documents = torch.split(tokens[:1], [7, 1, 9, 3], dim=1)
    position_ids = torch.cat([torch.arange(doc.shape[1]) for doc in documents])[None]
    packed = logits_of(model, tokens[:1], attention_mask=None, position_ids=position_ids)
    alone = torch.cat([logits_of(model, doc) for doc in documents], dim=1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)
    assert (logits_of(model, tokens[:1]) - alone).abs().max() > 0.01  # what packing prevents


def test_rows_packed_differently_in_one_batch_equal_each_alone(family, tokens):
    model = tiny_model(family)
    cuts = [[12, 8], [5, 15]]
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in cuts])
    packed = logits_of(model, tokens, position_ids=position_ids)
    for row, (first, _) in enumerate(cuts):
        ids = tokens[row : row + 1]
        alone = [logits_of(model, ids[:, :first]), logits_of(model, ids[:, first:])]
        torch.testing.assert_close(packed[row], torch.cat(alone, 1)[0], rtol=0, atol=1e-5)


def left_padded(tokens, lengths):
    """Return ids, mask and positions of a batch whose row i keeps its last `lengths[i]` tokens."""
    mask = torch.stack([torch.arange(tokens.shape[1]) >= tokens.shape[1] - n for n in lengths])
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return {"ids": tokens * mask, "attention_mask": mask.long(), "position_ids": positions}


def test_left_padded_row_equals_the_row_alone(family, kernel, tokens):
    model = tiny_model(family, attn_implementation=kernel)
    lengths = [20, 13]
    batch = logits_of(model, **left_padded(tokens, lengths))
    for row, length in enumerate(lengths):
        alone = logits_of(model, tokens[row : row + 1, -length:])[0]
        torch.testing.assert_close(batch[row, -length:], alone, rtol=0, atol=1e-5)


def test_left_padded_row_generates_what_it_generates_alone(family, tokens):
    model = tiny_model(family, eos_token_id=None)
    padded = left_padded(tokens, [20, 13])
    batch = model.generate(
        padded["ids"], attention_mask=padded["attention_mask"], max_new_tokens=8, do_sample=False
    )
    for row, length in enumerate([20, 13]):
        ids = tokens[row : row + 1, -length:]
        alone = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
        )
        assert batch[row, -8:].tolist() == alone[0, -8:].tolist()


def test_mask_of_ones_equals_none(family, kernel, tokens):
    model = tiny_model(family, attn_implementation=kernel)
    masked = logits_of(model, tokens, attention_mask=torch.ones_like(tokens))
    torch.testing.assert_close(masked, logits_of(model, tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_mask_of_four_dimensions_is_used_as_given(kernel, tokens):
    model = tiny_model("nano", attn_implementation=kernel)
    allowed = torch.ones(20, 20, dtype=torch.bool).tril().triu(-2)  # a window of 3
    mask = allowed[None, None].expand(2, 1, -1, -1)
    if kernel == "eager":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float).min)
    windowed = logits_of(tiny_model("nano", sliding_window=3), tokens)
    given = logits_of(model, tokens, attention_mask=mask)
    torch.testing.assert_close(given, windowed, rtol=0, atol=1e-5)
