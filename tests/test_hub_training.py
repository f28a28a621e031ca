"""Training that pushes to the Hub: every strategy, resuming from there, and a Hub that is slow."""

import json
import re
import threading
from pathlib import Path

import pytest
import torch
from conftest import CORPUS
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from hf_nanogpt import NanoGPTTrainingArguments, evaluate, pull_checkpoint, push_to_hub, train
from hf_nanogpt.cli import main
from hf_nanogpt.training.arguments import parse_settings
from hf_nanogpt.training.publishing import PushQueue

SMALL = {
    "tokenizer": "byte",
    "n_layer": 1,
    "n_embd": 16,
    "n_head": 2,
    "block_size": 32,
    "per_device_train_batch_size": 2,
    "max_steps": 6,
    "save_steps": 2,
    "logging_steps": 1,
    "disable_tqdm": True,
    "num_threads": 1,
}
PUSH = {"push_to_hub": True, "hub_model_id": "user/gpt"}


@pytest.fixture
def text_file(tmp_path) -> str:
    (tmp_path / "text.txt").write_text(CORPUS, encoding="utf-8")
    return str(tmp_path / "text.txt")


def weights(place: str | Path, revision: str = "main") -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(place, revision=revision).state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def pickles(files: dict[str, bytes]) -> list[str]:
    return [path for path in files if path.endswith((".bin", ".pt", ".pth"))]


