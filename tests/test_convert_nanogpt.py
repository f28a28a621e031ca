"""nanoGPT's ckpt.pt becomes ours with the logits of its layout, and no pickle ever runs."""

import json
import logging
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from nanogpt_layout import ARGS, evaluate_layout, make_state, write_checkpoint
from safetensors.torch import load_file
from test_tasks import CHOICE
from transformers import AutoModelForCausalLM

from hf_nanogpt import (
    NanoGPTForCausalLM,
    evaluate_tasks,
    generate_text,
    load_checkpoint,
    train_tokenizer,
)
from hf_nanogpt.cli import main
from hf_nanogpt.convert import convert_checkpoint, export_checkpoint
from hf_nanogpt.data.chat_text import ChatTextEncoder
from hf_nanogpt.data.encoding import DocumentEncoder
from hf_nanogpt.errors import UserError
from hf_nanogpt.training.samples import draw_sample

CHARACTERS = sorted(set("\n To be, or nöt to be: thät is 日本 the question"))
STOI = {character: i for i, character in enumerate(CHARACTERS)}


def write_meta(folder: Path) -> Path:
    """Write a meta.pkl as nanoGPT's prepare.py does for characters."""
    itos = {i: character for character, i in STOI.items()}
    meta = {"vocab_size": len(STOI), "itos": itos, "stoi": STOI}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder / "meta.pkl"


@pytest.fixture
def ckpt(tmp_path) -> Path:
    state = make_state(bias=False, vocab_size=len(STOI))
    return write_checkpoint(tmp_path / "out", state, bias=False, vocab_size=len(STOI))


def load(folder: Path) -> NanoGPTForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def compile_names(state):
    return {f"_orig_mod.{name}": tensor for name, tensor in state.items()}


def add_mask(state):
    return state | {"transformer.h.0.attn.bias": torch.ones(1, 1, 24, 24).tril()}


# (biases, what is done to the state dict, model_args)
VERSIONS = {
    "with biases": (True, dict, {"bias": True, "dropout": 0.1}),
    "without biases": (False, dict, {"bias": False, "dropout": 0.0}),
    "compiled": (False, compile_names, {"bias": False}),
    "old: a mask, and biases not mentioned": (True, add_mask, {}),
}


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_logits_are_those_of_the_layout(version, tmp_path):
    bias, change, args = VERSIONS[version]
    state = make_state(bias=bias)
    write_checkpoint(tmp_path / "out", change(state), **args)
    converted = convert_checkpoint(tmp_path / "out" / "ckpt.pt", tmp_path / "ours")
    assert (converted.format, converted.has_tokenizer) == ("nanogpt", False)
    model = load(tmp_path / "ours")
    assert (model.config.mlp_bias, model.config.dropout) == (bias, args.get("dropout", 0.0))
    ids = torch.randint(ARGS["vocab_size"], (3, 24), generator=torch.Generator().manual_seed(2))
    expected = evaluate_layout(state, ids)
    assert expected.std() > 0.1
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)


def test_a_folder_with_a_ckpt_is_taken_for_it(ckpt, tmp_path):
    convert_checkpoint(ckpt, tmp_path / "a")
    convert_checkpoint(ckpt.parent, tmp_path / "b")
    convert_checkpoint(ckpt.rename(ckpt.parent / "best"), tmp_path / "c", source_format="nanogpt")
    first, *others = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    for other in others:
        assert all(first[name].equal(other[name]) for name in first | other)


@torch.no_grad()
def test_it_leaves_as_native_gpt2(ckpt, tmp_path):
    convert_checkpoint(ckpt, tmp_path / "ours")
    assert export_checkpoint(tmp_path / "ours", tmp_path / "native").format == "gpt2"
    ids = torch.arange(20)[None]
    expected = evaluate_layout(make_state(bias=False, vocab_size=len(STOI)), ids)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "native").eval()
    torch.testing.assert_close(theirs(ids).logits, expected, rtol=0, atol=1e-5)


# Tokenizers


@pytest.mark.parametrize("place", ["next to it", "named"])
def test_characters_are_encoded_by_their_numbers_and_come_back(place, ckpt, tmp_path):
    meta = write_meta(ckpt.parent if place == "next to it" else tmp_path)
    named = None if place == "next to it" else meta
    assert convert_checkpoint(ckpt, tmp_path / "ours", tokenizer=named).has_tokenizer
    model, tokenizer = load_checkpoint(tmp_path / "ours")
    text = "To be,\nor nöt   to be: 日本"
    ids = tokenizer(text).input_ids
    assert ids == [STOI[character] for character in text]
    assert tokenizer.decode(ids) == text
    assert model.config.eos_token_id is None and model.generation_config.eos_token_id is None
    generated = generate_text(model, tokenizer, "To be", max_new_tokens=10, temperature=0)
    assert len(generated[0]) == 15 and generated[0].startswith("To be")


