"""Folders: what is saved comes back bit for bit, here and where our package is not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, assert_same, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import hf_nanogpt
from hf_nanogpt import NanoGPTForCausalLM, NanoGPTForSequenceClassification, NanoGPTModel

AUTO_MAP = {
    "AutoConfig": "configuration_nanogpt.NanoGPTConfig",
    "AutoModel": "modeling_nanogpt.NanoGPTModel",
    "AutoModelForCausalLM": "modeling_nanogpt.NanoGPTForCausalLM",
    "AutoModelForSequenceClassification": "modeling_nanogpt.NanoGPTForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_nanogpt.NanoGPTForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_nanogpt.NanoGPTForQuestionAnswering",
}
CODE = ["configuration_nanogpt.py", "modeling_nanogpt.py"]


def assert_same_model(loaded, model, tokens) -> None:
    """Compare weights to the bit, and what the models make of them up to rounding."""
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in loaded.state_dict().items())
    assert_same(loaded(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize("tied", [True, False])
def test_saved_model_comes_back_exactly(family, tied, tokens, tmp_path):
    model = tiny_model(family, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is NanoGPTForCausalLM
    assert_same_model(loaded, model, tokens)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    stored = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in stored) is not tied
    assert len(stored) == len(list(model.parameters()))  # and not one buffer


def test_folder_holds_safetensors_and_code_but_no_pickle(tmp_path):
    tiny_model("nano").save_pretrained(tmp_path)
    files = {"config.json", "generation_config.json", "model.safetensors", *CODE}
    assert {path.name for path in tmp_path.iterdir()} == files


def test_model_in_shards_comes_back_exactly(tokens, tmp_path):
    model = tiny_model("nano")
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path), model, tokens)


def test_every_class_writes_the_whole_auto_map_and_the_code(tmp_path):
    for kind in (NanoGPTModel, NanoGPTForCausalLM, NanoGPTForSequenceClassification):
        folder = tmp_path / kind.__name__
        kind(tiny_config("nano")).save_pretrained(folder)
        assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
        for name in CODE:
            source = Path(hf_nanogpt.__file__).parent / name
            assert (folder / name).read_bytes() == source.read_bytes()


def test_trunk_and_language_model_load_each_other(family, tokens, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "whole")
    trunk = AutoModel.from_pretrained(tmp_path / "whole")
    assert type(trunk) is NanoGPTModel
    assert_same_model(trunk, model.model, tokens)
    trunk.save_pretrained(tmp_path / "trunk")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "trunk")
    assert_same_model(whole.model, trunk, tokens)


@pytest.mark.parametrize("how", [{}, {"device_map": "cpu"}, {"low_cpu_mem_usage": True}], ids=str)
def test_nothing_stays_behind_on_the_meta_device(family, how, tokens, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    loaded = NanoGPTForCausalLM.from_pretrained(tmp_path, **how)
    assert not [n for n, p in loaded.named_parameters() if p.is_meta]
    buffers = dict(loaded.named_buffers())
    assert buffers.keys() == dict(model.named_buffers()).keys()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    assert_same_model(loaded, model, tokens)


@pytest.mark.parametrize("rope_type", ["default", "linear", "yarn"])
def test_rotary_frequencies_are_there_right_after_loading(rope_type, tmp_path):
    rope = {"rope_type": rope_type, "rope_theta": 500.0, "factor": 2.0}
    rope |= {"original_max_position_embeddings": 32} if rope_type == "yarn" else {}
    model = tiny_model("nano", rope_parameters=rope)
    model.save_pretrained(tmp_path)
    rotary = AutoModelForCausalLM.from_pretrained(tmp_path).model.rotary_emb
    assert torch.equal(rotary.inv_freq, model.model.rotary_emb.inv_freq)
    assert torch.equal(rotary.original_inv_freq, model.model.rotary_emb.inv_freq)
    assert rotary.attention_scaling == model.model.rotary_emb.attention_scaling
    by_hand = 500.0 ** (-torch.arange(0, 8, 2) / 8)
    if rope_type != "yarn":
        torch.testing.assert_close(rotary.inv_freq, by_hand / (2 if rope_type == "linear" else 1))


def test_dtype_of_the_folder_is_kept_and_rotary_frequencies_stay_exact(family, tokens, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "float32")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "bfloat16")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.config.dtype == loaded.dtype == torch.bfloat16
    assert all(buffer.dtype == torch.float32 for buffer in loaded.buffers())
    logits = loaded(tokens).logits
    assert logits.dtype == torch.bfloat16
    assert all(torch.equal(t, half.state_dict()[name]) for name, t in loaded.state_dict().items())
    torch.testing.assert_close(logits.float(), model(tokens).logits, rtol=0, atol=0.2)


def test_a_field_replaced_while_a_model_loads_is_what_the_model_computes_with(tokens, tmp_path):
    model = tiny_model("llama", num_key_value_heads=4)
    model.save_pretrained(tmp_path)
    replaced = {"n_head": 8, "rope_theta": 500.0, "bias": True}
    for load in (NanoGPTForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        loaded = load(tmp_path, **replaced)
        expected = NanoGPTForCausalLM(tiny_config("llama", num_key_value_heads=8, **replaced))
        expected.load_state_dict(model.state_dict(), strict=False)  # new biases are zero
        assert_same(loaded(tokens).logits, expected.eval()(tokens).logits)
        assert not torch.allclose(loaded(tokens).logits, model(tokens).logits, atol=1e-2)


def load_without(folder, name):
    """Take one tensor out of a saved model and return what loading makes of it."""
    weights = load_file(folder / "model.safetensors")
    removed = weights.pop(name)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    torch.manual_seed(7)
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert set(info["missing_keys"]) == {name}
    state = loaded.state_dict()
    assert all(torch.equal(state[other], weights[other]) for other in weights)
    return state[name], removed


ONES = ["model.norm.weight", "model.layers.1.self_attn.q_norm.weight"]
ONES += ["model.layers.2.post_attention_layernorm.weight"]


@pytest.mark.parametrize("name", ONES)
def test_missing_norm_weight_is_one(name, tmp_path):
    model = tiny_model("nano")
    with torch.no_grad():
        model.get_parameter(name).fill_(3.0)
    model.save_pretrained(tmp_path)
    found, removed = load_without(tmp_path, name)
    assert (removed == 3).all()
    assert (found == 1).all()


@pytest.mark.parametrize("initializer_range", [0.2, None])
@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.2.mlp.down_proj.weight",
    ],
)
def test_missing_matrix_is_initialised_as_in_a_new_model(name, initializer_range, tmp_path):
    model = tiny_model("nano", initializer_range=initializer_range)
    fresh = model.get_parameter(name).detach().clone()
    with torch.no_grad():
        model.get_parameter(name).fill_(3.0)
    model.save_pretrained(tmp_path)
    found, _ = load_without(tmp_path, name)
    assert found.std().item() == pytest.approx(fresh.std().item(), rel=0.15)
    assert found.mean().abs() < 0.1


def test_missing_bias_is_zero(tmp_path):
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.bias.fill_(3.0)
    model.save_pretrained(tmp_path)
    found, _ = load_without(tmp_path, "model.layers.0.mlp.up_proj.bias")
    assert not found.any()


# Remote code. The package may be installed in the environment, so the child process first makes it
# impossible to import: an entry of None in sys.modules is Python's own way to say so.
CHILD = """
import importlib.util, pathlib, sys
sys.modules["hf_nanogpt"] = None
assert importlib.util.find_spec("hf_nanogpt") is None
import torch
import transformers
from safetensors.torch import load_file

