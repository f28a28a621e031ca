"""The weights that training keeps are the best by validation, also after a kill; early end."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CORPUS
from safetensors.torch import load_file, save_file

from hf_nanogpt import train
from hf_nanogpt.checkpoint.steps import RECORD, find_damage
from hf_nanogpt.errors import UserError

# A few hundred letters, learnt by heart: the validation loss turns up after some steps.
TEXT = CORPUS[:600]
SMALL = {
    "tokenizer": "char",
    "n_layer": 1,
    "n_embd": 32,
    "n_head": 2,
    "block_size": 32,
    "dropout": 0.1,  # random numbers in each step
    "validation_fraction": 0.2,
    "per_device_train_batch_size": 8,
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "max_steps": 40,
    "logging_steps": 5,
    "eval_steps": 3,
    "eval_tokens": 1000,
    "save_steps": 3,
    "save_total_limit": 20,
    "sample_steps": 0,
    "disable_tqdm": True,
    "num_threads": 1,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def run(text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(data=text, output_dir=str(folder), **SMALL)
    return folder


def list_steps(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def read_state(folder: Path, step: int) -> dict:
    return json.loads((folder / f"checkpoint-{step}/trainer_state.json").read_text())


def read_losses(folder: Path) -> dict[int, float]:
    rows = read_state(folder, list_steps(folder)[-1])["log_history"]
    return {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}


def assert_equal(ours: Path, theirs: Path) -> None:
    mine, other = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert all(torch.equal(mine[name], other[name]) for name in other)


def test_the_weights_are_those_of_the_lowest_validation_loss(run):
    losses, metrics = read_losses(run), json.loads((run / "metrics.json").read_text())
    best = min(losses, key=losses.__getitem__)
    assert 0 < best < max(losses)
    assert metrics["kept_step"] == best
    assert metrics["eval_loss"] == pytest.approx(losses[best], abs=1e-6)
    assert_equal(run, run / f"checkpoint-{best}")
    assert f"of step {best}, the best by validation loss" in (run / "README.md").read_text()


def test_training_stops_early_where_the_loss_has_turned_up(run):
    losses, metrics = read_losses(run), json.loads((run / "metrics.json").read_text())
    best, last = min(losses, key=losses.__getitem__), metrics["train_steps"]
    assert last < metrics["planned_steps"] == 40
    # The first evaluation that is 12 of 40 steps behind the best, and 5 % worse.
    assert last == next(s for s in losses if s >= best + 12 and losses[s] > 1.05 * losses[best])


def test_only_checkpoints_after_the_best_one_hold_a_copy_of_it(run):
    best = json.loads((run / "metrics.json").read_text())["kept_step"]
    for step in list_steps(run):
        copy = run / f"checkpoint-{step}" / "best.safetensors"
        assert copy.is_file() == (step > best)
    theirs = load_file(run / f"checkpoint-{best}" / "model.safetensors")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in load_file(copy).items())


@pytest.mark.parametrize("after", [-3, 0, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_resumed_before_or_after_its_best_step_keeps_the_same_weights(
    run, text, tmp_path, after
):
    folder = shutil.copytree(run, tmp_path / "run")
    best = json.loads((run / "metrics.json").read_text())["kept_step"]
    for step in list_steps(folder):
        if step > best + after:
            shutil.rmtree(folder / f"checkpoint-{step}")
    train(data=text, output_dir=str(folder), resume=True, **SMALL)
    assert_equal(folder, run)
    assert read_losses(folder) == read_losses(run)


def test_a_run_killed_after_it_decided_to_stop_makes_no_step_more(run, text, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    last = list_steps(folder)[-1]
    (folder / "config.json").unlink()
    train(data=text, output_dir=str(folder), resume=True, **SMALL)
    assert list_steps(folder)[-1] == last
    assert_equal(folder, run)


def test_best_weights_that_are_damaged_or_of_another_model_are_refused(run, text, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    step = folder / f"checkpoint-{list_steps(folder)[-1]}"
    save_file({"x": torch.zeros(1)}, step / "best.safetensors")
    assert find_damage(step) == "best.safetensors"
    path = step / "trainer_state.json"
    state = json.loads(path.read_text())
    record = state["stateful_callbacks"][RECORD]
    del record["checksum"], record["checksums"]["best.safetensors"]
    record["sizes"]["best.safetensors"] = 1
    path.write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"best.safetensors cannot be used: it holds other weights"):
        train(data=text, output_dir=str(folder), resume=True, **SMALL)


@pytest.mark.slow
def test_patience_of_1_never_stops_and_without_keep_best_the_last_weights_stay(text, tmp_path):
    result = train(data=text, output_dir=str(tmp_path / "a"), patience=1.0, **SMALL)
    assert result.metrics["train_steps"] == 40 > result.metrics["kept_step"]
    result = train(data=text, output_dir=str(tmp_path / "b"), keep_best=False, **SMALL)
    assert result.metrics["train_steps"] == 40 == result.metrics["kept_step"]
    assert_equal(tmp_path / "b", tmp_path / "b/checkpoint-40")
    assert not list((tmp_path / "b").glob("checkpoint-*/best.safetensors"))


@pytest.mark.slow
def test_the_last_step_is_evaluated_so_that_it_can_be_the_best(text, tmp_path):
    settings = SMALL | {"max_steps": 5, "learning_rate": 0.01}
    result = train(data=text, output_dir=str(tmp_path / "a"), **settings)
    assert list(read_losses(tmp_path / "a")) == [3, 5]
    assert result.metrics["kept_step"] == 5


@pytest.mark.slow
def test_fine_tuning_never_ends_worse_than_it_began(run, text, tmp_path):
    settings = {name: SMALL[name] for name in ("disable_tqdm", "num_threads", "sample_steps")}
    settings |= {"max_steps": 6, "eval_steps": 2, "learning_rate": 10.0, "eval_tokens": 1000}
    result = train(
        "finetune", start_from=run, data=text, output_dir=str(tmp_path / "a"), **settings
    )
    assert result.metrics["kept_step"] == 0
    assert result.metrics["eval_loss"] == result.metrics["before"]["eval_loss"]
    assert_equal(tmp_path / "a", run)
