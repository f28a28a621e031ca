"""Exports to native checkpoints: which format, what it cannot express, and who can load it."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from compat import OVERLAYS, find_environment
from conftest import FAMILIES, tiny_config, tiny_model
from references import REFERENCES, ROPE
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from hf_nanogpt import (
    NanoGPTConfig,
    generate_text,
    list_presets,
    load_checkpoint,
    load_preset,
    train_tokenizer,
)
from hf_nanogpt.convert import convert_checkpoint, export_checkpoint, find_native_format, onnx
from hf_nanogpt.convert.native import FORMATS as NATIVE
from hf_nanogpt.convert.native import make_native_config

TEXT = "héllo wörld 日本語 12345  foo\n\n\tit's<|endoftext|>😀<|im_end|>"
TOKENIZER = train_tokenizer(["hello world, wörld it's 123\n foo"] * 9, kind="bpe", vocab_size=270)
TOKENIZER.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
FORMATS = {
    "nano": "qwen3",
    "gpt1": "gpt1",
    "gpt2": "gpt2",
    "gpt3": "gpt_neo",
    "llama": "llama",
    "qwen3": "qwen3",
    "nanochat": "nanochat",
}


def save_checkpoint(family, folder, **overrides):
    """Write a tiny checkpoint of ours with a tokenizer; its norms and biases are random."""
    torch.manual_seed(3)
    model = tiny_model(family, vocab_size=len(TOKENIZER), **overrides)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and not (family == "gpt3" and ".self_attn." in name):
                parameter.normal_(0.5, 0.2)  # GPT-Neo lacks the biases of q, k and v
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return model


def test_every_preset_exports_as_the_format_of_its_family():
    assert set(FORMATS) == set(FAMILIES)
    for preset in list_presets():
        family = preset.split("-")[0]
        assert find_native_format(load_preset(preset)) == FORMATS[family], preset


@pytest.mark.parametrize("name", REFERENCES)
def test_without_an_initializer_range_each_class_has_its_own(name):
    reference = REFERENCES[name]
    config_class = getattr(transformers, reference.architecture).config_class
    native = NATIVE[reference.format]
    config = NanoGPTConfig(**native.import_config(config_class(**reference.settings).to_dict()))
    config.initializer_range = None
    made, plain = make_native_config(config, reference.format)[1], config_class()
    field = "init_std" if reference.format == "opt" else "initializer_range"
    assert getattr(made, field) == getattr(plain, field)


def there_and_back(family, place, **overrides):
    """Return the tensors of a checkpoint of ours, and what comes back from the export."""
    save_checkpoint(family, place / "ours", **overrides)
    export_checkpoint(place / "ours", place / "native")
    convert_checkpoint(place / "native", place / "back")
    return [load_file(place / name / "model.safetensors") for name in ("ours", "back")]


def test_what_we_train_comes_back_from_its_native_format_to_the_bit(family, tmp_path):
    first, last = there_and_back(family, tmp_path, n_embd=64, n_head=4, head_dim=16)
    assert first.keys() == last.keys()
    assert all(first[name].equal(last[name]) for name in first)


def test_gpt_neos_queries_are_rounded_where_the_root_of_head_dim_is_no_power_of_two(tmp_path):
    first, last = there_and_back("gpt3", tmp_path, n_embd=32, n_head=4)
    changed = {name for name in first if not first[name].equal(last[name])}
    assert changed == {f"model.layers.{n}.self_attn.q_proj.weight" for n in range(3)}
    for name in changed:
        torch.testing.assert_close(last[name], first[name], rtol=2.5e-7, atol=0)


# What a format cannot express: (family, change, format, the field that the message names).
OBSTACLES = [
    ("nano", {"final_logit_softcapping": 15.0}, "qwen3", "final_logit_softcapping=15.0"),
    ("nano", {}, "llama", "qk_norm=True"),
    ("nano", {"mlp_bias": True}, "qwen3", "mlp_bias=True"),
    ("nano", {"embedding_norm": True}, "qwen3", "embedding_norm=True"),
    ("nano", {"norm_type": "layernorm"}, "qwen3", "norm_type='layernorm'"),
    ("llama", {"sliding_window": 5}, "llama", "layer_types="),
    ("llama", {"n_embd": 30, "head_dim": 8}, "llama", "hidden size .30. is not a multiple"),
    ("gpt2", {"num_key_value_heads": 2}, "gpt2", "num_key_value_heads=2"),
    ("gpt2", {"head_dim": 16}, "gpt2", "head_dim=16"),
    ("gpt2", {"norm_position": "post", "intermediate_size": 65}, "gpt1", "intermediate_size=65"),
    ("gpt1", {"hidden_act": "gelu"}, "gpt1", "hidden_act='gelu'"),
    ("gpt3", {}, "gpt2", "layer_types="),
    (
        "nanochat",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
        "nanochat",
        "rope_parameters=",
    ),
]


@pytest.mark.parametrize(("family", "change", "target", "field"), OBSTACLES)
def test_a_setting_that_a_format_cannot_express_is_named(family, change, target, field, tmp_path):
    save_checkpoint(family, tmp_path / "ours", **change)
    with pytest.raises(ValueError, match=f"{target} cannot express this model: .*{field}"):
        export_checkpoint(tmp_path / "ours", tmp_path / "native", to=target)
    assert not (tmp_path / "native").exists()


def test_auto_names_the_nearest_format_and_the_one_setting_that_it_lacks(tmp_path):
    config = tiny_config("nano", final_logit_softcapping=15.0)
    assert find_native_format(config) is None
    save_checkpoint("nano", tmp_path / "ours", final_logit_softcapping=15.0)
    reason = r"qwen3 cannot express this model: final_logit_softcapping=15.0 \(only None\)\."
    with pytest.raises(ValueError, match=reason):
        export_checkpoint(tmp_path / "ours", tmp_path / "native")


def test_a_trained_bias_that_gpt_neo_lacks_is_named(tmp_path):
    model = save_checkpoint("gpt3", tmp_path / "ours")
    model.model.layers[1].self_attn.q_proj.bias.data[3] = 0.1
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj\.bias' is not zero"):
        export_checkpoint(tmp_path / "ours", tmp_path / "native")


@pytest.mark.parametrize("target", ["gpt2", "gpt_neo"])
def test_biases_that_ours_lacks_are_zeros_there(target, tmp_path):
    model = save_checkpoint("gpt2", tmp_path / "ours", bias=False)
    exported = export_checkpoint(tmp_path / "ours", tmp_path / "native", to=target)
    convert_checkpoint(exported.folder, tmp_path / "back")
    back, _ = load_checkpoint(tmp_path / "back")
    tokens = torch.arange(20)[None]
    assert back.config.attention_bias and not model.config.attention_bias
    torch.testing.assert_close(back(tokens).logits, model(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "target", "given", "expected"),
    [
        ("gpt2", "gpt2", {"dropout": 0.25}, (0.25, None)),
        ("gpt2", "gpt2", {"dropout": 0.25, "attention_dropout": 0.0}, (0.25, 0.0)),
        ("gpt2", "gpt_neo", {"bias": False, "dropout": 0.1, "attention_dropout": 0.2}, (0.1, 0.2)),
        ("gpt1", "gpt1", {"attention_dropout": 0.2}, (0.0, 0.2)),
        ("llama", "llama", {"dropout": 0.25}, (0.0, 0.25)),
        ("llama", "llama", {"dropout": 0.25, "attention_dropout": 0.0}, (0.0, None)),
        ("llama", "llama", {"dropout": 0.0}, (0.0, None)),
        ("nanochat", "nanochat", {"attention_dropout": 0.5}, (0.0, 0.5)),
        ("gpt2", "opt", {"dropout": 0.1, "attention_dropout": 0.2}, (0.0, 0.2)),
    ],
)
def test_dropout_is_kept_where_the_format_has_it(family, target, given, expected, tmp_path):
    save_checkpoint(family, tmp_path / "ours", **given)
    export_checkpoint(tmp_path / "ours", tmp_path / "native", to=target)
    convert_checkpoint(tmp_path / "native", tmp_path / "back")
    config = load_checkpoint(tmp_path / "back")[0].config
    assert (config.dropout, config.attention_dropout) == expected


def test_tokenizer_and_generation_settings_come_along_both_ways(tmp_path):
    save_checkpoint("gpt2", tmp_path / "ours")
    settings = GenerationConfig(do_sample=True, temperature=0.7, top_k=9, eos_token_id=[0, 5])
    settings.save_pretrained(tmp_path / "ours")
    exported = export_checkpoint(tmp_path / "ours", tmp_path / "native")
    converted = convert_checkpoint(tmp_path / "native", tmp_path / "back")
    assert exported.has_tokenizer and converted.has_tokenizer
    model, tokenizer = load_checkpoint(tmp_path / "back")
    assert tokenizer(TEXT).input_ids == TOKENIZER(TEXT).input_ids
    assert (model.generation_config.temperature, model.generation_config.top_k) == (0.7, 9)
    assert model.generation_config.eos_token_id == [0, 5]
    config = (tmp_path / "back" / "tokenizer_config.json").read_text(encoding="utf-8")
    assert "is_local" not in config


def test_an_export_ends_a_text_where_our_generate_ends_it(tmp_path):
    model = save_checkpoint("nano", tmp_path / "ours", eos_token_id=None)
    torch.nn.init.zeros_(model.lm_head.weight)  # then the first token, eos, always comes
    model.save_pretrained(tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "native")
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    ids = torch.tensor([[7, 8, 9]])
    found = native.generate(ids, do_sample=False, max_new_tokens=9)
    assert found.tolist() == [[7, 8, 9, TOKENIZER.eos_token_id]]
    assert generate_text(model, TOKENIZER, "x", temperature=0) == ["x"]
    assert onnx._describe(model, TOKENIZER)["eos_token_id"] == str(TOKENIZER.eos_token_id)


@pytest.mark.parametrize("tied", [True, False])
def test_a_gpt2_is_stored_as_openais_files_are_unless_it_has_a_head_of_its_own(tied, tmp_path):
    model = save_checkpoint("gpt2", tmp_path / "ours", tie_word_embeddings=tied)
    export_checkpoint(tmp_path / "ours", tmp_path / "native")
    stored = load_file(tmp_path / "native" / "model.safetensors")
    assert ("wte.weight" in stored, "lm_head.weight" in stored) == (tied, not tied)
    assert tied or "transformer.wte.weight" in stored
    fields = json.loads((tmp_path / "native" / "config.json").read_text(encoding="utf-8"))
    assert fields["n_ctx"] == fields["n_positions"] == model.config.max_position_embeddings
    native, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "native", output_loading_info=True
    )
    assert not any(report.values()), report
    ids = torch.tensor([[7, 8, 9]])
    torch.testing.assert_close(native(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


def test_another_tokenizer_gives_a_converted_model_its_special_tokens(tmp_path):
    save_checkpoint("gpt2", tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "native")
    settings = GenerationConfig(temperature=0.7, do_sample=True, eos_token_id=[0, 5])
    other = train_tokenizer([], kind="byte")
    for eos, expected in ((None, [0, 5]), ("a", other.get_vocab()["a"])):
        other.eos_token = eos
        settings.save_pretrained(tmp_path / "native")
        other.save_pretrained(tmp_path / f"other-{eos}")
        convert_checkpoint(
            tmp_path / "native", tmp_path / f"{eos}", tokenizer=tmp_path / f"other-{eos}"
        )
        model, _ = load_checkpoint(tmp_path / f"{eos}")
        assert model.generation_config.eos_token_id == expected
        assert model.generation_config.temperature == 0.7


def test_a_checkpoint_without_a_tokenizer_is_exported_without(tmp_path):
    tiny_model("nano").save_pretrained(tmp_path / "ours")
    exported = export_checkpoint(tmp_path / "ours", tmp_path / "native")
    assert exported.format == "qwen3" and not exported.has_tokenizer
    assert exported.num_parameters == tiny_model("nano").num_parameters()


def test_a_foreign_checkpoint_is_not_exported(tmp_path):
    save_checkpoint("nano", tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "native")
    with pytest.raises(
        ValueError, match=r"config\.json belongs to a qwen3 model, and only our own"
    ):
        export_checkpoint(tmp_path / "native", tmp_path / "again")


def test_an_unknown_format_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(ValueError, match=r"to='gpt-2' is unknown\. Did you mean gpt2"):
        export_checkpoint(tmp_path / "ours", tmp_path / "native", to="gpt-2")


# Run where hf_nanogpt cannot be imported: prints the class of each folder's model.
PLAIN = """
import sys
sys.modules["hf_nanogpt"] = None
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
file, text, *folders = sys.argv[1:]
expected = load_file(file)
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    torch.testing.assert_close(logits, expected[folder], rtol=0, atol=1e-5, msg=folder)
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=8, min_new_tokens=8)
    assert tokens.equal(expected[folder + "/text"]), folder
    print(type(model).__name__)