@pytest.mark.parametrize(
    "strategy",
    [
        "every_save",
        pytest.param("end", marks=pytest.mark.slow),
        pytest.param("checkpoint", marks=pytest.mark.slow),
        pytest.param("all_checkpoints", marks=pytest.mark.slow),
    ],
)
def test_every_pushed_revision_loads_and_only_branches_have_the_training_state(
    hub, text_file, tmp_path, strategy
):
    run = tmp_path / "run"
    options = PUSH | {"hub_strategy": strategy, "hub_always_push": True}
    train(data=text_file, output_dir=str(run), **SMALL, **options)
    repo = hub.repos["user/gpt"]
    branches = {
        "end": set(),
        "every_save": set(),
        "checkpoint": {"last-checkpoint"},
        "all_checkpoints": {"checkpoint-2", "checkpoint-4", "checkpoint-6"},
    }[strategy]
    assert set(repo.branches) == {"main"} | branches
    # First the empty one, then one for each save, then the whole folder.
    assert len(repo.branches["main"]) == (2 if strategy == "end" else 5)
    for oid in repo.branches["main"][1:]:
        assert "modeling_nanogpt.py" in repo.commits[oid] and not pickles(repo.commits[oid])
        weights("user/gpt", oid)
    assert same(weights("user/gpt"), weights(run))
    assert {"loss.png", "metrics.json"} < set(repo.files())
    for branch in branches:
        assert {"optimizer.pt", "trainer_state.json"} < set(repo.files(branch))
        assert "training_args.bin" not in repo.files(branch)
    if strategy == "all_checkpoints":
        assert same(weights("user/gpt", "checkpoint-4"), weights(run / "checkpoint-4"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["quickstart", None])
def test_resuming_elsewhere_from_the_hub_equals_an_uninterrupted_run(
    hub, recipe, text_file, tmp_path
):
    whole, again = tmp_path / "whole", tmp_path / "again"
    options = PUSH | {"hub_strategy": "checkpoint", "hub_always_push": True}
    train(recipe, data=text_file, output_dir=str(whole), **SMALL, **options)
    branch = hub.repos["user/gpt"].branches["last-checkpoint"]
    folder = pull_checkpoint(f"user/gpt@{branch[-2]}", again, verify=True)
    assert folder == again / "checkpoint-4"  # as if the machine had been lost after step 5
    train(recipe, data=text_file, output_dir=str(again), resume=True, **SMALL)
    assert same(weights(again), weights(whole))
    histories = [
        json.loads((run / "checkpoint-6/trainer_state.json").read_text())["log_history"]
        for run in (again, whole)
    ]
    losses = [[row["loss"] for row in history if "loss" in row] for history in histories]
    assert len(losses[0]) == 6 and losses[0] == losses[1]


@pytest.mark.slow
def test_while_a_push_is_slow_only_the_newest_checkpoint_waits(
    hub, text_file, tmp_path, monkeypatch
):
    hub.fail("POST", "/preupload/", "hold")
    run = tmp_path / "run"
    options = PUSH | {"hub_strategy": "checkpoint", "save_total_limit": 1}
    add, added = PushQueue.add, []

    def add_then_wait(queue, *args, **kwargs) -> None:
        add(queue, *args, **kwargs)
        added.append(args)
        while not queue._jobs[0][0].running():  # the first one is under way, and held
            threading.Event().wait(0.01)
        if len(added) == 3:
            hub.gate.set()

    monkeypatch.setattr(PushQueue, "add", add_then_wait)
    train(data=text_file, output_dir=str(run), **SMALL, **options)
    repo = hub.repos["user/gpt"]
    steps = []
    for oid in repo.branches["last-checkpoint"][1:]:
        steps.append(json.loads(repo.commits[oid]["trainer_state.json"])["global_step"])
    assert steps == [2, 6]  # 4 waited, and 6 took its place
    assert same(weights("user/gpt", "last-checkpoint"), weights(run / "checkpoint-6"))
    first = weights("user/gpt", repo.branches["last-checkpoint"][1])
    assert not same(first, weights(run / "checkpoint-6"))


def test_a_push_that_fails_in_the_background_is_reported_with_the_command(
    hub, text_file, tmp_path, caplog
):
    hub.fail("POST", "/preupload/", "403")
    logging.enable_propagation()
    try:
        run = tmp_path / "run"
        train(data=text_file, output_dir=str(run), hub_strategy="every_save", **SMALL, **PUSH)
    finally:
        logging.disable_propagation()
    [said] = [record.message for record in caplog.records if "during training" in record.message]
    assert "may not write there" in said and f"hf-nanogpt push {run} user/gpt" in said
    assert same(weights("user/gpt"), weights(run))


@pytest.mark.slow
def test_if_the_last_push_fails_it_can_be_repeated_by_hand(hub, text_file, tmp_path, capsys):
    hub.fail("POST", "/commit/", "403")
    run = tmp_path / "run"
    flags = [f"--{k}={v}" for k, v in (SMALL | PUSH | {"hub_strategy": "end"}).items()]
    assert main(["train", "--data", text_file, "--output_dir", str(run), *flags]) == 2
    assert "could not be pushed" in capsys.readouterr().err
    assert main(["push", str(run), "user/gpt"]) == 0
    assert same(weights("user/gpt"), weights(run))


@pytest.mark.parametrize(("token", "reason"), [("", "logged in"), ("hf_wrong", "not accept")])
def test_missing_permission_to_push_is_reported_before_training(
    hub, text_file, tmp_path, monkeypatch, token, reason
):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ValueError, match=reason):
        train(data=text_file, output_dir=str(tmp_path / "run"), **SMALL, **PUSH)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_person_s_edits_of_the_card_survive_training(hub, text_file, tmp_path):
    run = tmp_path / "run"
    train(data=text_file, output_dir=str(run), hub_strategy="end", **SMALL, **PUSH)
    files = hub.repos["user/gpt"].files()
    card = files["README.md"].decode()
    assert "fine-tuned" not in card and "pipeline_tag: text-generation" in card
    files["README.md"] = (
        card.replace("license: unknown", "license: mit").encode() + b"\n## Mine\n\nX\n"
    )
    train(data=text_file, output_dir=str(run), resume=True, **SMALL, **PUSH)
    card = hub.repos["user/gpt"].files()["README.md"].decode()
    assert "license: mit" in card and "## Mine\n\nX" in card


def test_the_commands_in_the_card_repeat_its_figures_and_show_no_secret(
    hub, text_file, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    train(data=text_file, output_dir=str(run), hub_token="hf_owner", **SMALL, **PUSH)
    card = hub.repos["user/gpt"].files()["README.md"].decode()
    everything = b"".join(hub.repos["user/gpt"].files().values())
    assert b"hf_owner" not in everything and str(tmp_path).encode() not in everything
    monkeypatch.chdir(tmp_path)
    place, data, share = re.search(
        r"hf-nanogpt eval (\S+) --data (\S+) --held_out (\S+)", card
    ).groups()
    result = evaluate(place, data, held_out=float(share))
    [told] = re.findall(r"\| Bits per byte \| ([\d.]+) \|", card)
    assert float(told) == pytest.approx(result.bits_per_byte, abs=6e-5)  # it has 4 digits
    [command] = re.findall(r"hf-nanogpt (train .*)", card)
    _, _, args = parse_settings("quickstart", command.split()[1:])
    assert isinstance(args, NanoGPTTrainingArguments) and args.max_steps == SMALL["max_steps"]
    push_to_hub(run, "user/gpt")
