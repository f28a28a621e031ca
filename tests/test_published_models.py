"""The page about published models: each row is what happens to its class, built small."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT
from references import GPT, IDS, LLAMA, OPT, VOCABULARY, make_tokens
from test_gguf import LLAMA3_ROPE, split_tokenizer
from transformers import AutoModelForCausalLM, LlamaTokenizer

from hf_nanogpt import convert_checkpoint, train_tokenizer
from hf_nanogpt.convert.gguf import choose_architecture
from hf_nanogpt.convert.gguf_tokenizer import LLAMA3_SPLIT, QWEN_SPLIT, describe_tokenizer
from hf_nanogpt.convert.native import FORMATS, OBSTACLES
from hf_nanogpt.errors import UserError

PAGE = (ROOT / "examples/convert/README.md").read_text(encoding="utf-8")
HEADS = LLAMA | {"head_dim": 16}
NEOX = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
# The settings that make each row's form, at a small size.
SMALL = {
    "GPT-2": GPT,
    "Llama 2": LLAMA,
    "Llama 3": LLAMA | {"rope_parameters": LLAMA3_ROPE},
    "SmolLM": LLAMA | {"tie_word_embeddings": True},
    "SmolLM3": LLAMA,
    "Qwen2": LLAMA | {"tie_word_embeddings": True},
    "Qwen3 0.6B to 32B": HEADS | {"tie_word_embeddings": True},
    "Phi-1": LLAMA,
    "Phi-3": LLAMA,
    "Gemma": HEADS,
    "Gemma 2": HEADS,
    "Gemma 3 270M": HEADS,
    "Pythia": NEOX,
    "OPT 125M": OPT | {"activation_function": "relu"},
    "OPT 350M": OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "Mistral 7B v0.1": LLAMA,
}


def read_rows() -> dict[str, list[str]]:
    """Return class, conversion and GGUF of each row of the page, by the models' name."""
    table = PAGE.split("## Their tokenizers")[0]
    rows = [[cell.strip(" `") for cell in line[1:-1].split("|")] for line in table.splitlines()]
    rows = [row for row in rows if len(row) == 4][2:]
    return {row[0].split(",")[0]: row[1:] for row in rows}


def build(name: str, architecture: str):
    model_class = getattr(transformers, architecture)
    torch.manual_seed(0)
    spread = {"initializer_range": 0.3, "init_std": 0.3}
    return model_class(model_class.config_class(**IDS | spread | SMALL[name])).eval()


def test_each_row_of_the_page_has_a_form_here():
    assert list(read_rows()) == list(SMALL)


@torch.no_grad()
def convert_equal(source: Path, destination: Path):
    """Convert a folder, and return our model, which gives the same logits."""
    convert_checkpoint(source, destination)
    theirs, ours = (AutoModelForCausalLM.from_pretrained(path) for path in (source, destination))
    expected = theirs(make_tokens()).logits
    torch.testing.assert_close(ours(make_tokens()).logits, expected, rtol=0, atol=1e-5)
    assert expected.std() > 1
    return ours


@pytest.mark.parametrize("name", SMALL)
def test_a_published_model_converts_or_is_refused_as_the_page_says(name, tmp_path):
    architecture, conversion, gguf = read_rows()[name]
    build(name, architecture).save_pretrained(tmp_path / "source")
    if conversion != "equal":
        reason = re.escape(conversion.removeprefix("refused: "))
        with pytest.raises(UserError, match=reason):
            convert_checkpoint(tmp_path / "source", tmp_path / "ours")
        assert not (tmp_path / "ours").exists()
        return
    ours = convert_equal(tmp_path / "source", tmp_path / "ours")
    if "hidden_act" in gguf:
        with pytest.raises(UserError, match=gguf.removeprefix("refused: ")):
            choose_architecture(ours.config)
    else:
        assert gguf.startswith("refused") or choose_architecture(ours.config) == gguf


@pytest.mark.parametrize("name", ["SmolLM3", "Gemma", "Mistral 7B v0.1", "GPT-2"])
def test_no_model_is_converted_as_another_one(name, tmp_path):
    """The tensors of the first three have the names and shapes of a Llama's."""
    build(name, read_rows()[name][0]).save_pretrained(tmp_path / "source")
    with pytest.raises(UserError, match=r"which cannot be converted: |is a gpt2: leave it out"):
        convert_checkpoint(tmp_path / "source", tmp_path / "ours", source_format="llama")
    assert not (tmp_path / "ours").exists()


def test_every_obstacle_is_that_of_a_model_that_transformers_has():
    assert set(OBSTACLES) <= set(transformers.CONFIG_MAPPING)
    assert not set(OBSTACLES) & {native.model_type for native in FORMATS.values()}


def test_tokenizers_of_these_forms_are_written_by_llama_cpps_names_or_refused():
    made = {
        "gpt-2": train_tokenizer([], kind="byte"),
        "qwen2": split_tokenizer(QWEN_SPLIT),
        "llama-bpe": split_tokenizer(LLAMA3_SPLIT, ignore_merges=True),
    }
    for name, tokenizer in made.items():
        assert f"`{name}`" in PAGE
        assert describe_tokenizer(tokenizer, vocab_size=999)["tokenizer.ggml.pre"] == name
    with pytest.raises(UserError, match=read_rows()["Llama 2"][2].removeprefix("refused: ")):
        describe_tokenizer(LlamaTokenizer(), vocab_size=VOCABULARY)


def test_a_mistral_without_a_window_is_a_llama_as_its_refusal_says(tmp_path):
    build("Mistral 7B v0.1", "MistralForCausalLM").save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    fields = json.loads(path.read_text()) | {"model_type": "llama"}
    del fields["sliding_window"], fields["architectures"]
    path.write_text(json.dumps(fields))
    convert_equal(tmp_path / "source", tmp_path / "ours")
