"""Initialisation: the spread of every weight, and the loss that it starts from."""

import math

import pytest
import torch
from conftest import FAMILIES, soon, tiny_model

from hf_nanogpt import NanoGPTForCausalLM, load_preset

WIDE = {"n_embd": 128, "head_dim": None, "n_head": 4, "num_key_value_heads": None, "n_layer": 4}
RESIDUAL = ("o_proj.weight", "down_proj.weight")


def weights_of(model, *endings):
    return {name: p for name, p in model.named_parameters() if name.endswith(endings)}


def preset_range(family):
    return load_preset(FAMILIES[family]["preset"]).initializer_range


def test_normal_init_shrinks_residual_projections_of_pre_norm_only(family):
    model = tiny_model(family, **WIDE, layer_types=None, initializer_range=0.05)
    matrices = {n: p for n, p in model.named_parameters() if p.dim() == 2}
    assert len(weights_of(model, *RESIDUAL)) == 2 * 4
    # Post-norm (GPT-1) renews the scale of the stream after each sum: nothing to shrink there, and
    # the paper's N(0, 0.02) is for all weights.
    shrink = math.sqrt(2 * 4) if model.config.norm_position == "pre" else 1
    for name, weight in matrices.items():
        std = 0.05 / shrink if name.endswith(RESIDUAL) else 0.05
        assert weight.std().item() == pytest.approx(std, rel=0.05), name
        assert abs(weight.mean().item()) < 4 * std / math.sqrt(weight.numel()), name


@pytest.mark.parametrize("initializer_range", [0.02, None])
def test_norms_start_at_one_and_biases_at_zero(family, initializer_range):
    model = tiny_model(family, initializer_range=initializer_range)
    vectors = {n: p for n, p in model.named_parameters() if p.dim() == 1}
    for name, vector in vectors.items():
        norm = "norm" in name and name.endswith("weight")
        assert torch.equal(vector, torch.full_like(vector, float(norm))), name


def test_muon_init_has_unit_embeddings_and_matrices_of_variance_by_fan_in():
    model = tiny_model("nano", **WIDE, vocab_size=500, initializer_range=None)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(1, rel=0.02)
    inputs = weights_of(model, "q_proj.weight", "k_proj.weight", "v_proj.weight")
    inputs |= weights_of(model, "gate_proj.weight", "up_proj.weight")
    assert len(inputs) == 5 * 4
    for name, weight in inputs.items():
        fan_in = weight.shape[1]
        assert weight.var().item() == pytest.approx(0.36 / fan_in, rel=0.05), name
        assert weight.abs().max() <= 0.6 * math.sqrt(3 / fan_in), name
    zeros = weights_of(model, *RESIDUAL, "lm_head.weight")
    assert len(zeros) == 2 * 4 + 1
    assert all(not weight.any() for weight in zeros.values())


@pytest.mark.parametrize("family", ["nano", "qwen3", "nanochat", "llama"])
def test_muon_init_starts_at_the_loss_of_a_uniform_guess(family, tokens):
    model = tiny_model(family, initializer_range=None, tie_word_embeddings=False)
    loss = model(tokens, labels=tokens).loss.item()
    assert loss == pytest.approx(math.log(61), abs=1e-5)


def test_muon_init_of_tied_weights_starts_near_the_loss_of_a_uniform_guess(family, tokens):
    model = tiny_model(family, initializer_range=None, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model(tokens, labels=tokens).loss.item() == pytest.approx(math.log(61), abs=0.2)


def test_preset_starts_near_the_loss_of_a_uniform_guess(family, tokens):
    model = tiny_model(family, initializer_range=preset_range(family))
    assert model(tokens, labels=tokens).loss.item() == pytest.approx(math.log(61), abs=0.2)


# GPT-1 apart: its tied head first expects every token again, which only many layers wash out.
@pytest.mark.parametrize(
    "family", soon("nano", "gpt2", of=[name for name in FAMILIES if name != "gpt1"])
)
def test_preset_starts_near_a_uniform_guess_at_its_own_width(family):
    width = {"n_embd": 768, "n_head": 12, "n_layer": 2, "head_dim": None}
    model = tiny_model(
        family,
        **width,
        num_key_value_heads=None,
        layer_types=None,
        vocab_size=2000,
        initializer_range=preset_range(family),
    )
    ids = torch.randint(1, 2000, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    # Logits that are N(0, variance) add half of it; the Muon init starts with zeros.
    variance = 768 * (model.config.initializer_range or 0) ** 2
    assert loss == pytest.approx(math.log(2000) + variance / 2, abs=0.1)


@pytest.mark.slow
def test_gpt1_in_full_starts_near_a_uniform_guess():
    torch.manual_seed(0)
    model = NanoGPTForCausalLM(load_preset("gpt1")).eval()
    ids = torch.randint(model.config.vocab_size, (2, 64))
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert loss == pytest.approx(math.log(40478), abs=0.3)


@pytest.mark.parametrize(("initializer_range", "steps"), [(0.02, 1), (None, 3)])
def test_gradient_reaches_every_parameter_within(initializer_range, steps, tokens):
    # Behind zeros nothing moves at first: the head goes ahead, then the projections into the
    # residual stream, then the rest.
    model, reached = tiny_model("nano", initializer_range=initializer_range).train(), set()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for step in range(steps):
        assert len(reached) < len(list(model.parameters())), step
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        reached |= {name for name, p in model.named_parameters() if p.grad.any()}
    assert reached == {name for name, _ in model.named_parameters()}


def test_seed_decides_the_weights():
    first, again, other = (tiny_model("gpt2", seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(first[name], other[name])
