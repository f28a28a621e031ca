"""What cannot be converted is refused by name, runs nothing, and leaves nothing behind."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from children import forked, run_python
from references import make_reference
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

from hf_nanogpt import train_tokenizer
from hf_nanogpt.convert import convert_checkpoint, export_checkpoint
from hf_nanogpt.errors import UserError


@pytest.fixture
def source(tmp_path) -> Path:
    """A GPT-2 of transformers in four shards, with a tokenizer."""
    make_reference("gpt2").save_pretrained(tmp_path / "source", max_shard_size="60KB")
    letters = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
    words = GPT2Tokenizer(vocab=letters | {"<|endoftext|>": 26}, merges=[])
    words.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def refuse(source: Path, reason: str, **settings) -> None:
    """Assert that a conversion fails with a `UserError` and writes nothing."""
    destination = source.parent / "ours"
    with pytest.raises(UserError, match=reason):
        convert_checkpoint(source, destination, **settings)
    assert not destination.exists()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


SHARD = "model-00002-of-00004.safetensors"
INDEX = "model.safetensors.index.json"
DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "config cut": ("config.json", truncate, r"config\.json cannot be read as JSON"),
    "config a list": (
        "config.json",
        lambda p: p.write_text("[1]"),
        r"config\.json must hold a JSON",
    ),
    "config wrong": (
        "config.json",
        lambda p: edit(p, n_head="x"),
        r"config\.json is not a valid GPT2Config",
    ),
    "shard cut": (SHARD, truncate, rf"{SHARD} cannot be read: it is missing, cut off"),
    "shard gone": (SHARD, Path.unlink, rf"{SHARD} cannot be read: it is missing"),
    "shard of prose": (SHARD, lambda p: p.write_text("prose " * 99), rf"{SHARD} cannot be read"),
    "index cut": (INDEX, truncate, rf"{INDEX} cannot be read as JSON"),
    "index empty": (INDEX, lambda p: p.write_text("{}"), rf"{INDEX} has no weight_map"),
    "weights gone": (INDEX, Path.unlink, rf"neither model\.safetensors nor {INDEX}"),
    "tokenizer cut": ("tokenizer.json", truncate, r"tokenizer\.json cannot be read as JSON"),
    "generation cut": ("generation_config.json", truncate, "cannot be read as JSON"),
    "quantized": ("config.json", lambda p: edit(p, quantization_config={}), "is quantized"),
    "one layer more": (
        "config.json",
        lambda p: edit(p, n_layer=4),
        r"missing: 'transformer\.h\.3\.ln_1\.weight', .* and 9 more",
    ),
    "one layer less": (
        "config.json",
        lambda p: edit(p, n_layer=2),
        r"unknown: 'transformer\.h\.2\..* and 9 more",
    ),
    "another width": (
        "config.json",
        lambda p: edit(p, n_inner=130),
        r"'transformer\.h\.0\.mlp\.c_fc\.weight' is \(32, 128\) and should be \(32, 130\)",
    ),
    "other settings": (
        "config.json",
        lambda p: edit(p, scale_attn_by_inverse_layer_idx=True),
        "scale_attn_by_inverse_layer_idx=True has no counterpart",
    ),
    "unscaled": ("config.json", lambda p: edit(p, scale_attn_weights=False), "scale_attn_weights"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_source_is_refused_by_name(damage, source):
    file, do_damage, reason = DAMAGES[damage]
    do_damage(source / file)
    refuse(source, reason)


def test_a_tied_head_that_differs_is_refused(tmp_path):
    make_reference("gpt2").save_pretrained(tmp_path / "source")
    weights = load_file(tmp_path / "source" / "model.safetensors")
    weights["lm_head.weight"] = weights["transformer.wte.weight"] + 1
    save_file(weights, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    refuse(tmp_path / "source", "tie_word_embeddings=True, but 'lm_head.weight' differs")


@pytest.mark.parametrize(
    ("model_type", "nearest"),
    [("gpt3_neo", "gpt_neo"), ("llama_7b", "llama"), ("my_model", None)],
)
def test_an_unknown_architecture_is_answered_with_the_nearest(model_type, nearest, source):
    edit(source / "config.json", model_type=model_type)
    hint = rf" Did you mean {nearest}\?" if nearest else " Supported are"
    refuse(source, rf"model of type '{model_type}', which cannot be converted\.{hint}")


@pytest.mark.parametrize("model_type", ["gpt_neox", "llama4", "qwen2_moe", "bert"])
def test_no_other_format_is_suggested_for_an_architecture_of_transformers(model_type, source):
    edit(source / "config.json", model_type=model_type)
    refuse(source, rf"model of type '{model_type}', which cannot be converted: it .*nanogpt\.$")


def test_a_format_can_be_forced_and_then_its_tensors_must_be_there(source, tmp_path):
    edit(source / "config.json", model_type="gpt_something")
    assert convert_checkpoint(source, tmp_path / "a", source_format="gpt2").format == "gpt2"
    refuse(source, r"missing: 'model\.embed_tokens\.weight'", source_format="llama")
    refuse(source, "source_format='lama' is unknown. Did you mean llama", source_format="lama")
    refuse(source, "not a file like nanoGPT's ckpt.pt", source_format="nanogpt")


@pytest.mark.parametrize("architecture", ["GemmaForCausalLM", "GemmaModel"])
def test_a_known_class_without_a_type_is_never_converted_as_another(architecture, source):
    """The tensors of a Gemma have the names and shapes of a Llama's."""
    fields = json.loads((source / "config.json").read_text())
    fields |= {"architectures": [architecture], "model_type": None}
    (source / "config.json").write_text(json.dumps(fields))
    refuse(source, "type 'gemma', which cannot be converted: it scales", source_format="llama")


