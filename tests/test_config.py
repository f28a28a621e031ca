"""The configuration: names, derived values, refusals, files, and the table of presets."""

import copy
import json

import pytest
import torch
from conftest import FAMILIES, tiny_config
from transformers import AutoConfig, LlamaConfig, Qwen3Config
from transformers.utils import logging

from hf_nanogpt import NanoGPTConfig, NanoGPTForCausalLM, list_presets, load_preset, presets
from hf_nanogpt.cli import main
from hf_nanogpt.errors import UserError

SHORT = {
    "n_layer": (3, "num_hidden_layers"),
    "n_head": (2, "num_attention_heads"),
    "n_embd": (24, "hidden_size"),
    "n_inner": (50, "intermediate_size"),
    "block_size": (17, "max_position_embeddings"),
    "n_positions": (18, "max_position_embeddings"),
}


@pytest.mark.parametrize("short", SHORT)
def test_short_name_and_full_name_are_one_field(short):
    value, name = SHORT[short]
    by_short = NanoGPTConfig(**{"hidden_size": 24, "num_attention_heads": 2} | {short: value})
    by_name = NanoGPTConfig(**{"hidden_size": 24, "num_attention_heads": 2} | {name: value})
    assert by_short.to_dict() == by_name.to_dict()
    assert getattr(by_short, short) == getattr(by_short, name) == value
    setattr(by_short, short, value + 1)
    assert getattr(by_short, name) == value + 1


@pytest.mark.parametrize("bias", [True, False])
def test_bias_sets_both_biases(bias):
    config = NanoGPTConfig(bias=bias)
    assert config.attention_bias is config.mlp_bias is bias
    assert "bias" not in config.to_dict()


def test_values_left_out_are_derived():
    glu, mlp = NanoGPTConfig(n_embd=768, n_head=6), NanoGPTConfig(n_embd=768, mlp_type="mlp")
    assert (glu.head_dim, glu.num_key_value_heads) == (128, 6)
    assert glu.intermediate_size == 2048  # 768 * 8 / 3
    assert NanoGPTConfig(n_embd=64, n_head=2).intermediate_size == 192  # 170.7, up to 32 * 6
    assert mlp.intermediate_size == 3072
    assert glu.layer_types == ["full_attention"] * 12
    assert NanoGPTConfig(n_layer=2, sliding_window=8).layer_types == ["sliding_attention"] * 2
    assert glu.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert NanoGPTConfig(position_embedding_type="learned").rope_parameters is None


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5},
        {"rope_scaling": YARN},
        {"rope_scaling": YARN, "rope_theta": 5e5},
        {"rope_parameters": YARN, "rope_theta": 5e5},
        {"rope_parameters": YARN | {"rope_theta": 5e5}, "rope_theta": 5e5},
        {"rope_parameters": {"rope_theta": 5e5}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5},
    ],
    ids=str,
)
def test_older_names_of_rope_mean_what_they_mean_in_llama(fields):
    given = copy.deepcopy(fields)
    llama = LlamaConfig(**copy.deepcopy(fields) | {"max_position_embeddings": 1024})
    assert NanoGPTConfig(**given).rope_parameters == llama.rope_parameters
    assert given == fields  # a dictionary of the caller is left as it was


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("n_layers", "n_layer"), ("hiden_size", "hidden_size"), ("droput", "dropout")],
)
@pytest.mark.parametrize("make", [NanoGPTConfig, lambda **kw: load_preset("nano", **kw)])
def test_unknown_field_is_refused_with_the_nearest_name(make, name, nearest):
    with pytest.raises(ValueError, match=rf"{name}=7 .*Did you mean '{nearest}'\?"):
        make(**{name: 7})


def test_unknown_field_far_from_all_names_lists_the_fields():
    with pytest.raises(ValueError, match=r"xyzzy=1 .*Known: .*'hidden_size'"):
        NanoGPTConfig(xyzzy=1)


SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"]
SIZES += ["num_attention_heads", "num_key_value_heads", "max_position_embeddings", "sliding_window"]
REFUSED = [({name: 0}, [f"{name}=0", "at least"]) for name in SIZES] + [
    ({"sliding_window": 1}, ["sliding_window=1", "at least 2"]),
    (
        {"n_layer": 1, "layer_types": ["full_attention"], "sliding_window": 5},
        ["sliding_window=5", "layer_types", "None"],
    ),
    ({"hidden_size": 768, "n_embd": 64}, ["hidden_size=768", "n_embd=64"]),
    ({"n_positions": 64, "block_size": 32}, ["n_positions=64", "block_size=32"]),
    ({"attention_bias": False, "bias": True}, ["attention_bias=False", "bias=True"]),
    (
        {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}},
        ["500000", "10000", "rope_theta"],
    ),
    (
        {"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_theta": 1e4}},
        ["rope_scaling", "rope_parameters"],
    ),
    ({"position_embedding_type": "learned", "rope_theta": 5e5}, ["rope_theta", "'learned'"]),
    ({"n_embd": 10, "n_head": 4}, ["hidden_size (n_embd)=10", "n_head)=4", "or set head_dim"]),
    ({"n_head": 12, "num_key_value_heads": 5}, ["num_key_value_heads=5", "=12", "divisors"]),
    ({"n_embd": 12, "n_head": 4}, ["head_dim=3 is odd", "position_embedding_type='learned'"]),
    ({"n_layer": 2, "layer_types": ["full_attention"]}, ["layer_types", "num_hidden_layers=2"]),
    ({"n_layer": 1, "layer_types": ["banded"]}, ["banded", "full_attention", "sliding_attention"]),
    ({"n_layer": 1, "layer_types": ["sliding_attention"]}, ["layer_types", "set sliding_window"]),
    ({"hidden_act": "gleu"}, ["hidden_act='gleu'", "'gelu'", "'silu'"]),
    ({"dropout": 1.5}, ["dropout=1.5", "at least 0 and below 1"]),
    ({"dropout": -0.1}, ["dropout=-0.1", "at least 0"]),
    ({"attention_dropout": 1.0}, ["attention_dropout=1.0", "at least 0 and below 1"]),
]


@pytest.mark.parametrize(("fields", "parts"), REFUSED, ids=[str(row[0]) for row in REFUSED])
def test_refusal_names_the_field_the_value_and_the_remedy(fields, parts):
    with pytest.raises(ValueError) as caught:
        NanoGPTConfig(**fields)
    assert [part for part in parts if part not in str(caught.value)] == []


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        {"rope_parameters": {"rope_type": "nonsense"}},
        {"final_logit_softcapping": 0.0},
        {"initializer_range": 0.0},
        {"initializer_range": -0.1},
    ],
    ids=str,
)
def test_value_that_the_model_cannot_honour_is_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        NanoGPTConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [{"norm_type": "batchnorm"}, {"mlp_type": "moe"}, {"n_layer": 2.5}, {"norm_eps": "1e-5"}],
    ids=str,
)
def test_value_of_the_wrong_type_is_refused_by_field(fields):
    name = NanoGPTConfig.attribute_map.get(*fields, next(iter(fields)))
    with pytest.raises(Exception, match=name):
        NanoGPTConfig(**fields)


def test_config_made_wrong_after_creation_is_refused_when_saved(tmp_path):
    config = NanoGPTConfig(n_layer=2)
    config.layer_types = ["full_attention"]
    with pytest.raises(Exception, match="num_hidden_layers=2"):
        config.save_pretrained(tmp_path)


def test_config_survives_a_file(family, tmp_path):
    config = tiny_config(family)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, NanoGPTConfig)
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}
    assert NanoGPTConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize("load", [AutoConfig.from_pretrained, NanoGPTConfig.from_pretrained])
def test_extra_keys_of_a_saved_config_are_kept(load, tmp_path):
    tiny_config("nano").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    stored = json.loads(file.read_text()) | {"from_the_future": 5}
    for left_out in ({}, {"transformers_version"}):
        file.write_text(json.dumps({key: stored[key] for key in stored if key not in left_out}))
        assert load(tmp_path).from_the_future == 5


LINEAR = {"rope_type": "linear", "factor": 2.0}
REPLACED = [
    {"dropout": 0.25},
    {"bias": True},
    {"n_layer": 3},
    {"block_size": 8, "n_head": 2, "num_key_value_heads": 1, "head_dim": 8},
    {"n_head": 8},
    {"n_embd": 64},
    {"n_embd": 48, "n_head": 3, "mlp_type": "mlp"},
    {"rope_theta": 500.0},
    {"rope_scaling": LINEAR},
    {"rope_scaling": LINEAR, "rope_theta": 500.0},
    {"rope_parameters": LINEAR | {"rope_theta": 500.0}},
    {"sliding_window": 8},
    {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]},
]


