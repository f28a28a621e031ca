"""Muon and AdamW: against torch's AdamW, the update written out, and singular values."""

import copy
import io

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from conftest import tiny_model

from hf_nanogpt import MuonAdamW, build_optimizer
from hf_nanogpt.errors import UserError
from hf_nanogpt.training.optim import OPTIM_DEFAULTS
from hf_nanogpt.training.orthogonal import orthogonalize

RECIPES = list(OPTIM_DEFAULTS)
SHAPES = {"square": (48, 48), "tall": (96, 32), "wide": (32, 96), "row": (1, 16), "one": (1, 1)}


def gradients(parameters, seed: int) -> None:
    """Give each parameter the random gradient that belongs to `seed`."""
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).to(p.device) * 10.0 ** (seed % 3 - 1)


def step(optimizer: torch.optim.Optimizer, model, seed: int) -> None:
    gradients(model.parameters(), seed)
    optimizer.step()


def random_matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# AdamW


@pytest.mark.parametrize("fused", [True, False])
def test_the_adamw_recipe_equals_torch(fused):
    model = tiny_model("gpt2")
    clone = copy.deepcopy(model)
    ours = build_optimizer(model, recipe="adamw", learning_rate=3e-3, eps=1e-7)
    settings = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-7, "fused": fused}
    matrices = [p for p in clone.parameters() if p.ndim == 2]
    vectors = [p for p in clone.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    torchs = torch.optim.AdamW(groups, **settings)
    for seed in range(5):
        for group in (*ours.param_groups, *torchs.param_groups):
            group["lr"] = 3e-3 / (seed + 1)  # as a schedule does
        step(ours, model, seed)
        step(torchs, clone, seed)
        for (name, p), q in zip(model.named_parameters(), clone.parameters(), strict=True):
            if fused:
                assert p.equal(q), name
            else:  # another order of the same operations
                torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_the_muon_recipe_gives_embeddings_head_and_norms_to_adamw():
    model = tiny_model("nano")
    clone = copy.deepcopy(model)
    ours = build_optimizer(model, learning_rate=0.01, betas=(0.7, 0.9))
    named = {n: p for n, p in clone.named_parameters() if p.ndim == 1 or "layers." not in n}
    rest = [p for n, p in named.items() if "embed_tokens" not in n]
    groups = [
        {"params": [named["model.embed_tokens.weight"]], "lr": 0.05},
        {"params": rest, "lr": 0.005},
    ]
    torchs = torch.optim.AdamW(groups, betas=(0.7, 0.9), weight_decay=0.0, fused=True)
    for seed in range(5):
        step(ours, model, seed)
        step(torchs, clone, seed)
    after = dict(model.named_parameters())
    assert len(named) == 2 + 3 * 4 + 1
    assert all(after[name].equal(p) for name, p in named.items())


# Muon


@pytest.mark.parametrize("warmup", [0, 3])
def test_a_muon_step_equals_the_update_written_out(warmup):
    shapes = [*SHAPES.values(), SHAPES["tall"], SHAPES["wide"]]  # two are stepped together
    params = [torch.nn.Parameter(random_matrix(*s, seed=i)) for i, s in enumerate(shapes)]
    expected = [p.detach().clone() for p in params]
    momenta = [torch.zeros_like(p) for p in expected]
    optimizer = MuonAdamW(
        [{"params": params, "algorithm": "muon"}],
        lr=0.1,
        momentum=0.9,
        momentum_warmup=warmup,
        weight_decay=0.5,
    )
    rising = [0.8, 0.8 + 0.1 / 3, 0.8 + 0.2 / 3, 0.9]
    for seed, momentum in enumerate(rising if warmup else [0.9] * 4):
        gradients(params, seed)
        optimizer.step()
        for i, (rows, columns) in enumerate(shapes):
            grad = params[i].grad
            momenta[i] = momentum * momenta[i] + (1 - momentum) * grad
            update = (1 - momentum) * grad + momentum * momenta[i]  # Nesterov looks ahead
            update = orthogonalize(update)
            scale = max(1, rows / columns) ** 0.5
            expected[i] = expected[i] * (1 - 0.1 * 0.5) - 0.1 * scale * update
            torch.testing.assert_close(params[i].detach(), expected[i], rtol=1e-4, atol=1e-5)


def test_a_muon_step_has_the_bits_of_the_stacked_update():
    shapes = [(48, 48)] * 5 + [(7, 13), (96, 32)] * 3
    params = [torch.nn.Parameter(random_matrix(*s, seed=i)) for i, s in enumerate(shapes)]
    piles = {s: [i for i, other in enumerate(shapes) if other == s] for s in shapes}
    weights = {s: torch.stack([params[i].detach() for i in pile]) for s, pile in piles.items()}
    momenta = {s: torch.zeros_like(stack) for s, stack in weights.items()}
    optimizer = MuonAdamW([{"params": params, "algorithm": "muon"}], lr=0.1, weight_decay=0.5)
    for seed in range(3):
        gradients(params, seed)
        for (rows, columns), pile in piles.items():
            weight, momentum = weights[rows, columns], momenta[rows, columns]
            grads = torch.stack([params[i].grad for i in pile])
            momentum.lerp_(grads, 1 - 0.95)
            update = orthogonalize(grads.lerp(momentum, 0.95))
            weight.mul_(1 - 0.1 * 0.5).add_(update, alpha=-0.1 * max(1, rows / columns) ** 0.5)
        optimizer.step()
    for shape, pile in piles.items():
        assert torch.stack([params[i].detach() for i in pile]).equal(weights[shape]), shape


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_orthogonalizing_keeps_directions_and_evens_out_singular_values(shape):
    for seed in range(10):
        matrix = random_matrix(*shape, seed=seed)
        u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        core = u.mT @ orthogonalize(matrix).double() @ vh.mT  # diagonal: the new singular values
        values = core.diagonal()
        torch.testing.assert_close(core, values.diag(), atol=2e-4, rtol=0)
        assert values.min() > 0
        assert values.max() < 1.87
        # The polynomials are made for 1e-3 to 1, relative to the Frobenius norm times 1.01.
        assert (values[s > 1.01e-3 * s.norm()] > 0.127).all()


def test_an_ill_conditioned_matrix_is_evened_out_down_to_a_thousandth():
    u, v = (torch.linalg.qr(random_matrix(64, 64, seed=i).double()).Q for i in (1, 2))
    s = torch.logspace(0, -6, 64, dtype=torch.float64)
    core = u.mT @ orthogonalize((u * s @ v.mT).float()).double() @ v
    values = core.diagonal()
    assert values.max() < 1.87
    assert (values[s > 1.01e-3 * s.norm()] > 0.127).all()
    assert (values > 0).all()


def test_matrices_in_a_batch_are_orthogonalized_one_by_one():
    for shape in SHAPES.values():
        batch = random_matrix(2, 3, *shape)
        batch[1] *= 1e4
        together = orthogonalize(batch)
        for i in range(2):
            for j in range(3):
                alone = orthogonalize(batch[i, j])
                torch.testing.assert_close(together[i, j], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1e6])
