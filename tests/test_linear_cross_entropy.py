"""The loss without the logits: equal to cross-entropy, in chunks, and how training comes to it."""

import json
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from children import forked, run_ranks
from conftest import CORPUS, find_parameters_without_effect, tiny_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

from hf_nanogpt import NanoGPTTrainer, NanoGPTTrainingArguments
from hf_nanogpt import linear_cross_entropy as module
from hf_nanogpt.linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from hf_nanogpt.training import trainer as trainer_module

V = 61


@pytest.fixture(autouse=True)
def limit(monkeypatch):
    """Seven rows of logits at a time, so that 40 rows are six chunks, the last one short."""
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 7 * V)


def gradients(model) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def ignore_some(tokens: torch.Tensor) -> torch.Tensor:
    labels = tokens.clone()
    labels[0, 3:15] = -100  # whole chunks, and parts of some
    return labels


def make_head(dtype=torch.float64) -> tuple[torch.Tensor, nn.Linear, torch.Tensor]:
    """Return states of 40 positions, a head with logits of size 3, and the next tokens."""
    states = torch.randn(2, 20, 32, dtype=dtype, requires_grad=True)
    head = nn.Linear(32, V, bias=False, dtype=dtype)
    nn.init.normal_(head.weight, std=0.5)
    return states, head, ignore_some(torch.randint(V, (2, 20)))


def plain_loss(states, head, labels, softcap=None, label_smoothing=0.0):
    logits = head(states).flatten(0, 1)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return nn.functional.cross_entropy(logits, labels.flatten(), label_smoothing=label_smoothing)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_loss_and_gradients_are_those_of_cross_entropy(softcap, smoothing, dtype):
    states, head, labels = make_head(dtype)
    settings = {"softcap": softcap, "label_smoothing": smoothing}
    found = linear_cross_entropy(states, head, None, shift_labels=labels, **settings)
    expected = plain_loss(states, head, labels, **settings)
    parameters = (states, head.weight)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(3 * found, parameters), torch.autograd.grad(3 * expected, parameters)
    )


def test_gradients_are_those_of_finite_differences(monkeypatch):
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 3 * V)
    states, head, labels = make_head()
    states = states.detach()[:, :2].requires_grad_()

    def loss(states, weight):
        return LinearCrossEntropy.apply(
            states.flatten(0, 1), weight, labels[:, 2:4].flatten(), 4.0, 0.3, -100
        )

    assert torch.autograd.gradcheck(loss, (states, head.weight), fast_mode=True)


def test_a_second_backward_pass_gives_the_same_and_a_second_derivative_is_refused():
    states, head, labels = make_head()
    loss = linear_cross_entropy(states, head, labels)
    first, second = (torch.autograd.grad(loss, states, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, states, create_graph=True)


def test_no_gradient_is_computed_where_none_is_asked_for():
    states, head, labels = make_head()
    with torch.no_grad():
        assert not linear_cross_entropy(states, head, labels).requires_grad
    head.requires_grad_(False)
    linear_cross_entropy(states, head, labels).backward()
    assert head.weight.grad is None and states.grad.any()
    head.requires_grad_(True)
    linear_cross_entropy(states.detach(), head, labels).backward()
    expected = torch.autograd.grad(
        plain_loss(states[:, :-1].reshape(1, -1, 32), head, labels[:, 1:]), head.weight
    )[0]
    torch.testing.assert_close(head.weight.grad, expected)


def test_bfloat16_gradients_of_many_chunks_are_summed_in_float32(monkeypatch):
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", V)  # 2,000 chunks of one row
    states, labels = torch.randn(1, 2000, 32).bfloat16(), torch.randint(V, (1, 2000))
    head = nn.Linear(32, V, bias=False).bfloat16()
    exact = nn.Linear(32, V, bias=False).double()
    exact.weight.data.copy_(head.weight)
    linear_cross_entropy(states, head, None, shift_labels=labels).backward()
    plain_loss(states.double(), exact, labels).backward()
    error = (head.weight.grad.double() - exact.weight.grad).norm() / exact.weight.grad.norm()
    assert head.weight.grad.dtype == torch.bfloat16
    assert error < 2**-8  # one rounding of the products, one of the sum


@pytest.mark.parametrize("autocast", [False, True])
def test_a_model_gives_the_same_loss_and_gradients_without_its_logits(family, autocast, tokens):
    whole, chunked = (tiny_model(family).train() for _ in range(2))
    labels = ignore_some(tokens)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        expected = whole(tokens, labels=labels)
        found = chunked(tokens, labels=labels, linear_loss=linear_cross_entropy)
    expected.loss.backward()
    found.loss.backward()
    assert found.logits is None and expected.logits.shape == (2, 20, V)
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-4 if autocast else 1e-6, atol=0)
    limit = 0.02 if autocast else 1e-5  # bfloat16 keeps 8 bits
    idle = find_parameters_without_effect(whole)
    for name, gradient in gradients(whole).items():
        error = (gradients(chunked)[name] - gradient).norm() / gradient.norm()
        assert error < limit or name in idle, name


def test_items_in_batch_divide_the_loss_and_no_labels_give_what_they_do_with_logits(tokens):
    model, nothing = tiny_model(), torch.full_like(tokens, -100)
    for labels, count in ((tokens, 7), (tokens, torch.tensor(7)), (nothing, 7), (nothing, None)):
        losses = [
            model(tokens, labels=labels, num_items_in_batch=count, linear_loss=way).loss
            for way in (linear_cross_entropy, None)
        ]
        torch.testing.assert_close(*losses, equal_nan=True)
    loss = model(
        tokens, labels=nothing, num_items_in_batch=1, linear_loss=linear_cross_entropy
    ).loss
    loss.backward()
    assert not any(gradient.any() for gradient in gradients(model).values())


