"""int8 weights: near the float32 model, each row for itself, and refused where they cannot be."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import certain_model, tiny_model
from torch import nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from hf_nanogpt.cli import main
from hf_nanogpt.quantization import Int8Linear, multiplies_exactly, quantize_model

IDS = torch.arange(1, 25)[None]
needs_int8 = pytest.mark.skipif(not multiplies_exactly(), reason="needs AVX512-VNNI")


@needs_int8
@pytest.mark.parametrize("bias", [True, False])
def test_int8_linear_is_exact_on_what_8_bits_hold(bias):
    linear = nn.Linear(16, 8, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(torch.randint(-127, 128, (8, 16)))
        linear.weight[:, 0] = 127  # the scale is 1
    x = torch.randint(-127, 128, (2, 3, 16)).float()
    x[..., 0], x[0, 0] = 127, 0
    torch.testing.assert_close(Int8Linear(linear)(x), linear(x))


@pytest.mark.slow
@needs_int8
@pytest.mark.parametrize("rows", [1, 2])
def test_compiled_int8_linear_gives_the_same(rows):
    linear, x = Int8Linear(nn.Linear(48, 32)), torch.randn(rows, 1, 48)
    torch.compiler.reset()
    with torch.no_grad():  # by the compiler itself: what it makes of whole numbers is at stake
        torch.testing.assert_close(torch.compile(linear)(x), linear(x))


@needs_int8
def test_rows_do_not_depend_on_each_other():
    linear = Int8Linear(nn.Linear(16, 8))
    x = torch.randn(4, 16) * torch.tensor([1e-3, 1.0, 10.0, 1e3])[:, None]
    alone = torch.cat([linear(row[None]) for row in x])
    torch.testing.assert_close(linear(x), alone)


@needs_int8
def test_quantized_logits_stay_near(family, tokens):
    model = tiny_model(family)
    with torch.no_grad():
        expected = model(tokens).logits
        found = quantize_model(model)(tokens).logits
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    assert (found - expected).norm() < 0.05 * expected.norm()


@needs_int8
def test_quantizing_leaves_the_settings_of_other_models_alone():
    first = tiny_model("gpt2")
    other = type(first)(first.config)
    config = first.config.to_dict()
    quantized = quantize_model(first)
    assert other.config.to_dict() == config and not quantized.config.tie_word_embeddings
    assert quantized.model.config is quantized.config


@needs_int8
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
    with pytest.raises(ValueError, match="GPT2LMHeadModel has Conv1D layers"):
        quantize_model(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)))
    with pytest.raises(ValueError, match="float32 model on the CPU"):
        quantize_model(tiny_model("nano").bfloat16())
    assert main(["generate", "x", "--quantize", "int4"]) == 2
    assert "invalid choice: 'int4'" in capsys.readouterr().err


PRODUCT = """
import torch
from hf_nanogpt.quantization import multiplies_exactly
a, b = (torch.randint(-127, 128, (40, 64), dtype=torch.int8) for _ in range(2))
found, expected = torch._int_mm(a, b.t()).long(), a.long() @ b.t().long()
assert multiplies_exactly() == bool((found == expected).all())
print(multiplies_exactly())
"""


@pytest.mark.slow
def test_a_processor_that_multiplies_8_bits_wrongly_is_found_out(monkeypatch):
    # oneDNN leaves the instructions out that it is told to; that its answer changes is its fault.
    exec(PRODUCT, {})
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-c", PRODUCT]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout.strip() in ("True", "False"), done.stderr
    monkeypatch.setattr("hf_nanogpt.quantization.multiplies_exactly", lambda: False)
    with pytest.raises(ValueError, match=r"int8 weights do not work .*AVX512-VNNI.*GGUF"):
        quantize_model(tiny_model("nano"))