def test_orthogonalizing_forgets_the_scale(scale):
    matrix = random_matrix(32, 48)
    torch.testing.assert_close(
        orthogonalize(matrix * scale), orthogonalize(matrix), rtol=1e-3, atol=1e-3
    )


def test_a_gradient_of_zero_moves_nothing():
    p = torch.nn.Parameter(random_matrix(8, 8))
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    MuonAdamW([{"params": [p], "algorithm": "muon"}], lr=0.1).step()
    assert p.equal(before)


def test_tall_and_wide_are_each_others_transpose():
    matrix = random_matrix(24, 60)
    torch.testing.assert_close(orthogonalize(matrix.mT), orthogonalize(matrix).mT)


# Groups


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_parameter_is_in_exactly_one_group(family, recipe, tied):
    model = tiny_model(family, tie_word_embeddings=tied)
    groups = build_optimizer(model, recipe=recipe).param_groups
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert len(set(grouped)) == len(grouped)
    where = {id(p): group for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        group = where[id(p)]
        if recipe == "adamw":
            assert group["name"] == ("matrices" if p.ndim == 2 else "vectors")
            assert group["weight_decay"] == (0.1 if p.ndim == 2 else 0.0)
        elif p.ndim == 2 and ".layers." in name:
            assert (group["name"], group["algorithm"], group["lr"]) == ("matrices", "muon", 0.03)
        elif "embed_tokens" in name and not tied:
            assert (group["name"], group["algorithm"], group["lr"]) == ("embeddings", "adamw", 0.15)
        else:
            assert (group["name"], group["algorithm"], group["lr"]) == ("others", "adamw", 0.015)


def test_rates_of_adamw_beside_muon_fall_with_the_root_of_the_width():
    groups = build_optimizer(tiny_model("nano", n_embd=512, n_layer=1)).param_groups
    assert [group["lr"] for group in groups] == pytest.approx([0.03, 0.075, 0.0075])


def test_the_rate_of_the_head_is_what_is_given():
    model = tiny_model("nano", n_embd=512, n_layer=1)
    groups = build_optimizer(model, head_learning_rate=0.002).param_groups
    assert {group["name"]: group["lr"] for group in groups} == pytest.approx(
        {"matrices": 0.03, "embeddings": 0.075, "others": 0.002}
    )
    assert any(p is model.lm_head.weight for p in groups[-1]["params"])
    with pytest.raises(UserError, match=r"head_learning_rate=0\.002 has an effect only"):
        build_optimizer(model, recipe="adamw", head_learning_rate=0.002)


@pytest.mark.parametrize("recipe", RECIPES)
def test_frozen_parameters_are_left_out(recipe):
    model = tiny_model("nano")
    model.model.layers.requires_grad_(False)
    optimizer = build_optimizer(model, recipe=recipe)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(optimizer, model, 0)
    changed = {name for name, p in model.named_parameters() if not p.equal(before[name])}
    assert changed == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_parameters_without_a_gradient_stay_as_they_are(recipe):
    model = tiny_model("nano")
    optimizer = build_optimizer(model, recipe=recipe)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients(model.model.layers[0].parameters(), 0)
    optimizer.step()
    for name, p in model.named_parameters():
        assert p.equal(before[name]) is (".layers.0." not in name), name


def test_what_is_given_wins_over_the_recipe():
    settings = {"learning_rate": 0.5, "weight_decay": 0.25, "betas": (0.1, 0.2), "eps": 1e-3}
    [matrices, vectors] = build_optimizer(
        tiny_model("gpt2"), recipe="adamw", **settings
    ).param_groups
    assert (matrices["lr"], vectors["lr"]) == (0.5, 0.5)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.25, 0.0)
    assert all((g["betas"], g["eps"]) == ((0.1, 0.2), 1e-3) for g in (matrices, vectors))


