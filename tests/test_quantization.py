"""int8 weights: near the float32 model, each row for itself, and refused where they cannot be."""

import pytest
import torch
from conftest import certain_model, tiny_model
from torch import nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from hf_nanogpt.cli import main
from hf_nanogpt.quantization import Int8Linear, quantize_model

IDS = torch.arange(1, 25)[None]


@pytest.mark.parametrize("bias", [True, False])
def test_int8_linear_is_exact_on_what_8_bits_hold(bias):
    linear = nn.Linear(16, 8, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(torch.randint(-127, 128, (8, 16)))
        linear.weight[:, 0] = 127  # the scale is 1
    x = torch.randint(-127, 128, (2, 3, 16)).float()
    x[..., 0], x[0, 0] = 127, 0
    torch.testing.assert_close(Int8Linear(linear)(x), linear(x))


@pytest.mark.parametrize("rows", [1, 2])
def test_compiled_int8_linear_gives_the_same(rows):
    linear, x = Int8Linear(nn.Linear(48, 32)), torch.randn(rows, 1, 48)
    torch.compiler.reset()
    with torch.no_grad():  # by the compiler itself: what it makes of whole numbers is at stake
        torch.testing.assert_close(torch.compile(linear)(x), linear(x))


def test_rows_do_not_depend_on_each_other():
    linear = Int8Linear(nn.Linear(16, 8))
    x = torch.randn(4, 16) * torch.tensor([1e-3, 1.0, 10.0, 1e3])[:, None]
    alone = torch.cat([linear(row[None]) for row in x])
    torch.testing.assert_close(linear(x), alone)


def test_quantized_logits_stay_near(family, tokens):
    model = tiny_model(family)
    with torch.no_grad():
        expected = model(tokens).logits
        found = quantize_model(model)(tokens).logits
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_quantized_model_reads_and_writes_alike_with_and_without_cache(tokens):
    model, ids = quantize_model(certain_model(IDS)), IDS[:, :12]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        pieces = [model(ids, past_key_values=cache).logits for ids in tokens.split([12, 1, 7], 1)]
    # An input at the edge is rounded up for one and down for the other.
    assert (torch.cat(pieces, dim=1) - whole).norm() < 0.05 * whole.norm()
    given = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    for use_cache in (True, False):
        assert model.generate(ids, use_cache=use_cache, **given).tolist() == IDS[:, :20].tolist()


def test_refusals_are_one_sentence(capsys):
    with pytest.raises(ValueError, match="GPT2LMHeadModel has Conv1D instead"):
        quantize_model(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)))
    with pytest.raises(ValueError, match="float32 model on the CPU"):
        quantize_model(tiny_model("nano").bfloat16())
    assert main(["generate", "x", "--quantize", "int4"]) == 2
    assert "invalid choice: 'int4'" in capsys.readouterr().err
