"""The CPU kernels against the plain forms: values, gradients, second derivatives, and folders."""

import copy

import pytest
import torch
from conftest import FAMILIES, assert_same, native_equivalent, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_nanogpt.cpu_kernels import CPURMSNorm, apply_rotary_pos_emb_on_cpu, use_cpu_kernels
from hf_nanogpt.modeling_nanogpt import (
    NanoGPTRMSNorm,
    NanoGPTRotaryEmbedding,
    apply_rotary_pos_emb,
)


@pytest.fixture(params=[False, True], ids=["plain", "kernels"])
def kernels(request) -> bool:
    return request.param


def make_norm(kernels: bool) -> NanoGPTRMSNorm:
    norm = NanoGPTRMSNorm(8, eps=1e-5)
    norm.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    return CPURMSNorm(norm) if kernels else norm


def make_model(kernels: bool, family: str = "llama", **overrides):
    model = tiny_model(family, **overrides)
    if kernels:
        use_cpu_kernels(model)
    return model


def count_fast_norms(model: nn.Module) -> int:
    return sum(isinstance(module, CPURMSNorm) for module in model.modules())


# Values and gradients


def test_norm_and_its_gradients_equal_torchs(kernels):
    norm, x, upstream = make_norm(kernels), torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 8)
    x[0, 0, 0] = 0
    x.requires_grad_()
    found, expected = norm(x), nn.functional.rms_norm(x, (8,), norm.weight, 1e-5)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(y, (x, norm.weight), upstream) for y in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("rotate", [apply_rotary_pos_emb, apply_rotary_pos_emb_on_cpu])
def test_rotation_and_its_gradients_equal_complex_multiplication(rotate):
    rotary, positions = NanoGPTRotaryEmbedding(tiny_model().config), torch.tensor([[0, 1, 5, 40]])
    q, k = (torch.randn(2, heads, 4, 8, requires_grad=True) for heads in (4, 2))
    turn = torch.exp(1j * positions[:, None, :, None] * rotary.inv_freq)
    for x, found in zip((q, k), rotate(q, k, *rotary(q, positions)), strict=True):
        pairs = torch.complex(x[..., :4], x[..., 4:]) * turn
        expected = torch.cat((pairs.real, pairs.imag), dim=-1)
        torch.testing.assert_close(found, expected)
        upstream = torch.randn_like(x)
        [ours], [theirs] = (torch.autograd.grad(y, x, upstream) for y in (found, expected))
        torch.testing.assert_close(ours, theirs)


def test_loss_and_gradients_change_by_rounding_only(family, tokens):
    results = []
    for kernels in (False, True):
        model = make_model(kernels, family).train()
        loss = model(tokens, labels=tokens).loss
        results.append([loss, *torch.autograd.grad(loss, model.parameters())])
        rms = model.config.norm_type == "rmsnorm"
        assert (count_fast_norms(model) > 0) == (kernels and rms)
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)


# Second derivatives: those of Llama, or of the same arithmetic without any autograd function


