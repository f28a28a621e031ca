"""Packed documents with and without their mask: in training, evaluation, resuming and the card."""

import json

import numpy as np
import pytest
import torch
from conftest import CORPUS, tiny_model
from datasets import Dataset
from torch import nn

from hf_nanogpt import PackedCollator, evaluate, train, train_tokenizer
from hf_nanogpt.cli import main

TOKENIZER = train_tokenizer([CORPUS], kind="byte")
DOCUMENTS = [{"text": line} for line in CORPUS.splitlines() if line][:12]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "lines.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in DOCUMENTS * 8))
    return path


def settings_of(table, folder, **changed):
    small = {"n_layer": 1, "n_embd": 32, "n_head": 2, "block_size": 32, "tokenizer": "byte"}
    small |= {"max_steps": 4, "save_steps": 2, "sample_steps": 0, "num_threads": 1}
    paths = {"data": str(table), "output_dir": str(folder)}
    return small | paths | {"disable_tqdm": True, "use_cpu": True} | changed


def test_without_the_mask_positions_run_through_the_block():
    rows = [{"input_ids": np.array([256, 1, 2, 256, 3])}]
    masked = PackedCollator(256)(rows)
    plain = PackedCollator(256, document_mask=False)(rows)
    assert masked.pop("position_ids").tolist() == [[0, 1, 2, 0, 1]]
    assert plain.keys() == masked.keys() == {"input_ids", "labels"}
    assert all(torch.equal(plain[name], masked[name]) for name in plain)


@torch.no_grad()
def test_evaluation_without_the_mask_is_the_loss_of_the_whole_text():
    text = DOCUMENTS[:3]
    model = tiny_model("nano", vocab_size=257)
    eos = TOKENIZER.eos_token_id
    ids = [eos]
    for row in text:
        ids += [*TOKENIZER(row["text"])["input_ids"], eos]
    model.config.max_position_embeddings = len(ids)  # one block
    ids = torch.tensor([ids])
    logits = model(ids).logits[0, :-1]
    expected = nn.functional.cross_entropy(logits, ids[0, 1:]).item()
    documents = Dataset.from_list(text)
    found = evaluate(model, documents, tokenizer=TOKENIZER, document_mask=False)
    assert found.loss == pytest.approx(expected, rel=1e-5)
    assert evaluate(model, documents, tokenizer=TOKENIZER).loss != pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_a_run_without_the_mask_is_measured_shown_and_resumed_without_it(table, tmp_path, capsys):
    run = settings_of(table, tmp_path / "run", document_mask=False)
    result = train(**run)
    assert result.metrics["settings"]["Documents of a block"] == "see those before them"
    command = result.metrics["eval_command"]
    assert command[-1] == "--no_document_mask"
    command[command.index("--data") + 1] = str(table)
    capsys.readouterr()
    main(["eval", str(tmp_path / "run"), *command])
    printed = capsys.readouterr().out
    assert f"{result.metrics['eval_loss']:.4f}" in printed and "see each other" in printed
    with pytest.raises(ValueError, match=r"document_mask=True \(was False\)"):
        train(**run | {"document_mask": True, "max_steps": 6}, resume=True)
    masked = train(**settings_of(table, tmp_path / "masked"))
    assert masked.metrics["eval_loss"] != pytest.approx(result.metrics["eval_loss"], abs=1e-4)
    assert masked.metrics["settings"]["Documents of a block"] is None
    assert "--no_document_mask" not in masked.metrics["eval_command"]


@pytest.mark.slow
def test_a_checkpoint_from_before_the_setting_resumes_with_the_mask(table, tmp_path):
    run = settings_of(table, tmp_path / "run")
    train(**run)
    state = tmp_path / "run" / "checkpoint-4" / "trainer_state.json"
    content = json.loads(state.read_text())
    for callback in content["stateful_callbacks"].values():
        if "settings" in callback:
            del callback["settings"]["document_mask"]
    state.write_text(json.dumps(content))
    assert train(**run, resume=True).metrics["train_steps"] == 4


@torch.no_grad()
@pytest.mark.slow
def test_compiled_without_positions_no_mask_is_made(monkeypatch, tokens):
    seen = []
    real = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: seen.append(kwargs.get("attn_mask")) or real(*args, **kwargs),
    )
    torch.compiler.reset()
    model = tiny_model("nano")
    compiled = torch.compile(model, backend="eager")
    logits = compiled(tokens, use_cache=False).logits
    assert seen and all(mask is None for mask in seen)
    torch.testing.assert_close(logits, model(tokens).logits, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.slow  # transformers compiles the kernel
@pytest.mark.parametrize("family", ["nano", "gpt3"])
def test_flex_attention_keeps_packed_documents_apart(family, tokens):
    model = tiny_model(family, attn_implementation="sdpa")
    packed = torch.cat([torch.arange(8), torch.arange(12)]).expand(2, -1)
    expected = model(tokens, position_ids=packed, use_cache=False).logits
    model.set_attn_implementation("flex_attention")
    found = model(tokens, position_ids=packed, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
