"""The tutorial runs, and what it teaches is true."""

import ast
import math
import re
import runpy
import sys
from collections import Counter

import pytest
import torch
from conftest import ROOT
from torch import nn
from transformers import GenerationConfig

from hf_nanogpt import load_checkpoint

TUTORIAL = ROOT / "examples" / "tutorial"
PARTS = ["part1_stack", "part2_mask", "part3_train", "part4_generate"]


def load_part(name: str) -> dict:
    return runpy.run_path(str(TUTORIAL / f"{name}.py"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("tutorial"))
    load_part("part3_train")["main"](folder, steps=30)
    return folder


@pytest.mark.slow
def test_each_part_runs_as_a_script(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for part in PARTS:
        monkeypatch.setattr(sys, "argv", [part])
        runpy.run_path(str(TUTORIAL / f"{part}.py"), run_name="__main__")
    output = capsys.readouterr().out
    for text in ("174,604,259,328", "A block of GPT:                  self_attn, mlp", "-inf"):
        assert text in output
    assert output.count("  the same\n") == 4 and "NOT THE SAME" not in output
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")
    after, floor = map(float, re.search(r"after: ([\d.]+) .* is ([\d.]+)", output).groups())
    assert floor < after < 1.2 * floor
    leaks = dict(re.findall(r"  (\w[\w, ]*?) +loss [\d.]+   leak ([\d.]+)", output))
    assert leaks["GPT"] == leaks["shortcut, memory masked"] == "0.0000"
    assert float(leaks["shortcut"]) > 1
    losses = [float(x) for x in re.findall(r" +loss ([\d.]+)   leak", output)]
    assert losses[1] < 1 < 0.99 * math.log(16) < min(losses[0], losses[2])


def test_blocks_differ_by_the_cross_attention():
    names = load_part("part1_stack")["list_sublayers"](nn.TransformerDecoderLayer(8, 2))
    assert names == ["self_attn", "multihead_attn", "linear1", "linear2"]


@pytest.mark.parametrize("length", [1, 5])
def test_mask_is_torchs(length):
    mask = load_part("part2_mask")["make_mask"](length)
    assert mask.equal(nn.Transformer.generate_square_subsequent_mask(length))


def test_loss_of_part_2_is_the_models_own():
    part, ids = load_part("part2_mask"), torch.randint(16, (3, 12))
    model = part["build_gpt"]()
    loss = part["next_token_loss"](lambda x: model(x).logits, ids)
    torch.testing.assert_close(loss, model(ids, labels=ids).loss)


def test_sentences_have_eight_bits_of_entropy():
    sentences = load_part("part3_train")["write_sentences"](20_000, seed=0)["text"]
    shares = torch.tensor(list(Counter(sentences).values())) / len(sentences)
    assert len(shares) == 4**4
    assert -(shares * shares.log2()).sum() == pytest.approx(8, abs=0.02)


@pytest.mark.parametrize("way", ["likeliest", "top_k", "nucleus"])
def test_tokens_are_chosen_as_generate_chooses_them(trained, way):
    part = load_part("part4_generate")
    settings = {
        "likeliest": ({}, {"do_sample": False}),
        "top_k": ({"k": 5}, {"do_sample": True, "top_k": 5}),
        "nucleus": ({"p": 0.8}, {"do_sample": True, "top_p": 0.8, "top_k": 0}),
    }
    our_settings, generate_settings = settings[way]
    model, tokenizer = load_checkpoint(trained)
    config = GenerationConfig(
        max_new_tokens=40, eos_token_id=tokenizer.eos_token_id, **generate_settings
    )
    for seed in range(3):
        torch.manual_seed(seed)
        text = part["continue_text"](
            model,
            tokenizer,
            "the",
            choose=lambda logits: part[f"choose_{way}"](logits, **our_settings),
            limit=40,
        )
        torch.manual_seed(seed)
        inputs = tokenizer("the", return_tensors="pt")
        output = model.generate(**inputs, generation_config=config)
        assert text == tokenizer.decode(output[0], skip_special_tokens=True)


def test_the_loop_stops_at_each_end_that_generate_knows(trained):
    model, tokenizer = load_checkpoint(trained)
    likeliest = load_part("part4_generate")["choose_likeliest"]
    [end] = tokenizer("the", return_tensors="pt")["input_ids"][0, -1:].tolist()
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(end, len(tokenizer))]
    text = load_part("part4_generate")["continue_text"](
        model, tokenizer, "the", choose=likeliest, limit=40
    )
    output = model.generate(
        **tokenizer("the", return_tensors="pt"), do_sample=False, max_new_tokens=40
    )
    assert text == tokenizer.decode(output[0], skip_special_tokens=True)
    assert output.shape[1] < 40


def test_part_4_without_part_3_is_one_sentence():
    with pytest.raises(SystemExit, match="run part 3 first"):
        load_part("part4_generate")["main"]("runs/none-here")


def test_pages_name_things_that_exist():
    for page in TUTORIAL.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        for path in re.findall(r"\]\(((?!http)[^)#]+)\)", text):
            assert (TUTORIAL / path).exists(), path
        for name, path in re.findall(r"\[`(\w+)`\]\(([^)]+\.py)\)", text):
            tree = ast.parse((TUTORIAL / path).read_text(encoding="utf-8"))
            assert name in {getattr(node, "name", None) for node in tree.body}, name
    questions = (TUTORIAL / "questions.md").read_text(encoding="utf-8")
    answers = questions.split("</details>")[:-1]
    assert len(answers) == 8
    assert all(re.search(r"\[`\w+`\]\(", answer) for answer in answers)