def test_a_loss_without_labels_is_refused(tokens):
    with pytest.raises(ValueError, match="labels=None"):
        tiny_model()(tokens, linear_loss=linear_cross_entropy)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_a_head_with_an_adapter_gives_the_same(tokens, smoothing):
    peft = pytest.importorskip("peft")
    settings = {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": False}
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(**settings))
    logits = model(tokens).logits[:, :-1].flatten(0, 1)
    expected = nn.functional.cross_entropy(
        logits, tokens[:, 1:].flatten(), label_smoothing=smoothing
    )
    expected.backward()
    by_logits = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    found = model(
        tokens, labels=tokens, linear_loss=partial(linear_cross_entropy, label_smoothing=smoothing)
    ).loss
    found.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(model), by_logits)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["nano", "gpt2"])
def test_compiled_it_is_one_graph(family, tokens):
    torch.compiler.reset()
    plain, model = tiny_model(family).train(), tiny_model(family).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(tokens, labels=tokens, linear_loss=linear_cross_entropy, use_cache=False).loss
    expected = plain(tokens, labels=tokens, use_cache=False).loss
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    found.backward()
    expected.backward()
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=0, atol=1e-5)


# Several processes


def _train_apart(way: str, tokens: torch.Tensor) -> None:
    """Print the loss and the gradient of the head of one step of two processes."""
    torch.distributed.init_process_group("gloo")
    print(json.dumps(_take_step(way, tokens)))
    # Only now, without the model: DDP that frees the last of a group waits for its threads forever.
    torch.distributed.destroy_process_group()


def _take_step(way: str, tokens: torch.Tensor) -> list:
    module.LOGITS_AT_ONCE = 7 * V
    model = tiny_model("gpt2").train()  # its head is its embedding
    if way == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        for layer in model.model.layers:
            fully_shard(layer)
        wrapped = fully_shard(model)
    own = tokens[torch.distributed.get_rank()][None]
    loss = wrapped(own, labels=own, linear_loss=linear_cross_entropy).loss
    loss.backward()
    gradient = model.lm_head.weight.grad
    gradient = gradient.full_tensor() if way == "fsdp" else gradient
    return [loss.item(), gradient.tolist()]


@forked
@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_give_the_loss_and_gradients_of_one(way, tokens):
    ranks = run_ranks(2, _train_apart, way, tokens)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stderr
    found = [json.loads(rank.stdout.splitlines()[-1]) for rank in ranks]
    model = tiny_model("gpt2").train()
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert sum(loss for loss, _ in found) / 2 == pytest.approx(loss.item(), abs=1e-5)
    for _, gradient in found:
        torch.testing.assert_close(torch.tensor(gradient), model.lm_head.weight.grad)


# How training comes to it


class Spy:
    """Notes what a model was asked for."""

    def __init__(self, model):
        self.skipped: list[bool] = []
        model.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs, output):
        self.skipped.append(bool(kwargs.get("linear_loss")))


def train_few_steps(model, folder, **settings):
    parts = {name: settings.pop(name) for name in ("compute_loss_func",) if name in settings}
    args = NanoGPTTrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        logging_steps=1,
        eval_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    ids = torch.tensor([ord(character) % V for character in CORPUS[:480]]).view(-1, 20)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = NanoGPTTrainer(model, args, train_dataset=rows, **parts)
    spy = Spy(model)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses, spy.skipped


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation_steps": 3}, {"label_smoothing_factor": 0.2}],
    ids=["plain", "accumulated", "smoothed"],
)
def test_training_skips_logits_that_are_too_many_and_learns_the_same(
    settings, tmp_path, monkeypatch
):
    expected, before = train_few_steps(tiny_model(), tmp_path / "whole", **settings)
    monkeypatch.setattr(trainer_module, "LOGITS_AT_ONCE", 2 * 20 * V - 1)
    losses, skipped = train_few_steps(tiny_model(), tmp_path / "skipped", **settings)
    assert not any(before) and all(skipped)
    assert losses == pytest.approx(expected, abs=1e-4)


def test_smoothed_labels_are_those_of_the_next_tokens(tmp_path, tokens):
    args = NanoGPTTrainingArguments(
        str(tmp_path), label_smoothing_factor=0.2, eval_strategy="no", use_cpu=True
    )
    model, labels = tiny_model(), ignore_some(tokens)
    logits = model(tokens).logits[:, :-1].flatten(0, 1)
    expected = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), label_smoothing=0.2)
    inputs = {"input_ids": tokens, "labels": labels}
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules="all-linear"))
    for trained in (model, adapted):
        loss = NanoGPTTrainer(trained, args).compute_loss(trained, dict(inputs))
        torch.testing.assert_close(loss, expected)


def test_whoever_reads_the_logits_gets_them(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "LOGITS_AT_ONCE", 1)

    def sum_of_logits(outputs, labels, num_items_in_batch=None):
        return outputs.logits.square().mean()

    _, skipped = train_few_steps(tiny_model(), tmp_path / "a", compute_loss_func=sum_of_logits)
    assert not any(skipped)
    model = tiny_model()
    model.loss_function = lambda logits, **kwargs: logits.square().mean()
    assert not any(train_few_steps(model, tmp_path / "b")[1])
    other = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=20, n_embd=8, n_layer=1, n_head=1))
    assert not any(train_few_steps(other, tmp_path / "c")[1])
