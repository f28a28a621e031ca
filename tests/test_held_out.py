"""What a training measures of the held-out text: a fixed part, at a small cost; at the end all."""

import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CORPUS
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_nanogpt import NanoGPTTrainingArguments, evaluate, pack_documents, train, train_tokenizer
from hf_nanogpt.training.facts import _describe_evaluation
from hf_nanogpt.training.held_out import choose_estimate, count_tokens

TOKENIZER = train_tokenizer([], kind="byte")
SMALL = {
    "tokenizer": "byte",
    "n_layer": 1,
    "n_embd": 16,
    "n_head": 2,
    "block_size": 32,
    "validation_fraction": 0.4,
    "per_device_train_batch_size": 8,
    "max_steps": 10,
    "logging_steps": 5,
    "eval_steps": 3,
    "save_steps": 5,
    "sample_steps": 0,
    "disable_tqdm": True,
    "num_threads": 1,
}


def blocks_of(characters: int, context_length: int = 32):
    text = (CORPUS * (1 + characters // len(CORPUS)))[:characters]
    documents = Dataset.from_dict({"text": [text]})
    return pack_documents(documents, TOKENIZER, context_length=context_length)


def choose(held_out: int, trained: int = 50_000, count: int | None = None, **settings):
    args = NanoGPTTrainingArguments(output_dir="unused", use_cpu=True, **settings)
    return choose_estimate(
        blocks_of(held_out), args, blocks_of(trained), context_length=32, count=count
    )


@pytest.mark.parametrize("trained", [20_000, 200_000])
@pytest.mark.parametrize(
    ("settings", "steps", "evaluations"),
    [
        ({"max_steps": 400}, 400, 10),
        ({"max_steps": 400, "eval_steps": 0.05}, 400, 20),
        ({"max_steps": 400, "eval_steps": 150}, 400, 3),
        ({"max_steps": 400, "eval_on_start": True}, 400, 11),
        ({"num_train_epochs": 3, "eval_strategy": "epoch"}, None, 3),
        ({"max_steps": 400, "gradient_accumulation_steps": 3}, 400, 10),
    ],
)
def test_all_evaluations_cost_at_most_eight_percent_of_the_steps(
    trained, settings, steps, evaluations
):
    rows = 8 * settings.get("gradient_accumulation_steps", 1)
    steps = steps or 3 * -(-len(blocks_of(trained)) // 8)
    estimate = choose(2_000_000, trained, **settings)
    # In a step, a token costs three forward passes.
    cost = evaluations * count_tokens(estimate.blocks) / (3 * steps * rows * 32)
    assert 0.06 < cost <= 0.08


def test_evaluations_are_cheap_where_the_text_is_shorter_than_a_batch():
    estimate = choose(2_000_000, 100, max_steps=300, per_device_train_batch_size=16)
    cost = 10 * count_tokens(estimate.blocks)  # forward passes of 10 evaluations
    assert 0.06 < cost / (3 * 300 * len(blocks_of(100)) * 32) <= 0.08


def test_an_estimate_is_spread_over_every_second_block():
    estimate = choose(100_000, max_steps=100)
    indices = list(estimate.blocks.indices)
    gaps = {after - before for before, after in itertools.pairwise(indices)}
    assert estimate.has_halves and not any(index % 2 for index in indices)
    assert max(gaps) - min(gaps) <= 2 and indices[-1] + max(gaps) >= len(blocks_of(100_000))


def test_too_little_text_is_not_halved_and_a_large_budget_takes_no_more_than_there_is():
    assert not choose(4_000, max_steps=10_000).has_halves
    assert len(choose(4_000, max_steps=10_000).blocks) == len(blocks_of(4_000))
    assert len(choose(5_000, max_steps=10_000).blocks) == len(blocks_of(5_000)) / 2
    assert len(choose(5_000, max_steps=1).blocks) == 1


@pytest.mark.parametrize(("length", "num_blocks"), [(4100, 2), (2050, 3)])
def test_a_half_that_may_be_one_token_is_no_half(length, num_blocks):
    # Of (length - 1) predicted tokens a block, the last block has one.
    held_out = blocks_of((num_blocks - 1) * (length - 1), context_length=length)
    assert len(held_out) == num_blocks and len(held_out[num_blocks - 1]["input_ids"]) == 2
    args = NanoGPTTrainingArguments(output_dir="unused", use_cpu=True, max_steps=10_000)
    estimate = choose_estimate(held_out, args, blocks_of(50_000), context_length=length)
    fresh = set(range(num_blocks)) - set(estimate.blocks.indices)
    assert sum(len(held_out[i]["input_ids"]) - 1 for i in fresh) in (0, length - 1)
    assert estimate.has_halves == bool(fresh)


def test_the_size_of_an_estimate_can_be_given():
    assert count_tokens(choose(100_000, max_steps=10, eval_tokens=3_100).blocks) == 3_100
    assert len(choose(100_000, max_steps=10, eval_tokens=1).blocks) == 1
    assert len(choose(100_000, max_steps=10, count=7).blocks) == 7


@pytest.mark.parametrize(
    ("characters", "settings", "said"),
    [
        (800, {}, r"on all 80\d tokens; so few make rough figures: hold out more$"),
        (4_000, {}, r"on all 4,00\d tokens$"),
        (
            9_000,
            {"eval_tokens": 310},
            r"on 310 tokens, in one half of the held-out text; at .* all$",
        ),
    ],
)
def test_the_plan_says_what_is_measured(characters, settings, said):
    estimate = choose(characters, max_steps=10_000, **settings)
    assert re.match(said, _describe_evaluation(estimate, blocks_of(characters)))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(CORPUS * 2, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def run(text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(data=text, output_dir=str(folder), **SMALL)
    return folder


def read_evaluations(folder: Path) -> list[dict]:
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    rows = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [row for row in rows if "eval_loss" in row]


def test_the_final_figure_is_of_all_held_out_text_and_eval_repeats_it(run, text):
    metrics = json.loads((run / "metrics.json").read_text())
    result = evaluate(run, text, held_out=0.4)
    assert metrics["eval_tokens"] == result.num_tokens
    assert metrics["bits_per_byte"] == pytest.approx(result.bits_per_byte, rel=1e-6)
    assert {row["eval_tokens"] for row in read_evaluations(run)} == {124}  # 4 blocks of 31


def test_workers_that_persist_do_not_serve_the_part_for_the_whole(run, text, tmp_path):
    settings = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    train(data=text, output_dir=str(tmp_path), **SMALL, **settings)
    same, other = (json.loads((path / "metrics.json").read_text()) for path in (run, tmp_path))
    for name in ("eval_tokens", "bits_per_byte", "fresh_half"):
        assert other[name] == same[name]


def test_blocks_grouped_by_length_are_halved_alike(text, tmp_path):
    settings = SMALL | {"max_steps": 2, "train_sampling_strategy": "group_by_length"}
    train(data=text, output_dir=str(tmp_path / "run"), **settings)
    check_fresh_half(tmp_path / "run", text)


def test_the_half_that_chose_nothing_is_every_second_block(run, text):
    check_fresh_half(run, text)


def check_fresh_half(run: Path, text: str) -> None:
    metrics = json.loads((run / "metrics.json").read_text())["fresh_half"]
    held_out = Path(text).read_text(encoding="utf-8")
    held_out = held_out[int(len(held_out) * 0.6) :]
    tokenizer = AutoTokenizer.from_pretrained(run)
    model = AutoModelForCausalLM.from_pretrained(run)
    eos = tokenizer.eos_token_id
    ids = torch.tensor([eos, *tokenizer(held_out)["input_ids"], eos])
    rows = [ids[start : start + 32][None] for start in range(0, len(ids) - 1, 31)][1::2]
    with torch.no_grad():
        losses = [
            cross_entropy(model(row).logits[0, :-1], row[0, 1:], reduction="none") for row in rows
        ]
    assert metrics["eval_tokens"] == sum(map(len, losses))
    assert metrics["eval_loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


def test_there_is_no_half_that_did_not_choose_where_nothing_chooses(text, tmp_path):
    settings = SMALL | {"max_steps": 1, "keep_best": False}
    assert "fresh_half" not in train(data=text, output_dir=str(tmp_path), **settings).metrics


def test_a_resumed_longer_run_is_estimated_on_the_same_part(run, text, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    train(data=text, output_dir=str(folder), resume=True, **SMALL | {"max_steps": 20})
    assert {row["eval_tokens"] for row in read_evaluations(folder)} == {124}