"""


# The last release of transformers 4, without nanochat. `python tests/test_export.py` installs it.
OLD = "4.57.6"
SCALED = {
    kind: {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **settings}}
    for kind, settings in ROPE.items()
}
MODELS = {family: (family, {}) for family in FAMILIES}
OLD_MODELS = {family: (family, {}) for family in FAMILIES if family != "nanochat"}
OLD_MODELS |= {"base_500": ("nano", {"rope_theta": 500.0})}
OLD_MODELS |= {k: ("nano", rope) for k, rope in SCALED.items() if k != "proportional"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "release",
    [
        "installed",
        pytest.param(
            OLD,
            marks=pytest.mark.skipif(
                not (OVERLAYS / OLD / ".ready").is_file(), reason=f"transformers {OLD} is not there"
            ),
        ),
    ],
)
def test_exports_load_in_plain_transformers_where_hf_nanogpt_is_not(release, tmp_path):
    expected, folders = {}, []
    variables = find_environment(OLD) if release == OLD else None
    ids = torch.tensor([TOKENIZER(TEXT).input_ids])
    for name, (family, overrides) in (OLD_MODELS if release == OLD else MODELS).items():
        model = save_checkpoint(family, tmp_path / name, **overrides)
        folders.append(str(export_checkpoint(tmp_path / name, tmp_path / f"{name}-n").folder))
        with torch.no_grad():
            expected[folders[-1]] = model(ids).logits
        expected[folders[-1] + "/text"] = model.generate(
            ids, do_sample=False, max_new_tokens=8, min_new_tokens=8
        )
    save_file(expected, tmp_path / "expected.safetensors")
    command = [sys.executable, "-P", "-c", PLAIN, str(tmp_path / "expected.safetensors"), TEXT]
    result = subprocess.run([*command, *folders], capture_output=True, text=True, env=variables)
    assert result.returncode == 0, result.stderr
    if release == OLD:
        assert len(result.stdout.split()) == len(folders)
        return
    assert result.stdout.split() == [
        "Qwen3ForCausalLM",
        "OpenAIGPTLMHeadModel",
        "GPT2LMHeadModel",
        "GPTNeoForCausalLM",
        "LlamaForCausalLM",
        "Qwen3ForCausalLM",
        "NanoChatForCausalLM",
    ]


if __name__ == "__main__":
    find_environment(OLD)