def hessian_product(model: nn.Module, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Return H v for the loss, with a v that is the same for every model with these names."""
    parameters = [parameter for _, parameter in sorted(model.named_parameters())]
    generator = torch.Generator().manual_seed(3)
    vectors = [torch.randn(p.shape, generator=generator) for p in parameters]
    model.set_attn_implementation("eager")  # torch's fused attention has no second derivative
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    along = sum((g * v).sum() for g, v in zip(gradients, vectors, strict=True))
    return torch.autograd.grad(along, parameters)


def test_hessian_vector_product_is_that_of_llama(kernels, tokens):
    model = make_model(kernels)
    llama = native_equivalent(model, LlamaConfig, LlamaForCausalLM)
    for found, expected in zip(*(hessian_product(m, tokens) for m in (model, llama)), strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * scale)


def test_hessian_of_the_norm_alone_is_that_of_the_formula(kernels):
    norm, x = make_norm(kernels), torch.randn(3, 8)
    x[0] = 0

    def formula(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def call(x, weight):
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    weights = (x, norm.weight.detach())
    for function in (call, formula):
        assert function(*weights).shape == (3, 8)
    found, expected = (
        torch.autograd.functional.hessian(lambda *args, f=f: f(*args).sin().sum(), weights)
        for f in (call, formula)
    )
    for ours, theirs in zip(sum(found, ()), sum(expected, ()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_third_derivative_of_the_norm_is_that_of_torchs(kernels):
    norm, x = make_norm(kernels), torch.randn(8, requires_grad=True)
    results = []
    for y in (norm(x), nn.functional.rms_norm(x, (8,), norm.weight, 1e-5)):
        for _ in range(3):
            [y] = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        results.append(y)
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_torch_func_takes_gradients_also_for_each_sample(kernels, tokens):
    model = make_model(kernels, "nano", attn_implementation="eager")
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, ids):
        given = {"input_ids": ids[None], "labels": ids[None], "use_cache": False}
        return torch.func.functional_call(model, parameters, kwargs=given).loss

    alone = [torch.func.grad(loss)(parameters, ids) for ids in tokens]
    for ids, gradients in zip(tokens, alone, strict=True):
        expected = torch.autograd.grad(
            model(ids[None], labels=ids[None]).loss, list(model.parameters())
        )
        for (name, found), g in zip(gradients.items(), expected, strict=True):
            torch.testing.assert_close(found, g, rtol=1e-4, atol=1e-5, msg=name)


def test_vmap_of_the_norms_gradient_is_that_of_each_sample(kernels):
    norm, x = make_norm(kernels), torch.randn(4, 3, 8)

    def loss(weight, x):
        return torch.func.functional_call(norm, {"weight": weight}, (x,)).sin().sum()

    weight = norm.weight.detach()
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, x)
    expected = torch.stack([torch.func.grad(loss)(weight, sample) for sample in x])
    torch.testing.assert_close(found, expected)


# The model around them


def test_names_parameters_and_copies_stay_as_they_are(tokens):
    model = tiny_model()
    before, parameters = list(model.state_dict()), dict(model.named_parameters())
    count = sum(type(module) is NanoGPTRMSNorm for module in model.modules())
    use_cpu_kernels(model)
    use_cpu_kernels(model)
    assert count_fast_norms(model) == count == 3 * 4 + 1
    assert list(model.state_dict()) == before
    assert all(p is parameters[name] for name, p in model.named_parameters())
    copied = copy.deepcopy(model)
    assert count_fast_norms(copied) == count
    assert torch.equal(copied(tokens).logits, model(tokens).logits)
    with torch.no_grad():
        copied.model.norm.weight.zero_()
    assert model.model.norm.weight.all()


def test_hooks_and_mode_of_a_norm_stay():
    model, calls = tiny_model(), []
    model.model.norm.register_forward_hook(lambda *_: calls.append(1))
    use_cpu_kernels(model)
    model(torch.tensor([[1, 2]]))
    assert calls == [1]
    assert not model.model.norm.training


def test_saved_folder_is_that_of_the_plain_model(tokens, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "plain")
    use_cpu_kernels(model)
    model.save_pretrained(tmp_path / "fast")
    files = [sorted((tmp_path / name).iterdir()) for name in ("plain", "fast")]
    for plain, fast in zip(*files, strict=True):
        assert (plain.name, plain.read_bytes()) == (fast.name, fast.read_bytes())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fast")
    assert_same(loaded(tokens).logits, model(tokens).logits)


def test_a_model_with_an_adapter_takes_them(tokens):
    peft = pytest.importorskip("peft", reason="pip install 'hf-nanogpt[finetune]'")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules="all-linear"))
    before = model(tokens).logits
    use_cpu_kernels(model)
    assert count_fast_norms(model) == 13
    assert_same(model(tokens).logits, before)


def test_checkpointed_layers_have_the_same_gradients(tokens):
    gradients = []
    for checkpointing in (False, True):
        model = make_model(True, "nano").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(tokens, labels=tokens).loss
        gradients.append(torch.autograd.grad(loss, model.parameters()))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_autocast_keeps_queries_and_keys_in_bfloat16(kernels, tokens):
    model = make_model(kernels, "nano").train()
    dtypes = []
    model.model.layers[0].self_attn.q_norm.register_forward_hook(
        lambda module, args, output: dtypes.append(output.dtype)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert dtypes == [torch.bfloat16]
    expected = tiny_model("nano")(tokens, labels=tokens).loss
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)


@pytest.mark.slow
def test_compiler_and_other_devices_see_the_plain_forms(tokens):
    model = make_model(True, "nano", attn_implementation="eager")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    plain = tiny_model("nano", attn_implementation="eager")
    with torch.no_grad():
        found = compiled(tokens, use_cache=False).logits
        assert torch.equal(found, plain(tokens, use_cache=False).logits)
    assert model.model.norm.to("meta")(torch.zeros(3, 32, device="meta")).shape == (3, 32)


@pytest.mark.parametrize("family", sorted({"nano", "gpt2", "nanochat"} & set(FAMILIES)))
def test_generated_text_stays_the_same(family, tokens):
    texts = [
        make_model(kernels, family, eos_token_id=None).generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False
        )
        for kernels in (False, True)
    ]
    assert torch.equal(*texts)