@pytest.mark.parametrize("architectures", [["Foo", "GPT2LMHeadModel"], ["GPT2Model"]])
def test_a_class_tells_the_format_where_there_is_no_type(architectures, source, tmp_path):
    edit(source / "config.json", architectures=architectures, model_type=None)
    assert convert_checkpoint(source, tmp_path / "ours").format == "gpt2"


@pytest.mark.parametrize("architectures", [{"a": 1}, 5, [[]], [], "GPT2LMHeadModel"])
def test_odd_architectures_are_refused(architectures, source):
    edit(source / "config.json", architectures=architectures, model_type=None)
    refuse(source, "which cannot be converted")


def test_a_newer_nanochat_is_refused_by_the_name_of_what_is_new(tmp_path):
    make_reference("nanochat").save_pretrained(tmp_path / "source")
    weights = load_file(tmp_path / "source" / "model.safetensors")
    weights |= {"model.value_embeds.1.weight": torch.ones(67, 16), "resid_lambdas": torch.ones(3)}
    save_file(weights, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    refuse(tmp_path / "source", r"'model\.value_embeds\.1\.weight' of a newer nanochat")


def test_ours_is_not_converted_again(source, tmp_path):
    ours = convert_checkpoint(source, tmp_path / "first").folder
    refuse(ours, "is already a checkpoint of ours")


@pytest.mark.parametrize("name", ["nothing", "user/model", "config.json"])
def test_a_source_that_is_nowhere_is_refused(name, source):
    with pytest.raises(UserError, match=r"no checkpoint|not a checkpoint|is a file"):
        convert_checkpoint(source / name if "." in name else name, source.parent / "ours")


@pytest.mark.parametrize("convert", [convert_checkpoint, export_checkpoint])
def test_a_destination_with_something_in_it_is_refused_and_not_touched(convert, source):
    before = {path.name: path.stat().st_mtime_ns for path in source.iterdir()}
    with pytest.raises(UserError, match=r"destination=.*source exists and is not empty"):
        convert(source, source)
    assert before == {path.name: path.stat().st_mtime_ns for path in source.iterdir()}
    with pytest.raises(UserError, match=r"cannot write to .*config\.json"):
        convert(source, source / "config.json" / "deep")


@pytest.mark.parametrize("given", [True, False], ids=["given", "of the source"])
def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(given, source, tmp_path):
    place = tmp_path / "bytes" if given else source
    train_tokenizer([], kind="byte").save_pretrained(place)
    settings = {"tokenizer": place} if given else {}
    refuse(source, "token number 256, but the model in .* has vocab_size=67", **settings)


# The disk

# Converts each source while files may not grow beyond its limit: what a full disk does.
FULL = """
import resource, sys
from hf_nanogpt.convert import convert_checkpoint
destination, *cases = sys.argv[1:]
for source, limit in zip(cases[::2], cases[1::2]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    try:
        convert_checkpoint(source, destination)
    except ValueError as error:
        print(error)
"""


@forked
def test_a_disk_that_is_full_leaves_nothing_behind(source):
    long_words = source.parent / "long"  # its tokenizer is the largest of its files
    GPT2LMHeadModel(
        GPT2Config(vocab_size=2900, n_positions=8, n_embd=4, n_layer=1, n_head=1)
    ).save_pretrained(long_words)
    characters = "".join(map(chr, range(0x4E00, 0x5800)))
    train_tokenizer([characters], kind="char").save_pretrained(long_words)
    # The first file that does not fit: our code, the weights, the tokenizer.
    cases = [(source, 1000), (source, 60_000), (long_words, 60_000)]
    destination = source.parent / "ours"
    result = run_python(FULL, destination, *(word for case in cases for word in case))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("ours could not be written, and nothing was left there") == 3
    assert not destination.exists()
