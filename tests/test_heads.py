"""The task heads: loss, gradients, files, and the token that a sequence is judged by."""

import pytest
import torch
from conftest import assert_same, find_parameters_without_effect, tiny_config
from torch import nn
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from hf_nanogpt import (
    NanoGPTForCausalLM,
    NanoGPTForQuestionAnswering,
    NanoGPTForSequenceClassification,
    NanoGPTForTokenClassification,
)

LABELS = 5
HEADS = {
    "sequence": (NanoGPTForSequenceClassification, AutoModelForSequenceClassification),
    "token": (NanoGPTForTokenClassification, AutoModelForTokenClassification),
    "question": (NanoGPTForQuestionAnswering, AutoModelForQuestionAnswering),
}


@pytest.fixture(params=HEADS)
def head(request):
    return request.param


def tiny_head(head, family="nano", **overrides):
    torch.manual_seed(0)
    return HEADS[head][0](tiny_config(family, num_labels=LABELS, **overrides)).eval()


def outputs_of(model, tokens, **kwargs):
    """Return everything the head says, as one tensor with the labels last."""
    out = model(tokens, **kwargs)
    if "logits" in out:
        return out.logits
    return torch.stack([out.start_logits, out.end_logits], dim=-1)


def batch_for(head, tokens):
    generator = torch.Generator().manual_seed(0)
    if head == "question":
        return {"start_positions": torch.tensor([1, 4]), "end_positions": torch.tensor([3, 9])}
    shape = (2,) if head == "sequence" else tokens.shape
    return {"labels": torch.randint(LABELS, shape, generator=generator)}


def test_head_has_the_shape_of_its_task(family, head, tokens):
    shape = {"sequence": (2, LABELS), "token": (2, 20, LABELS), "question": (2, 20, 2)}[head]
    assert outputs_of(tiny_head(head, family), tokens).shape == shape


def test_head_loss_is_the_cross_entropy(head, tokens):
    model, batch = tiny_head(head), batch_for(head, tokens)
    found, scores = model(tokens, **batch).loss, outputs_of(model, tokens)
    if head == "question":
        ends = zip(scores.unbind(-1), batch.values(), strict=True)
        expected = sum(nn.functional.cross_entropy(logits, at) for logits, at in ends) / 2
    else:
        expected = nn.functional.cross_entropy(scores.flatten(0, -2), batch["labels"].flatten())
    torch.testing.assert_close(found, expected)


def test_head_trains_every_parameter_that_has_an_effect(family, head, tokens):
    model = tiny_head(head, family).train()
    model(tokens, **batch_for(head, tokens)).loss.backward()
    largest = {name: p.grad.abs().max() for name, p in model.named_parameters()}
    idle = find_parameters_without_effect(model)
    if head == "question":
        # A softmax over positions takes away what is the same at each of them: biases at the end.
        last = [name for name, _ in model.named_parameters() if name.endswith("norm.bias")][-1:]
        idle |= {"qa_outputs.bias", *last}
    assert {name for name, gradient in largest.items() if gradient < 1e-5} == idle
    assert all(gradient > 1e-3 for name, gradient in largest.items() if name not in idle)


def test_head_survives_a_folder_through_its_auto_class(family, head, tokens, tmp_path):
    model, (own_class, auto_class) = tiny_head(head, family), HEADS[head]
    model.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is own_class
    assert loaded.config.num_labels == LABELS
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert_same(outputs_of(loaded, tokens), outputs_of(model, tokens))


def test_head_takes_the_trunk_of_a_language_model(head, tokens, tmp_path):
    torch.manual_seed(1)
    language_model = NanoGPTForCausalLM(tiny_config("nano")).eval()
    language_model.save_pretrained(tmp_path)
    loaded, info = HEADS[head][1].from_pretrained(
        tmp_path, num_labels=LABELS, output_loading_info=True
    )
    trunk = language_model.model.state_dict()
    assert all(torch.equal(loaded.model.state_dict()[name], trunk[name]) for name in trunk)
    assert {name.split(".")[0] for name in info["missing_keys"]} <= {"score", "qa_outputs"}
    fresh = loaded.qa_outputs if head == "question" else loaded.score
    assert 0 < fresh.weight.std() < 1
    assert fresh.bias is None or not fresh.bias.any()


def test_sequence_is_judged_by_its_last_token_that_is_no_padding(family, tokens):
    model = tiny_head("sequence", family)
    alone = outputs_of(model, tokens[:1, :12])
    right = tokens.clone()
    right[0, 12:] = 0
    mask = (right != 0).long()
    torch.testing.assert_close(outputs_of(model, right, attention_mask=mask)[:1], alone)
    by_hand = model.score(model.model(tokens[:1, :12])[0][:, -1])
    torch.testing.assert_close(alone, by_hand)


def test_sequences_of_several_rows_need_a_pad_token(tokens):
    model = tiny_head("sequence", pad_token_id=None)
    assert outputs_of(model, tokens[:1]).shape == (1, LABELS)
    with pytest.raises(ValueError, match="padding token"):
        model(tokens)


def test_token_head_drops_out_at_the_configured_rate():
    assert tiny_head("token", dropout=0.3).dropout.p == 0.3


@pytest.mark.parametrize(
    ("problem", "labels", "loss"),
    [
        ("regression", torch.linspace(-1, 2, 2 * LABELS).view(2, -1), nn.functional.mse_loss),
        (
            "multi_label_classification",
            torch.eye(LABELS)[:2],
            nn.functional.binary_cross_entropy_with_logits,
        ),
    ],
    ids=["regression", "multi-label"],
)
def test_sequence_head_has_the_loss_of_its_problem(problem, labels, loss, tokens):
    model = tiny_head("sequence", problem_type=problem)
    out = model(tokens, labels=labels)
    torch.testing.assert_close(out.loss, loss(out.logits, labels))
