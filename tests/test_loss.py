"""The loss and its gradients: by hand, in pieces, with recomputation, and through the compiler."""

import math

import pytest
import torch
from conftest import find_parameters_without_effect, soon, tiny_model
from torch import nn


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def loss_by_hand(logits, labels):
    """Average -log p(label at t + 1 | logits at t) over the labels that are not -100."""
    total, count = 0.0, 0
    for row, row_labels in zip(logits.log_softmax(-1), labels, strict=True):
        for scores, label in zip(row[:-1], row_labels[1:], strict=True):
            if label != -100:
                total, count = total - scores[label], count + 1
    return total / count


@pytest.mark.parametrize("ignored", [0, 7])
def test_loss_is_the_shifted_cross_entropy(family, ignored, tokens):
    model = tiny_model(family)
    labels = tokens.clone()
    labels[0, :ignored] = -100
    out = model(tokens, labels=labels)
    torch.testing.assert_close(out.loss, loss_by_hand(out.logits, labels), rtol=0, atol=1e-5)


def test_labels_change_no_logit(tokens):
    model = tiny_model()
    assert model(tokens).loss is None
    assert torch.equal(model(tokens, labels=tokens).logits, model(tokens).logits)


def test_loss_over_items_in_batch_is_the_sum_over_that_number(tokens):
    out = tiny_model()(tokens, labels=tokens, num_items_in_batch=torch.tensor(100))
    logits, labels = out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    total = nn.functional.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(out.loss, total / 100)


def test_accumulated_gradients_equal_those_of_the_whole_batch(family, tokens):
    labels = tokens.clone()
    labels[0, :13] = -100  # unequal rows: averaging the rows' means would be wrong
    count = (labels[:, 1:] != -100).sum()
    whole, pieces = tiny_model(family), tiny_model(family)
    loss = whole(tokens, labels=labels).loss
    loss.backward()
    accumulated = 0.0
    for row in range(2):
        row_ids, row_labels = tokens[row : row + 1], labels[row : row + 1]
        part = pieces(row_ids, labels=row_labels, num_items_in_batch=count).loss
        part.backward()
        accumulated += part
    torch.testing.assert_close(accumulated, loss, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradients(pieces), gradients(whole), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("keep", "kept"),
    [(0, slice(None)), (1, [19]), (5, slice(15, 20)), (torch.tensor([3, 0, 17]), [3, 0, 17])],
    ids=["all", "last", "last five", "indices"],
)
def test_logits_to_keep_selects_positions(family, keep, kept, tokens):
    model = tiny_model(family)
    found = model(tokens, logits_to_keep=keep).logits
    torch.testing.assert_close(found, model(tokens).logits[:, kept], rtol=0, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(family, reentrant, tokens):
    plain, saving = tiny_model(family).train(), tiny_model(family).train()
    saving.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    saving.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    losses = [model(tokens, labels=tokens, use_cache=False).loss for model in (plain, saving)]
    for loss in losses:
        loss.backward()
    assert len(calls) == 2  # once forward, once more for the backward pass
    assert torch.equal(*losses)
    torch.testing.assert_close(gradients(saving), gradients(plain), rtol=0, atol=1e-6)


def test_every_parameter_that_has_an_effect_gets_a_gradient(family, tokens):
    model = tiny_model(family).train()
    model(tokens, labels=tokens).loss.backward()
    largest = {name: gradient.abs().max() for name, gradient in gradients(model).items()}
    idle = find_parameters_without_effect(model)
    assert {name for name, gradient in largest.items() if gradient < 1e-5} == idle
    assert all(gradient > 1e-3 for name, gradient in largest.items() if name not in idle)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_dropout_acts_in_training_only(family, attn_implementation, tokens):
    dry = tiny_model(family, attn_implementation=attn_implementation)
    model = tiny_model(family, dropout=0.3, attn_implementation=attn_implementation)
    assert torch.equal(model(tokens).logits, dry(tokens).logits)
    model.train()
    first, second = (model(tokens, labels=tokens) for _ in range(2))
    assert not torch.equal(first.logits, second.logits)
    first.loss.backward()
    assert all(grad.isfinite().all() for grad in gradients(model).values())


@pytest.mark.parametrize("dropouts", [{"dropout": 0.5}, {"attention_dropout": 0.5}])
def test_attention_weights_are_dropped_and_rescaled(dropouts, tokens):
    model = tiny_model("nano", **dropouts, attn_implementation="eager").train()
    weights = model(tokens, output_attentions=True).attentions[0]
    seen = torch.ones(20, 20, dtype=torch.bool).tril().expand_as(weights)
    assert 0.4 < (weights[seen] == 0).float().mean() < 0.6
    assert weights.sum(-1).mean().item() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_attention_weights_can_be_kept_where_all_else_is_dropped(attn_implementation, tokens):
    settings = {"attn_implementation": attn_implementation}
    model = tiny_model("nano", dropout=0.5, attention_dropout=0, n_layer=1, **settings).train()
    layer = model.model.layers[0].self_attn
    states = torch.randn(2, 20, model.config.hidden_size)
    positions = model.model.rotary_emb(states, torch.arange(20)[None])
    assert torch.equal(*(layer(states, positions)[0] for _ in range(2)))
    assert not torch.equal(*(model(tokens).logits for _ in range(2)))


@pytest.mark.parametrize("family", soon("nano", of=["nano", "gpt1", "nanochat"]))
def test_few_steps_of_training_learn_a_sequence_by_heart(family):
    model, ids = tiny_model(family, initializer_range=0.1).train(), torch.arange(1, 25)[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.2 < math.log(61)
    mask = torch.ones_like(ids[:, :4])
    found = model.eval().generate(ids[:, :4], attention_mask=mask, max_length=24, do_sample=False)
    assert found.tolist() == ids.tolist()


# The compiler. `aot_eager` traces forward and backward as the default backend does, without the
# quarter of a minute that generating C++ takes.


@pytest.mark.slow
@pytest.mark.parametrize("family", ["nano", "gpt2"])
def test_compiled_model_is_one_graph_with_the_same_gradients(family, tokens):
    torch.compiler.reset()
    plain, model = tiny_model(family).train(), tiny_model(family).train()
    packed = torch.cat([torch.arange(8), torch.arange(12)]).expand(2, -1)
    batch = {"labels": tokens, "position_ids": packed, "use_cache": False}
    expected = plain(tokens, **batch)
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens, **batch)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
    found.loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=0, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_model_compiled_to_machine_code_gives_the_same_logits(tokens):
    torch.compiler.reset()
    model = tiny_model("nano", n_layer=1)
    compiled = torch.compile(model, fullgraph=True)(tokens, use_cache=False)
    torch.testing.assert_close(
        compiled.logits, model(tokens, use_cache=False).logits, rtol=0, atol=1e-5
    )


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("family", ["nano", "gpt2"])
def test_exported_model_takes_other_shapes(family, tokens):
    model = tiny_model(family)
    sizes = {0: torch.export.Dim("rows", max=64), 1: torch.export.Dim("length", max=64)}
    exported = torch.export.export(
        model,
        (),
        {"input_ids": tokens, "use_cache": False},
        dynamic_shapes={"input_ids": sizes, "use_cache": None},
    ).module()
    for ids in (tokens, tokens.reshape(5, 8)):
        found = exported(input_ids=ids, use_cache=False).logits
        expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
