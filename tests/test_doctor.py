"""`doctor` passes if all is right, and finds a fault in the mask, the sine, the cache or a copy."""

from importlib.metadata import version

import pytest
import torch
from conftest import tiny_model
from transformers import DynamicCache

from hf_nanogpt import modeling_nanogpt, train_tokenizer
from hf_nanogpt.analysis import doctor
from hf_nanogpt.analysis.doctor import check_installation, check_model, describe_environment
from hf_nanogpt.cli import main

CACHED, GENERATE = "cached logits", "generate gives"
LEAK, NATIVE, COPY, SPREAD = "no token sees", "logits equal those", "a saved copy", "logits are"


def failed(findings):
    return {finding.check for finding in findings if not finding.is_right}


def fails(check, findings):
    return any(name.startswith(check) for name in failed(findings))


@pytest.fixture
def model():
    return tiny_model("nano", initializer_range=0.3)


@pytest.mark.slow  # nano, gpt2 and gpt3 are what the next test checks
def test_all_checks_pass_for_every_family(family):
    findings = list(check_model(family, tiny_model(family, initializer_range=0.3)))
    assert len(findings) == 6
    assert not failed(findings)


def test_without_a_checkpoint_three_models_are_checked_and_no_random_number_is_used():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    findings = list(check_installation())
    assert {finding.model for finding in findings} == {"tiny nano", "tiny gpt2", "tiny gpt3-125m"}
    assert not failed(findings)
    assert torch.equal(torch.rand(1), expected)


def test_a_mask_that_shows_the_future_is_found(model, monkeypatch):
    def see_all(config, inputs_embeds, **_):
        length = inputs_embeds.shape[1]
        return dict.fromkeys(config.layer_types, torch.zeros(1, 1, length, length))

    monkeypatch.setattr(modeling_nanogpt, "create_masks_for_generate", see_all)
    findings = list(check_model("broken", model))
    assert fails(LEAK, findings)
    assert fails(NATIVE, findings)


def test_a_sine_of_the_wrong_sign_is_found(model):
    rotate = modeling_nanogpt.apply_rotary_pos_emb
    for layer in model.model.layers:
        layer.self_attn.apply_rotary_pos_emb = lambda q, k, cos, sin: rotate(q, k, cos, -sin)
    findings = list(check_model("broken", model))
    assert fails(NATIVE, findings)


def test_a_cache_that_loses_what_it_holds_is_found(model, monkeypatch):
    update = DynamicCache.update

    def forget(self, keys, values, *args, **kwargs):
        return update(self, 0 * keys, values, *args, **kwargs)

    monkeypatch.setattr(DynamicCache, "update", forget)
    findings = list(check_model("broken", model))
    assert fails(CACHED, findings)


def test_a_cache_passed_by_an_unknown_name_is_found(model, monkeypatch):
    # What 5.24 did to a model that knew only `past_key_values`: nobody reads the cache.
    def ignore(past_key_values, kwargs):
        kwargs.pop("cache", None)

    monkeypatch.setattr(modeling_nanogpt, "take_cache", ignore)
    findings = list(check_model("broken", model))
    assert fails(CACHED, findings)
    assert fails(GENERATE, findings)


def test_weights_that_load_differently_are_found(model, monkeypatch):
    load = type(model).from_pretrained.__func__

    def damage(cls, *args, **kwargs):
        loaded = load(cls, *args, **kwargs)
        loaded.lm_head.weight.data[0, 0] += 1
        return loaded

    monkeypatch.setattr(type(model), "from_pretrained", classmethod(damage))
    assert fails(COPY, check_model("broken", model))


def test_an_untrained_nano_is_reported_as_proving_nothing():
    [finding] = check_model("fresh", tiny_model("nano", initializer_range=None))
    assert fails(SPREAD, [finding])
    assert "train this model first" in finding.detail


def test_an_extra_lacks_the_packages_that_its_inner_extra_lacks(monkeypatch):
    pytest.importorskip("lm_eval")
    # `serve` is transformers[serving]: transformers is always installed, uvicorn may not be.
    monkeypatch.setattr(
        doctor, "_version", lambda name: "not installed" if name == "uvicorn" else version(name)
    )
    facts = describe_environment()
    assert "serve (uvicorn)" in facts["extras that lack a package"]
    assert "serve" not in facts["extras"].split(", ")
    assert "eval" in facts["extras"].split(", ")


def test_the_command_prints_versions_and_findings(tmp_path, capsys):
    tiny_model("nano", initializer_range=0.3, vocab_size=257).save_pretrained(tmp_path)
    train_tokenizer([], kind="byte").save_pretrained(tmp_path)
    assert main(["doctor", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for name, value in describe_environment().items():
        assert f"{name} " in text
        assert value in text
    assert "All checks passed." in text


def test_the_command_fails_if_a_check_does(tmp_path, monkeypatch, capsys):
    tiny_model("nano", initializer_range=None).save_pretrained(tmp_path)
    model = doctor.AutoModelForCausalLM.from_pretrained(tmp_path)
    monkeypatch.setattr(doctor, "load_checkpoint", lambda checkpoint: (model, None))
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "fresh"])
    assert stop.value.code == 1
    assert "1 of 1 checks failed" in capsys.readouterr().out