@pytest.mark.parametrize("replaced", REPLACED)
def test_a_field_replaced_while_loading_means_what_it_means_in_a_new_config(replaced, tmp_path):
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 64}
    NanoGPTConfig(**sizes).save_pretrained(tmp_path)
    expected = NanoGPTConfig(**sizes | replaced).to_dict()
    for load in (NanoGPTConfig.from_pretrained, AutoConfig.from_pretrained):
        found = load(tmp_path, **copy.deepcopy(replaced))
        found._name_or_path = ""
        assert expected.items() <= found.to_dict().items()


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ({"hidden_act": "newer"}, {"hidden_act": "gelu"}),
        ({"rope_parameters": {"rope_type": "newer"}}, {"rope_parameters": None}),
        ({"num_attention_heads": 3, "head_dim": None}, {"n_head": 8, "head_dim": None}),
        ({"dropout": 1.5}, {"dropout": 0.5}),
    ],
)
def test_a_saved_value_that_is_not_valid_can_be_replaced_while_loading(wrong, right, tmp_path):
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4}
    NanoGPTConfig(**sizes).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    with pytest.raises(ValueError, match=next(iter(wrong))):
        NanoGPTConfig.from_pretrained(tmp_path)
    found = NanoGPTConfig.from_pretrained(tmp_path, **right)
    expected = NanoGPTConfig(**sizes | right)
    for name in ("head_dim", *wrong):
        assert getattr(found, name) == getattr(expected, name)


def test_a_saved_size_that_was_given_stays_when_another_is_replaced(tmp_path):
    given = {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 40}
    NanoGPTConfig(n_layer=2, n_embd=32, n_head=4, **given).save_pretrained(tmp_path)
    found = NanoGPTConfig.from_pretrained(tmp_path, n_head=8, n_embd=64).to_dict()
    assert given.items() <= found.items()


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"n_layer": 3, "num_hidden_layers": 4}, "contradict each other"),
        ({"position_embedding_type": "learned"}, "is for rotary positions"),
        ({"rope_theta": -1.0}, "must be a number above 0"),
        ({"dropout": 1.5}, "dropout=1.5 must be"),
        ({"num_key_value_heads": 3}, "must divide"),
    ],
)
def test_a_field_replaced_while_loading_is_checked(replaced, message, tmp_path):
    NanoGPTConfig(n_layer=2, n_embd=32, n_head=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        NanoGPTConfig.from_pretrained(tmp_path, **replaced)


# Presets.


@pytest.mark.parametrize("name", list_presets())
def test_preset_is_a_valid_config(name):
    config = load_preset(name)
    assert len(config.layer_types) == config.num_hidden_layers
    assert config.num_attention_heads * config.head_dim >= config.hidden_size


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt1", 116_534_784),
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("gpt3-175b", 174_604_259_328),
    ],
)
def test_preset_has_the_published_number_of_parameters(name, count):
    with torch.device("meta"):
        model = NanoGPTForCausalLM(load_preset(name))
    assert model.num_parameters() == sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(("name", "nearest"), [("gpt2-meduim", "gpt2-medium"), ("nanno", "nano")])
def test_unknown_preset_is_refused_with_the_nearest_name(name, nearest):
    with pytest.raises(ValueError, match=rf"'{name}' is unknown. Did you mean {nearest}\?"):
        load_preset(name)


def test_preset_derives_again_what_an_override_makes_wrong():
    assert load_preset("gpt2", n_embd=384).head_dim == 32
    assert load_preset("llama-7b", hidden_size=96, n_head=4).intermediate_size == 256
    assert load_preset("llama-7b", mlp_type="mlp").intermediate_size == 4 * 4096
    qwen = load_preset("qwen3-0.6b", n_head=4, n_embd=64)
    assert (qwen.head_dim, qwen.num_key_value_heads) == (16, 4)
    assert load_preset("qwen3-0.6b", n_embd=512).head_dim == 32
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    assert load_preset("gpt3-125m", n_layer=3).layer_types == kinds
    assert load_preset("gpt3-125m", n_layer=3, sliding_window=128).layer_types == kinds
    assert load_preset("gpt3-125m", sliding_window=None).layer_types == ["full_attention"] * 12
    assert load_preset("qwen3-0.6b", position_embedding_type="learned").rope_parameters is None


def test_preset_keeps_what_an_override_does_not_touch():
    qwen = load_preset("qwen3-0.6b", n_layer=2, vocab_size=100)
    assert (qwen.head_dim, qwen.num_key_value_heads, qwen.intermediate_size) == (128, 8, 3072)
    assert qwen.rope_parameters["rope_theta"] == 1e6
    assert load_preset("gpt2", bias=False).attention_bias is False
    assert load_preset("gpt2", bias=False, mlp_bias=True).mlp_bias is True