@pytest.fixture
def characters(ckpt, tmp_path):
    """A checkpoint whose tokenizer knows only the characters of a `meta.pkl`."""
    write_meta(ckpt.parent)
    convert_checkpoint(ckpt, tmp_path / "ours")
    return tmp_path / "ours"


LACKS = r"no token for 'Ω' \(U\+03A9\) after 'To be '"


def test_a_character_that_was_not_trained_on_is_an_error_and_never_dropped(characters):
    model, tokenizer = load_checkpoint(characters)
    with pytest.raises(Exception, match="UNK"):
        tokenizer("To be Ω")
    with pytest.raises(UserError, match=LACKS):
        generate_text(model, tokenizer, "To be Ω")
    with pytest.raises(UserError, match=LACKS):
        DocumentEncoder(tokenizer)({"text": ["To be", "To be Ω or"]})
    with pytest.raises(UserError, match=LACKS):
        ChatTextEncoder(tokenizer).encode("To be Ω")
    with pytest.raises(UserError, match=r"no token for '\\x00' \(U\+0000\) at the start"):
        generate_text(model, tokenizer, "\0")
    assert draw_sample(model, tokenizer, "To be Ω", max_new_tokens=3, seed=1) == ""


def test_the_command_and_the_server_name_a_character_that_the_tokenizer_lacks(
    characters, tmp_path, capsys
):
    text = tmp_path / "text.txt"
    text.write_text("To be Ω or not", encoding="utf-8")
    assert main(["eval", str(characters), "--data", str(text)]) == 2
    assert re.search(LACKS, capsys.readouterr().err)
    serving = pytest.importorskip("hf_nanogpt.apps.serving", exc_type=ImportError)
    client = pytest.importorskip("starlette.testclient", exc_type=ImportError).TestClient(
        serving.build_app("it", *load_checkpoint(characters))
    )
    answer = client.post("/v1/completions", json={"model": "it", "prompt": "To be Ω"})
    assert answer.status_code == 400 and re.search(LACKS, answer.json()["error"]["message"])


