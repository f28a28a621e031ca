"""A training resumed from any of its checkpoints, or killed in any evaluation, ends the same."""

import itertools
import json
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from torch.optim.lr_scheduler import LambdaLR
from transformers import EarlyStoppingCallback, get_scheduler

from hf_nanogpt import NanoGPTForCausalLM, NanoGPTTrainer, NanoGPTTrainingArguments
from hf_nanogpt.training.best import BestCallback
from hf_nanogpt.training.stopping import TrainingInterrupted, stop_on_signals

ROWS = torch.arange(16 * 20).view(-1, 16) % 61
STEPS, EPOCH = 13, 5  # batches of 4 of 20 rows; it ends in the middle of an epoch
UNLIKE = torch.randint(1, 61, (6, 16), generator=torch.Generator().manual_seed(1))  # gets worse
BEST = {"load_best_model_at_end": True, "learning_rate": 0.3}  # each evaluation is the best so far
STRATEGIES = {
    "steps": {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2} | BEST,
    "epoch": {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch"}
    | BEST,
    "best of steps": {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best"} | BEST,
    "best of epochs": {"eval_strategy": "epoch", "save_strategy": "best"} | BEST,
    "mixed": {"eval_strategy": "epoch", "save_steps": 5, "logging_strategy": "epoch"},
    "plateau": {
        "eval_strategy": "epoch",
        "save_steps": 5,
        "learning_rate": 0.3,
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5},
        "eval_rows": UNLIKE,
    },
    "kept in memory": {"eval_steps": 2, "save_steps": 5, "eval_rows": UNLIKE, "patience": 1.0},
}


def make_trainer(
    folder: Path, *, max_steps: int = STEPS, callbacks=(), eval_rows=ROWS[:6], **settings
) -> NanoGPTTrainer:
    args = NanoGPTTrainingArguments(
        output_dir=str(folder),
        max_steps=max_steps,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=2,
        use_cpu=True,
        **{"disable_tqdm": True, "num_threads": 1, "logging_steps": 3} | settings,
    )
    torch.manual_seed(0)
    model = NanoGPTForCausalLM(tiny_config("nano", n_layer=1, dropout=0.1))  # random in each step
    train, evaluation = (
        [{"input_ids": r, "labels": r} for r in rows] for rows in (ROWS, eval_rows)
    )
    trainer = NanoGPTTrainer(
        model, args, train_dataset=train, eval_dataset=evaluation, callbacks=[*callbacks]
    )
    if "patience" in settings:
        trainer.keep_best(BestCallback(settings["patience"]))
    return trainer


def history(trainer: NanoGPTTrainer) -> list[dict]:
    """Return everything that was logged, but times; of two orders of one step, the same."""
    odd = ("_runtime", "_per_second", "mfu", "preparation_time", "_seen", "total_flos")
    rows = [
        {k: v for k, v in row.items() if not k.endswith(odd)} for row in trainer.state.log_history
    ]
    return [row for row in rows if "train_loss" not in row] + rows[-1:]


def assert_same(resumed: NanoGPTTrainer, whole: NanoGPTTrainer, where: object) -> None:
    assert history(resumed) == history(whole), where
    ours, theirs = (trainer.model.state_dict() for trainer in (resumed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs), where
    if whole.best:
        assert resumed.best.describe() == whole.best.describe(), where
        ours, theirs = (trainer.best.weights for trainer in (resumed, whole))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), where
    assert resumed.state.best_metric == whole.state.best_metric
    best = resumed.state.best_model_checkpoint, whole.state.best_model_checkpoint
    names = {path and Path(path).name for path in best}
    assert len(names) == 1, where


def kill_in_evaluation(trainer: NanoGPTTrainer, count: int) -> str | None:
    """Train with SIGTERM in the batch `count` of all evaluations; return the checkpoint."""
    calls, prediction_step = itertools.count(1), trainer.prediction_step

    def signalling(*args, **kwargs):
        if next(calls) == count:
            signal.raise_signal(signal.SIGTERM)
        return prediction_step(*args, **kwargs)

    trainer.prediction_step = signalling
    with pytest.raises(TrainingInterrupted) as caught, stop_on_signals(trainer):
        trainer.train()
    return caught.value.checkpoint


def kill_in_step(trainer: NanoGPTTrainer, count: int) -> str | None:
    training_step = trainer.training_step

    def signalling(*args, **kwargs):
        if trainer.state.global_step == count - 1:
            signal.raise_signal(signal.SIGTERM)
        return training_step(*args, **kwargs)

    trainer.training_step = signalling
    with pytest.raises(TrainingInterrupted) as caught, stop_on_signals(trainer):
        trainer.train()
    return caught.value.checkpoint


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs of each strategy, which keep all checkpoints."""

    def run(name: str) -> NanoGPTTrainer:
        if name not in runs:
            folder = tmp_path_factory.mktemp("whole") / "run"
            runs[name] = make_trainer(folder, save_total_limit=None, **STRATEGIES[name])
            runs[name].train()
        return runs[name]

    runs: dict[str, NanoGPTTrainer] = {}
    return run


def soon(chosen: str) -> pytest.MarkDecorator:
    """Try one strategy in the short suite, all in the whole one."""
    rest = (pytest.param(name, marks=pytest.mark.slow) for name in STRATEGIES if name != chosen)
    return pytest.mark.parametrize("name", [chosen, *rest])


@soon("best of epochs")
def test_a_run_killed_in_an_evaluation_ends_as_the_uninterrupted_one(whole, tmp_path, name):
    uninterrupted = whole(name)
    evaluations = sum("eval_loss" in row for row in uninterrupted.state.log_history)
    assert evaluations >= 3
    for count in range(2, 3 * evaluations + 1, 3):  # the middle of the three batches of each
        make = partial(make_trainer, tmp_path / str(count), **STRATEGIES[name])
        checkpoint = kill_in_evaluation(make(), count)
        resumed = make()
        resumed.train(resume_from_checkpoint=checkpoint)
        assert_same(resumed, uninterrupted, f"{name}, {checkpoint}")


@pytest.mark.parametrize(
    "name",
    ["mixed", *(pytest.param(n, marks=pytest.mark.slow) for n in STRATEGIES if n != "mixed")],
)
def test_a_run_stopped_in_the_last_step_of_an_epoch_ends_as_the_uninterrupted_one(
    whole, tmp_path, name
):
    for step in (EPOCH, STEPS):
        make = partial(make_trainer, tmp_path / str(step), **STRATEGIES[name])
        checkpoint = kill_in_step(make(), step)
        assert checkpoint.endswith(f"checkpoint-{step}")
        resumed = make()
        resumed.train(resume_from_checkpoint=checkpoint)
        assert_same(resumed, whole(name), f"{name}, step {step}")


@pytest.mark.parametrize(
    "name",
    ["mixed", *(pytest.param(n, marks=pytest.mark.slow) for n in STRATEGIES if n != "mixed")],
)
def test_a_run_resumed_from_any_checkpoint_ends_as_the_uninterrupted_one(whole, tmp_path, name):
    uninterrupted = whole(name)
    folder = Path(uninterrupted.args.output_dir)
    steps = sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
    assert steps
    for step in steps:
        copy = shutil.copytree(folder, tmp_path / str(step))
        for later in steps[steps.index(step) + 1 :]:  # as if it had been killed after this one
            shutil.rmtree(copy / f"checkpoint-{later}")
        resumed = make_trainer(copy, **STRATEGIES[name], save_total_limit=None)
        resumed.train(resume_from_checkpoint=str(copy / f"checkpoint-{step}"))
        assert_same(resumed, uninterrupted, f"{name}, step {step}")


def test_a_run_killed_again_after_its_evaluation_was_repeated_knows_its_best(whole, tmp_path):
    make = partial(make_trainer, tmp_path, **STRATEGIES["kept in memory"])
    uninterrupted = whole("kept in memory")
    best = uninterrupted.best.step
    checkpoint = kill_in_evaluation(make(), 3 * (best // 2) - 1)  # three batches each
    assert checkpoint.endswith(f"checkpoint-{best}")
    resumed = make()
    resumed.training_step = _fail
    with pytest.raises(ZeroDivisionError):
        resumed.train(resume_from_checkpoint=checkpoint)
    again = make()
    again.train(resume_from_checkpoint=checkpoint)
    assert_same(again, uninterrupted, checkpoint)


def _fail(*args, **kwargs):
    raise ZeroDivisionError


def test_a_run_that_stops_early_makes_no_step_more_after_a_kill_in_that_evaluation(tmp_path):
    settings = STRATEGIES["steps"] | {"eval_rows": UNLIKE}

    def make(name: str) -> NanoGPTTrainer:
        stop = EarlyStoppingCallback(early_stopping_patience=1)
        return make_trainer(tmp_path / name, callbacks=[stop], **settings)

    uninterrupted = make("whole")
    uninterrupted.train()
    last = uninterrupted.state.global_step
    assert last < STEPS
    checkpoint = kill_in_evaluation(make("killed"), 3 * (last // 2))
    resumed = make("killed")
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == last
    assert_same(resumed, uninterrupted, checkpoint)


def test_a_longer_run_follows_its_own_schedule_from_the_first_step_on(tmp_path):
    first = make_trainer(tmp_path / "run", max_steps=6, eval_strategy="no", learning_rate=0.03)
    first.train()
    longer = make_trainer(
        tmp_path / "run", max_steps=9, logging_steps=1, eval_strategy="no", learning_rate=0.03
    )
    longer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.03)
    schedule = get_scheduler("linear", optimizer, 0, 9)
    assert isinstance(schedule, LambdaLR)
    expected = [0.03 * schedule.lr_lambdas[0](step) for step in (6, 7, 8)]
    rows = [row for row in longer.state.log_history if row["step"] > 6]
    rates = [row["learning_rate"] for row in rows if "learning_rate" in row]
    assert rates == pytest.approx(expected, rel=1e-12)


def test_train_loss_is_the_mean_of_all_steps_of_a_resumed_run_too(tmp_path):
    settings = {"logging_steps": 4, "save_steps": 6, "save_total_limit": 9, "eval_strategy": "no"}
    whole = make_trainer(tmp_path / "whole", **settings | {"logging_steps": 1})
    whole_loss = whole.train().training_loss
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row]
    assert whole_loss == pytest.approx(sum(losses) / STEPS, rel=1e-6)
    make_trainer(tmp_path / "run", **settings).train()
    resumed = make_trainer(tmp_path / "run", **settings)
    output = resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    assert output.training_loss == pytest.approx(whole_loss, rel=1e-6)
    assert resumed.state.log_history[-1]["train_loss"] == output.training_loss


def test_a_hostile_record_of_the_end_of_an_epoch_is_not_trusted(tmp_path):
    make = partial(make_trainer, tmp_path, save_total_limit=9, **STRATEGIES["mixed"])
    checkpoint = Path(kill_in_step(make(), EPOCH))
    path = checkpoint / "trainer_state.json"
    for name, value in (("step_figures", ["x", {}]), ("epoch_ended", "x"), ("step_figures", 3)):
        state = json.loads(path.read_text())
        state["stateful_callbacks"]["InterruptibleTrainer"][name] = value
        path.write_text(json.dumps(state))
        resumed = make()
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert resumed.state.global_step == STEPS
