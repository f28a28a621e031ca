"""Packed documents by flash attention, as far as a CPU can tell: all but the kernel is real.

In place of the kernel stands what it computes: attention of each document by itself, by PyTorch's
sdpa. What the model and transformers tell the kernel decides the result.
"""

import pytest
import torch
from conftest import tiny_model
from torch.nn.functional import scaled_dot_product_attention
from transformers import modeling_flash_attention_utils as flash

PACKED = torch.cat([torch.arange(8), torch.arange(12)])[None]  # two documents in a row of 20
ENDS = torch.tensor([0, 8, 20, 28, 40], dtype=torch.int32)  # of those in two such rows
VARIABLE = {"cu_seq_lens_q": ENDS, "cu_seq_lens_k": ENDS, "max_length_q": 12, "max_length_k": 12}
CALLS: list[list[int]] = []  # the ends of the documents in each call of the kernel


def attend(q, k, v, causal=False, softmax_scale=None, window_size=(-1, -1), dropout_p=0.0):
    """Return attention of (B, T, H, D) to `window_size[0]` tokens before, or to all (-1)."""
    assert causal and not dropout_p and q.shape[1] == k.shape[1]
    steps = torch.arange(q.shape[1])
    back = steps[:, None] - steps
    seen = (back >= 0) & ((back <= window_size[0]) | (window_size[0] < 0))
    heads = (x.transpose(1, 2) for x in (q, k, v))
    given = {"attn_mask": seen, "scale": softmax_scale, "enable_gqa": True}
    return scaled_dot_product_attention(*heads, **given).transpose(1, 2)


def attend_by_documents(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    causal=False,
    softmax_scale=None,
    window_size=(-1, -1),
    dropout_p=0.0,
):
    """Return attention of (N, H, D), in which each document ends at one of `cu_seqlens_q`."""
    CALLS.append(cu_seqlens_q.tolist())
    assert CALLS[-1] == cu_seqlens_k.tolist() and CALLS[-1][-1] == len(q)
    assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
    lengths = cu_seqlens_q.diff().tolist()
    documents = zip(*(x[None].split(lengths, dim=1) for x in (q, k, v)), strict=True)
    settings = {"causal": causal, "softmax_scale": softmax_scale, "window_size": window_size}
    return torch.cat([attend(*each, **settings, dropout_p=dropout_p)[0] for each in documents])


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    """Give transformers the kernel: on a GPU it takes it from a package or from the Hub."""
    functions = attend, attend_by_documents, None, flash._pad_input, flash._unpad_input
    monkeypatch.setattr(flash, "_lazy_imports", lambda *args, **kwargs: functions)
    monkeypatch.setattr(flash, "_loaded_implementation", None)  # and so again afterwards
    CALLS.clear()


def two_models(family: str, implementation: str = "flash_attention_2"):
    """Return one model twice: by sdpa, which takes a dense mask, and by flash attention."""
    models = tiny_model(family, num_key_value_heads=2), tiny_model(family, num_key_value_heads=2)
    models[1].load_state_dict(models[0].state_dict())
    models[1].config._attn_implementation = implementation  # without a look for the package
    return models


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3"])
@pytest.mark.parametrize("family", ["nano", "gpt3"])  # gpt3 has a layer with a window
def test_one_row_of_documents_gives_logits_and_gradients_of_the_dense_mask(
    family, implementation, tokens
):
    dense, varied = two_models(family, implementation)
    for model in (dense, varied):
        out = model(tokens[:1], position_ids=PACKED, labels=tokens[:1], use_cache=False)
        out.loss.backward()
        model.result = out.logits
    assert len(CALLS) == dense.config.num_hidden_layers and all(e == [0, 8, 20] for e in CALLS)
    assert dense.result.std() > 1
    torch.testing.assert_close(varied.result, dense.result, rtol=0, atol=1e-5)
    weights = dict(dense.named_parameters())
    for name, weight in varied.named_parameters():
        torch.testing.assert_close(weight.grad, weights[name].grad, rtol=1e-3, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["nano", "gpt3"])
def test_several_rows_of_documents_give_the_logits_of_the_dense_mask(family, tokens):
    dense, varied = two_models(family)
    packed = {"position_ids": PACKED.expand(2, -1), "use_cache": False}
    found = varied(tokens, **packed, **VARIABLE).logits
    assert all(ends == ENDS.tolist() for ends in CALLS) and CALLS
    torch.testing.assert_close(found, dense(tokens, **packed).logits, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["nano", "gpt3"])
def test_a_padded_batch_gives_the_logits_of_the_dense_mask(family, tokens):
    dense, varied = two_models(family)
    mask = torch.ones_like(tokens)
    mask[0, :5] = mask[1, 17:] = 0
    found, expected = (model(tokens, attention_mask=mask).logits for model in (varied, dense))
    assert all(ends == [0, 15, 32] for ends in CALLS) and CALLS
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_rows_without_documents_need_no_ends(tokens):
    dense, plain = two_models("gpt3")
    found = plain(tokens, use_cache=False).logits
    torch.testing.assert_close(found, dense(tokens, use_cache=False).logits, rtol=0, atol=1e-5)
    assert not CALLS