@pytest.mark.slow
def test_a_task_names_a_character_that_the_tokenizer_lacks(characters, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs pip install 'hf-nanogpt[eval]'")
    monkeypatch.chdir(tmp_path)
    row = {"q": "To be Ω", "choices": ["to", "be"], "answer": 0}
    Path("questions.jsonl").write_text(json.dumps(row), encoding="utf-8")
    Path("sums.yaml").write_text(CHOICE, encoding="utf-8")
    with pytest.raises(UserError, match=LACKS):
        evaluate_tasks(characters, ["sums.yaml"])


def test_gpt2s_padded_vocabulary_is_kept_and_its_tokenizer_asked_for(tmp_path, caplog):
    small = {"n_embd": 8, "vocab_size": 50304}
    state = make_state(bias=True, **small)
    ckpt = write_checkpoint(tmp_path / "out", state, bias=True, **small)
    with caplog.at_level(logging.WARNING):
        converted = convert_checkpoint(ckpt, tmp_path / "ours")
    assert "openai-community/gpt2" in caplog.text and "No tokenizer was found" in caplog.text
    assert not converted.has_tokenizer  # the tests have no network
    config = load(tmp_path / "ours").config
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (50304, 50256, 50256)


def test_a_named_tokenizer_gives_the_model_its_special_tokens(tmp_path):
    words = train_tokenizer([], kind="byte")
    words.save_pretrained(tmp_path / "words")
    ckpt = write_checkpoint(tmp_path / "out", make_state(bias=True, vocab_size=320), vocab_size=320)
    convert_checkpoint(ckpt, tmp_path / "ours", tokenizer=tmp_path / "words")
    model, tokenizer = load_checkpoint(tmp_path / "ours")
    assert tokenizer.get_vocab() == words.get_vocab()
    assert model.config.eos_token_id == words.eos_token_id == model.generation_config.eos_token_id
    assert model.config.pad_token_id == words.pad_token_id


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(ckpt, tmp_path):
    train_tokenizer([], kind="byte").save_pretrained(tmp_path / "words")
    with pytest.raises(ValueError, match=rf"token number 256, but .*vocab_size={len(STOI)}"):
        convert_checkpoint(ckpt, tmp_path / "ours", tokenizer=tmp_path / "words")
    assert not (tmp_path / "ours").exists()


# What is refused


def refuse(source: Path, reason: str) -> None:
    """Assert that a conversion fails with a `UserError` and writes nothing."""
    with pytest.raises(UserError, match=reason):
        convert_checkpoint(source, source.parent / "ours")
    assert not (source.parent / "ours").exists()


class Evil:
    """Unpickled freely, it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_code_in_a_ckpt_is_refused_by_name_and_never_run(tmp_path):
    made = tmp_path / "made"
    state = make_state(bias=False)
    write_checkpoint(tmp_path / "zip", state | {"x": Evil(made)}, bias=False)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "ckpt.pt").write_bytes(pickle.dumps({"model": Evil(made)}, protocol=2))
    for kind in ("zip", "raw"):
        refuse(tmp_path / kind / "ckpt.pt", r"was not loaded: .*mkdir.*Nothing in it was run")
    assert not made.exists()
    pickle.loads((tmp_path / "raw" / "ckpt.pt").read_bytes())
    assert made.exists()  # so it would have run


def test_code_in_a_meta_is_refused_by_name_and_never_run(tmp_path):
    ckpt = write_checkpoint(tmp_path, make_state(bias=False), bias=False)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"stoi": {"a": Evil(tmp_path / "made")}}))
    refuse(ckpt, r"meta\.pkl was not loaded, and nothing in it was run: .*it needs posix\.mkdir")
    (tmp_path / "meta.pkl").write_bytes(b"prose")
    refuse(ckpt, r"meta\.pkl was not loaded")
    assert not (tmp_path / "made").exists()


HOSTILE = {
    "a table of 2**31 places": b"\x80\x04K\x01r\xff\xff\xff\x7f.",
    "a table of 2**60 places": b"K\x01p1152921504606846976\n.",
    "a bytearray of 2**60": b"\x80\x05\x96\x00\x00\x00\x00\x00\x00\x00\x10.",
    "deep": b"(l" * 5000 + b"a" * 4999 + b".",
    "persistent": b"Px\n.",
    "a list": pickle.dumps([1]),
    "ids of texts": pickle.dumps({"stoi": {"a": "0"}}),
    "negative ids": pickle.dumps({"stoi": {"a": -1}}),
    "large ids": pickle.dumps({"stoi": {"a": 2**70}}),
    "characters of numbers": pickle.dumps({"stoi": {0: 1}}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_meta_is_refused_by_name(case, tmp_path):
    ckpt = write_checkpoint(tmp_path, make_state(bias=False), bias=False)
    (tmp_path / "meta.pkl").write_bytes(HOSTILE[case])
    refuse(ckpt, r"meta\.pkl was not loaded")


@pytest.mark.parametrize(
    "args",
    [
        {"n_layer": 10**7},
        {"n_layer": 10**12},
        {"n_head": 2**40},
        {"n_embd": 2**62},
        {"vocab_size": "61"},
        {"vocab_size": None},
        {"n_embd": [32]},
        {"bias": "yes"},
        {"dropout": float("nan")},
    ],
)
def test_hostile_model_args_are_refused_by_name(args, tmp_path):
    ckpt = write_checkpoint(tmp_path, make_state(bias=False), **{"bias": False} | args)
    refuse(ckpt, r"ckpt\.pt")


def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path):
    state = make_state(bias=False) | {"transformer.wte.weight": torch.ones(1).expand(2**20, 2**20)}
    args = {"bias": False, "vocab_size": 2**20, "n_embd": 2**20}
    refuse(write_checkpoint(tmp_path, state, **args), r"ckpt\.pt has .* but its tensors claim")


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    state = make_state(bias=False)
    state["transformer.h.0.mlp.c_fc.weight"][0, 0] = float("nan")
    refuse(write_checkpoint(tmp_path, state, bias=False), r"ckpt\.pt cannot be used: .* has NaN")


# What is changed of a state dict and of model_args, and the reason that is given.
VARIANTS = {
    "another setting": ({}, {"use_rmsnorm": True}, r"model_args .*does not know \(use_rmsnorm\)"),
    "one tensor less": (
        {"transformer.h.1.mlp.c_fc.weight": None},
        {},
        r"missing: 'transformer\.h\.1\.mlp\.c_fc\.weight'",
    ),
    "one tensor more": ({"transformer.x": torch.ones(2)}, {}, r"unknown: 'transformer\.x'"),
    "another shape": (
        {"transformer.h.0.attn.c_attn.weight": torch.ones(96, 31)},
        {},
        r"c_attn\.weight' is \(96, 31\) and should be \(96, 32\)",
    ),
    "biases that are not there": ({}, {"bias": True}, r"missing: 'transformer\.h\.0\.ln_1\.bias'"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_of_nanogpt_is_refused_by_name(variant, tmp_path):
    changes, args, reason = VARIANTS[variant]
    state = make_state(bias=False) | changes
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    refuse(write_checkpoint(tmp_path, state, **{"bias": False} | args), reason)


def test_a_file_that_is_not_a_checkpoint_of_nanogpt_is_refused(tmp_path):
    ckpt = write_checkpoint(tmp_path, make_state(bias=False), bias=False)
    ckpt.write_bytes(ckpt.read_bytes()[: ckpt.stat().st_size // 2])
    refuse(ckpt, r"ckpt\.pt cannot be read, it is cut off or damaged|was not loaded")
    for content in (b"", b"prose " * 9):
        ckpt.write_bytes(content)
        refuse(ckpt, r"ckpt\.pt cannot be read, it is cut off or damaged|was not loaded")
    torch.save({"transformer.h.0.attn.c_q.weight": torch.ones(2)}, ckpt)
    refuse(ckpt, r"not a checkpoint of nanoGPT, which has model and model_args")