def test_an_unknown_recipe_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"recipe='moun'.*muon"):
        build_optimizer(tiny_model("nano"), recipe="moun")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_reloaded_state_continues_bitwise_the_same(recipe):
    model = tiny_model("nano")
    optimizer = build_optimizer(model, recipe=recipe, momentum_warmup=5)
    for seed in range(3):
        step(optimizer, model, seed)
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    clone = copy.deepcopy(model)
    resumed = build_optimizer(clone, recipe=recipe, learning_rate=123.0)
    resumed.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
    for seed in range(3, 6):
        step(optimizer, model, seed)
        step(resumed, clone, seed)
    for (name, p), q in zip(model.named_parameters(), clone.parameters(), strict=True):
        assert p.equal(q), name
        for key, value in optimizer.state[p].items():
            assert value.dtype == resumed.state[q][key].dtype
            assert value.equal(resumed.state[q][key]), (name, key)


@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, AcceleratedOptimizer])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_reloaded_state_is_on_the_device_of_its_parameter(recipe, wrap):
    Accelerator()  # AcceleratedOptimizer needs one, whatever ran before
    model = tiny_model("nano")
    optimizer = build_optimizer(model, recipe=recipe)
    step(optimizer, model, 0)
    devices = ["meta", "cuda"] if torch.cuda.is_available() else ["meta"]
    for device in devices:
        elsewhere = copy.deepcopy(model).to(device)
        resumed = build_optimizer(elsewhere, recipe=recipe)
        wrap(resumed).load_state_dict(optimizer.state_dict())
        states = [state for p in elsewhere.parameters() for state in resumed.state[p].values()]
        assert len(states) >= len(list(model.parameters()))
        assert {(s.device.type, s.dtype) for s in states} == {(device, torch.float32)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("devices", [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_state_of_one_device_continues_on_another(recipe, devices):
    model = tiny_model("nano").to(devices[0])
    optimizer = build_optimizer(model, recipe=recipe)
    step(optimizer, model, 0)
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    clone = copy.deepcopy(model).to(devices[1])
    resumed = build_optimizer(clone, recipe=recipe)
    resumed.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
    for trained, its_optimizer in ((model, optimizer), (clone, resumed)):
        step(its_optimizer, trained, 1)
    for p, q in zip(model.parameters(), clone.parameters(), strict=True):
        # bfloat16 rounds the directions of Muon by about a hundredth of their step of 0.03.
        torch.testing.assert_close(p.cpu(), q.cpu(), rtol=0, atol=2e-3)


def test_a_state_of_version_0_1_0_still_loads():
    matrix, vector = (torch.nn.Parameter(random_matrix(*shape)) for shape in ((4, 4), (4,)))
    shared = {"lr": 0.1, "weight_decay": 0.0, "betas": (0.8, 0.95), "eps": 1e-8}
    shared |= {"momentum": 0.95, "momentum_warmup": 0, "steps": 7}
    averages = {"exp_avg": torch.ones(4), "exp_avg_sq": torch.ones(4), "step": torch.tensor(7.0)}
    saved = {
        "state": {0: {"momentum_buffer": torch.ones(4, 4)}, 1: averages},
        "param_groups": [
            shared | {"name": "matrices", "algorithm": "muon", "params": [0]},
            shared | {"name": "others", "algorithm": "adamw", "params": [1]},
        ],
    }
    groups = [{"params": [matrix], "algorithm": "muon"}, {"params": [vector]}]
    optimizer = MuonAdamW(groups)
    optimizer.load_state_dict(saved)
    gradients((matrix, vector), 0)
    optimizer.step()
    assert [group["steps"] for group in optimizer.param_groups] == [8, 8]
    assert optimizer.state[vector]["step"] == 8
    expected = torch.ones(4, 4).lerp(matrix.grad, 1 - 0.95)
    torch.testing.assert_close(optimizer.state[matrix]["momentum_buffer"], expected)
    # What is saved now has the same names, so that 0.1.0 loads it too.
    now = optimizer.state_dict()
    assert [group.keys() for group in now["param_groups"]] == [
        group.keys() for group in saved["param_groups"]
    ]
    assert [now["state"][i].keys() for i in (0, 1)] == [saved["state"][i].keys() for i in (0, 1)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_few_steps_lower_the_loss(recipe, tokens):
    model = tiny_model("nano", initializer_range=None).train()
    optimizer = build_optimizer(model, recipe=recipe)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