@pytest.mark.parametrize("name", list_presets())
def test_overriding_a_field_of_a_preset_with_its_own_value_changes_nothing(name):
    config = load_preset(name).to_dict()
    for key in NanoGPTConfig.__annotations__:
        assert load_preset(name, **{key: config[key]}).to_dict() == config, key


@pytest.mark.parametrize(
    "overrides",
    [
        {"rope_scaling": YARN},
        {"rope_parameters": YARN},
        {"rope_theta": 5e5},
        {"rope_scaling": YARN, "rope_theta": 5e5},
        {"rope_parameters": YARN | {"rope_theta": 5e5}},
    ],
    ids=str,
)
def test_rope_of_a_preset_is_what_qwen3_makes_of_the_same_settings(overrides):
    base = {} if "rope_theta" in str(overrides) else {"rope_theta": 1e6}
    qwen = Qwen3Config(**copy.deepcopy(overrides) | base | {"max_position_embeddings": 40960})
    assert load_preset("qwen3-0.6b", **overrides).rope_parameters == qwen.rope_parameters


def test_override_of_a_preset_that_contradicts_another_is_refused():
    for overrides in ({"hidden_size": 64, "n_embd": 128}, {"n_positions": 8, "block_size": 16}):
        with pytest.raises(UserError, match="contradict"):
            load_preset("gpt2", **overrides)
    with pytest.raises(UserError, match=r"rope_theta.*'learned'"):
        load_preset("gpt2", rope_theta=5e5)


def test_preset_with_a_smaller_vocabulary_has_no_token_outside_it():
    small = load_preset("gpt2", vocab_size=1000)
    assert (small.bos_token_id, small.eos_token_id) == (None, None)
    assert load_preset("gpt2", vocab_size=1000, eos_token_id=7).eos_token_id == 7
    assert load_preset("gpt2", vocab_size=50304).eos_token_id == 50256  # nanoGPT's padded one


@pytest.mark.slow
def test_no_command_warns_of_tokens_that_a_smaller_tokenizer_lacks(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("The cat sat on the mat. " * 400)
    logging.get_logger("transformers").warning_once.cache_clear()  # it may have been said already
    sizes = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=32", "--max_steps=2"]
    for preset in ("gpt2", "llama-7b", "qwen3-0.6b"):
        given = ["--data", "text.txt", "--preset", preset, "--tokenizer", "char", *sizes]
        assert main(["train", *given, "--use_cpu", "--output_dir", preset]) == 0
        for words in (["info", preset], ["generate", preset, "The"], ["info", "gpt2"]):
            assert main(words) == 0
    assert "within the vocabulary" not in caplog.text and "never comes" not in caplog.text
    NanoGPTConfig(vocab_size=300, bos_token_id=50256)
    assert "within the vocabulary" in caplog.text  # it would have been seen


def test_preset_without_a_sliding_layer_has_no_window():
    for overrides in ({"n_layer": 1}, {"layer_types": ["full_attention"] * 12}):
        config = load_preset("gpt3-125m", **overrides)
        assert config.sliding_window is None and set(config.layer_types) == {"full_attention"}


def test_llama_has_the_norm_eps_of_the_released_weights():
    names = ("llama-7b", "llama-13b", "llama-33b", "llama-65b")
    assert [load_preset(name).norm_eps for name in names] == [1e-6, 1e-6, 1e-6, 1e-5]


def test_preset_rows_are_not_changed_by_use(monkeypatch):
    monkeypatch.setattr(presets, "PRESETS", copy.deepcopy(presets.PRESETS))  # spare other tests
    load_preset("gpt3-125m").layer_types.append("mark")
    load_preset("qwen3-0.6b").rope_parameters["rope_theta"] = 1.0
    assert "mark" not in load_preset("gpt3-125m").layer_types
    assert load_preset("qwen3-0.6b").rope_parameters["rope_theta"] == 1e6


def test_families_of_the_tests_cover_every_choice_of_the_config():
    configs = [tiny_config(name) for name in FAMILIES]
    for name, choices in {
        "position_embedding_type": {"rope", "learned"},
        "norm_type": {"rmsnorm", "rmsnorm_unweighted", "layernorm"},
        "norm_position": {"pre", "post"},
        "mlp_type": {"glu", "mlp"},
        "qk_norm": {True, False},
        "embedding_norm": {True, False},
        "tie_word_embeddings": {True, False},
    }.items():
        assert {getattr(config, name) for config in configs} == choices