root, threads, *code = sys.argv[1:]
root = pathlib.Path(root)
torch.set_num_threads(int(threads))
expected = load_file(root / "expected.safetensors")
tokens = expected.pop("tokens")


def load(auto_class, folder):
    model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    return model


try:
    transformers.AutoConfig.from_pretrained(root / "nano", trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error)
else:
    raise AssertionError("code ran without having been trusted")
config = transformers.AutoConfig.from_pretrained(root / "nano", trust_remote_code=True)
assert (config.model_type, config.n_layer) == ("nanogpt", 3)

for name, logits in expected.items():
    folder, auto_class = name.split("/")
    model = load(auto_class, root / folder)
    assert torch.equal(model(tokens)[0], logits), name
    again = root / "again" / folder / auto_class
    model.save_pretrained(again)
    assert all((again / f).read_bytes() == (root / folder / f).read_bytes() for f in code), name
    assert torch.equal(load(auto_class, again)(tokens)[0], logits), name
    if auto_class == "AutoModelForCausalLM":
        mask = torch.ones_like(tokens)
        text = model.generate(tokens, attention_mask=mask, max_new_tokens=3, eos_token_id=None)
        assert text.shape == (2, 23)
        model.train()(tokens, labels=tokens).loss.backward()
        assert all(p.grad is not None for p in model.parameters())
print("all well")
"""


@pytest.mark.slow
@torch.no_grad()
def test_folder_works_where_the_package_cannot_be_imported(tokens, tmp_path):
    expected = {"tokens": tokens}
    for family in FAMILIES:
        tiny_model(family).save_pretrained(tmp_path / family)
        # The reference is loaded, too, and has as many threads: then all bits are the same.
        model = AutoModelForCausalLM.from_pretrained(tmp_path / family)
        expected[f"{family}/AutoModelForCausalLM"] = model(tokens).logits
    expected["nano/AutoModel"] = AutoModel.from_pretrained(tmp_path / "nano")(tokens)[0]
    for auto_class in [name for name in AUTO_MAP if "Classification" in name or "Question" in name]:
        torch.manual_seed(0)
        head = getattr(hf_nanogpt, AUTO_MAP[auto_class].split(".")[1])(tiny_config("nano")).eval()
        head.save_pretrained(tmp_path / auto_class)
        head = type(head).from_pretrained(tmp_path / auto_class)
        expected[f"{auto_class}/{auto_class}"] = head(tokens)[0].contiguous()
    save_file(expected, tmp_path / "expected.safetensors")
    child = subprocess.run(
        [sys.executable, "-I", "-c", CHILD, str(tmp_path), str(torch.get_num_threads()), *CODE],
        cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.stdout.strip() == "all well", child.stderr
