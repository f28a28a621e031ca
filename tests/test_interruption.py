"""A training that is killed, interrupted or fails at any moment resumes as if nothing happened.

Children of a process that has imported everything run the real command and really get the signal;
only the moment is arranged, by a function of the library that is made to send it to itself.
"""

import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from children import PROCESSES, forked
from conftest import CORPUS, ROOT, tiny_config
from packaging.version import parse
from safetensors.torch import load_file
from torch.distributed import TCPStore
from transformers import TrainerState

from hf_nanogpt import (
    NanoGPTForCausalLM,
    NanoGPTTrainer,
    NanoGPTTrainingArguments,
    train_tokenizer,
)
from hf_nanogpt.checkpoint.steps import (
    RECORD,
    find_damage,
    find_intact_checkpoint,
    find_last_checkpoint,
    sum_file,
    sum_state,
)
from hf_nanogpt.checkpoint.writing import RECIPE, clear_unfinished
from hf_nanogpt.cli import main
from hf_nanogpt.cli.train import _resume_command
from hf_nanogpt.training import run as run_module
from hf_nanogpt.training.stopping import stop_on_signals

pytestmark = forked
# Batches of 4 of some 30 blocks make several epochs, dropout makes random numbers count, and no two
# of logging, evaluating and saving go in step.
SETTINGS = {
    "tokenizer": "char",
    "validation_fraction": 0.2,
    "n_layer": 1,
    "n_embd": 32,
    "n_head": 2,
    "block_size": 32,
    "dropout": 0.1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 2,
    "logging_steps": 3,
    "eval_steps": 4,
    "eval_tokens": 10_000,  # all, in several batches
    "save_steps": 5,
    "save_total_limit": 1,
    "max_steps": 17,
    "sample_steps": 0,
    "disable_tqdm": True,
    "num_threads": 1,
    "use_cpu": True,
}
KILLED = -signal.SIGKILL
# The function that gets the signal; only calls with this text in their arguments count.
MOMENTS = {
    "batch": (NanoGPTTrainer, "training_step", ""),
    "evaluation": (NanoGPTTrainer, "prediction_step", ""),
    "saved": (torch, "save", "checkpoint-"),  # once each for optimizer, schedule and rng
    "state": (TrainerState, "save_to_json", "checkpoint-"),
    "rotation": (shutil, "rmtree", "checkpoint-"),
    "artifacts": (os, "replace", ".staged-"),
    "data": (NanoGPTTrainer, "__init__", ""),
    "checkpoint": (NanoGPTTrainer, "_save_checkpoint", ""),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Callable:
    text = tmp_path_factory.mktemp("corpus") / "text.txt"
    text.write_text(CORPUS[:1300], encoding="utf-8")

    def run(
        folder: Path, *flags: str, moment: tuple | None = None, ranks: int = 1, **settings
    ) -> tuple[int, str]:
        """Train in other processes; return the exit code and what was printed, both of rank 0.

        The moment comes in the process of the last rank.
        """
        values = SETTINGS | {"data": text, "output_dir": folder} | settings
        argv = ["train", *(f"--{name}={value}" for name, value in values.items()), *flags]
        # Where they meet, as torchrun does it: a port that is taken already cannot be taken twice.
        meeting = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        children = [
            PROCESSES.Process(
                target=_train,
                args=(argv, folder, moment, rank, ranks, meeting.port),
                daemon=True,  # else one that hangs would keep the tests from ending
            )
            for rank in range(ranks)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join()
        assert len({child.exitcode for child in children}) == 1
        return children[0].exitcode, folder.with_suffix(".log").read_text(encoding="utf-8")

    return run


def _train(
    argv: list[str], folder: Path, moment: tuple | None, rank: int, ranks: int, port: int
) -> None:
    with folder.with_suffix(f".{rank}.log" if rank else ".log").open("w") as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    _note_batches(folder.with_suffix(".batches"))
    if moment and rank == ranks - 1:
        _arrange(*moment)
    sys.exit(main(argv))


def _note_batches(path: Path) -> None:
    """Write down which tokens each step is trained on."""
    training_step = NanoGPTTrainer.training_step

    def noting(self, model, inputs, *args, **kwargs):
        with path.open("a", encoding="utf-8") as file:
            tokens = zlib.crc32(inputs["input_ids"].numpy())
            file.write(f"{self.state.global_step} {os.getpid()} {tokens}\n")
        return training_step(self, model, inputs, *args, **kwargs)

    NanoGPTTrainer.training_step = noting


def _arrange(name: str, count: int, *faults: signal.Signals | str) -> None:
    """Send signals at call number `count` of a moment; if it writes a file, only half is written.

    A fault in digits is the file size at which the disk is full.
    """
    owner, method, where = MOMENTS[name]
    original, calls = getattr(owner, method), []

    def signalling(*args, **kwargs):
        if where in " ".join(map(str, args[:2])):
            calls.append(args)
        if len(calls) == count:
            if name in ("saved", "state"):
                original(*args, **kwargs)
                os.truncate(args[1], os.path.getsize(args[1]) // 2)
            elif name == "rotation":
                (Path(args[0]) / "optimizer.pt").unlink()
            for fault in faults:
                if isinstance(fault, str):
                    resource.setrlimit(resource.RLIMIT_FSIZE, (int(fault), -1))
                else:
                    os.kill(os.getpid(), fault)
        return original(*args, **kwargs)

    setattr(owner, method, signalling)


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    code, printed = run(folder)
    assert code == 0, printed
    return folder


def _history(folder: Path) -> list[dict]:
    """Return everything that was logged, except times."""
    state = json.loads((folder / "checkpoint-17" / "trainer_state.json").read_text())
    odd = ("_runtime", "_per_second", "mfu")
    return [{k: v for k, v in row.items() if not k.endswith(odd)} for row in state["log_history"]]


def _batches(folder: Path) -> dict[str, list[str]]:
    """Return the batches of each step, from the last process that did it."""
    batches: dict[str, dict[str, list[str]]] = {}
    for line in folder.with_suffix(".batches").read_text().splitlines():
        step, process, tokens = line.split()
        batches.setdefault(step, {}).setdefault(process, []).append(tokens)
    return {step: list(done.values())[-1] for step, done in batches.items()}


def _assert_same(folder: Path, whole: Path) -> None:
    for name in ("model.safetensors", "checkpoint-17/model.safetensors", "tokenizer.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert _history(folder) == _history(whole)
    assert _batches(folder) == _batches(whole)
    assert {p.name for p in folder.iterdir()} == {p.name for p in whole.iterdir()}
    ours, theirs = (json.loads((f / "metrics.json").read_text()) for f in (folder, whole))
    assert ours["eval_loss"] == theirs["eval_loss"]


# Killed


@pytest.mark.parametrize(
    ("moment", "last"),
    [  # between batches: in the next test
        (("saved", 2), None),
        pytest.param(("state", 2), "checkpoint-5", marks=pytest.mark.slow),
        pytest.param(("rotation", 1), "checkpoint-10", marks=pytest.mark.slow),
        pytest.param(("artifacts", 3), "checkpoint-17", marks=pytest.mark.slow),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(run, whole, tmp_path, moment, last):
    folder = tmp_path / "run"
    assert run(folder, moment=(*moment, signal.SIGKILL))[0] == KILLED
    found = find_last_checkpoint(folder)
    assert (found and Path(found).name) == last
    code, printed = run(folder, "--resume")
    assert code == 0, printed
    assert ("has no checkpoint yet" in printed) == (last is None)
    _assert_same(folder, whole)


@pytest.mark.slow
def test_a_run_killed_several_times_equals_an_uninterrupted_one(run, whole, tmp_path):
    folder = tmp_path / "run"
    for count in (16, 15, 13):
        assert run(folder, "--resume", moment=("batch", count, signal.SIGKILL))[0] == KILLED
    again, printed = run(folder, "--resume")
    assert again == 0, printed
    _assert_same(folder, whole)


@pytest.mark.slow
def test_resuming_a_finished_run_does_no_step_and_changes_nothing(run, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    shutil.copy(whole.with_suffix(".batches"), folder.with_suffix(".batches"))
    code, printed = run(folder, "--resume")
    assert code == 0 and "has done all its steps" in printed
    _assert_same(folder, whole)


@pytest.mark.slow
def test_a_stream_resumed_in_its_second_pass_continues_there(run, tmp_path):
    rows = tmp_path / "rows.jsonl"
    texts = [f"row {i}: " + "what is read as a stream " * 2 for i in range(40)]
    rows.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    stream = {"data": rows, "streaming": True, "validation_documents": 4, "eval_steps": 0.25}
    folders = tmp_path / "whole", tmp_path / "run"
    assert run(folders[0], **stream)[0] == 0
    assert run(folders[1], moment=("batch", 33, signal.SIGKILL), **stream)[0] == KILLED
    code, printed = run(folders[1], "--resume", **stream)
    assert code == 0 and "do not match" not in printed
    _assert_same(folders[1], folders[0])


# Interrupted


@pytest.mark.parametrize(
    ("moment", "signum", "last"),
    [
        (("batch", 13), signal.SIGINT, "checkpoint-7"),
        pytest.param(("batch", 33), signal.SIGHUP, "checkpoint-17", marks=pytest.mark.slow),
        pytest.param(("evaluation", 7), signal.SIGINT, "checkpoint-8", marks=pytest.mark.slow),
        pytest.param(("saved", 2), signal.SIGTERM, "checkpoint-6", marks=pytest.mark.slow),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_an_interrupted_run_saves_prints_how_to_resume_and_resumes(
    run, whole, tmp_path, moment, signum, last
):
    folder = tmp_path / "run"
    code, printed = run(folder, moment=(*moment, signum))
    assert code == 128 + signum, printed
    assert {path.name for path in folder.iterdir()} == {last, RECIPE}
    assert f"To resume from {folder / last}:" in printed
    assert printed.rstrip().endswith("--resume") and f"--output_dir={folder}" in printed
    again, printed = run(folder, "--resume", disable_tqdm=False)
    assert again == 0, printed
    step = last.removeprefix("checkpoint-")
    assert printed.count(f"\nResumed from step {step} of 17.\n") == 1
    _assert_same(folder, whole)


def test_the_command_to_resume_shows_no_secret():
    given = ["--data=https://me:pw@host/x?sign=1", "--hub-token", "hf_x", "--seed", "1"]
    given += ["--hub_token=hf_x", "--data", "https://me:pw@host/y"]
    shown = _resume_command(given)
    assert shown.endswith("train --data=https://host/x --seed 1 --data https://host/y --resume")


@pytest.mark.slow
def test_no_path_of_this_machine_is_in_a_checkpoint(run, tmp_path):
    folder = tmp_path / "private-home" / "run"
    train_tokenizer([], kind="byte").save_pretrained(tmp_path / "private-home" / "words")
    settings = {"tokenizer": tmp_path / "private-home" / "words", "max_steps": 6}
    settings |= {"load_best_model_at_end": True, "eval_steps": 5}
    assert run(folder, **settings)[0] == 0
    last = find_last_checkpoint(folder)
    state = Path(last) / "trainer_state.json"
    assert "best_model_checkpoint" in state.read_text()
    assert "private-home" not in state.read_text()
    # As version 0.1.0 wrote it.
    content = json.loads(state.read_text())
    content["stateful_callbacks"][RECORD]["settings"]["tokenizer"] = str(settings["tokenizer"])
    state.write_text(json.dumps(content))
    _reseal(state.parent)
    code, printed = run(folder, "--resume", **settings | {"max_steps": 7})
    assert code == 0, printed


def test_a_second_signal_stops_at_once(run, tmp_path):
    twice = ("batch", 13, signal.SIGINT, signal.SIGINT)
    code, printed = run(tmp_path / "run", moment=twice)
    assert code == 130 and "checkpoint-5" in printed
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint-5", RECIPE}


def test_a_signal_before_training_ends_the_command_in_one_line(run, tmp_path):
    code, printed = run(tmp_path / "run", moment=("data", 1, signal.SIGINT))
    assert code == 130 and printed.strip() == "Interrupted."
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(
    parse(torch.__version__) < parse("2.13"),
    reason="torch 2.11 cannot load to cpu:0, the device of several processes on a CPU",
)
def test_several_processes_stop_after_the_same_step_and_resume_exactly(run, tmp_path):
    folders = tmp_path / "whole", tmp_path / "run"
    two = {"ranks": 2, "gradient_accumulation_steps": 1}
    assert run(folders[0], **two)[0] == 0
    code, printed = run(folders[1], moment=("batch", 7, signal.SIGTERM), **two)
    assert code == 143 and f"To resume from {folders[1] / 'checkpoint-7'}" in printed
    assert "To resume" not in folders[1].with_suffix(".1.log").read_text()
    assert run(folders[1], "--resume", **two)[0] == 0
    for name in ("model.safetensors", "checkpoint-17/optimizer.pt"):
        assert (folders[1] / name).read_bytes() == (folders[0] / name).read_bytes()
    assert _history(folders[1]) == _history(folders[0])


# In Python


def _make_trainer(folder: Path, **settings) -> NanoGPTTrainer:
    settings = {
        "max_steps": 6,
        "logging_steps": 1,
        "eval_strategy": "no",
        "sample_steps": 0,
    } | settings
    args = NanoGPTTrainingArguments(
        output_dir=str(folder), num_threads=1, use_cpu=True, disable_tqdm=True, **settings
    )
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(32 * 60).view(-1, 32) % 61]
    model = NanoGPTForCausalLM(tiny_config("nano", n_layer=1))
    return NanoGPTTrainer(model, args, train_dataset=rows, eval_dataset=rows[:8])


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_in_python_an_interruption_is_raised_and_handlers_are_restored(tmp_path, signum):
    trainer, handlers = _make_trainer(tmp_path / "run"), list(map(signal.getsignal, (1, 2, 15)))
    with pytest.raises(KeyboardInterrupt) as caught, stop_on_signals(trainer):
        signal.raise_signal(signum)
        trainer.train()
    assert caught.value.signum == signum
    assert caught.value.checkpoint == str(tmp_path / "run" / "checkpoint-1")
    assert list(map(signal.getsignal, (1, 2, 15))) == handlers


def test_an_ignored_signal_stays_ignored_and_another_thread_leaves_signals_alone(tmp_path):
    def use() -> None:
        with stop_on_signals(trainer):
            found.append((signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)))

    trainer, found = _make_trainer(tmp_path), []
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        use()
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert [interrupt for interrupt, _ in found] == [signal.SIG_IGN] * 2
    assert callable(found[0][1]) and found[1][1] == signal.SIG_DFL


# Other settings than before


@pytest.fixture(scope="module")
def part(run, tmp_path_factory) -> Path:
    """A run that was interrupted after 7 steps."""
    folder = tmp_path_factory.mktemp("runs") / "part"
    assert run(folder, moment=("batch", 13, signal.SIGINT))[0] == 130
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 0.5, "seed": 7},
        {"per_device_train_batch_size": 4},
        {"n_layer": 2},
        {"tokenizer": "byte"},
        {"data": str(ROOT / "LICENSE")},
        {"validation_fraction": 0.3},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_other_settings_are_refused_by_name(run, part, tmp_path, settings):
    folder = shutil.copytree(part, tmp_path / "run")
    code, printed = run(folder, "--resume", **settings)
    assert code == 2 and "was trained with other settings" in printed
    names = {
        "n_layer": "num_hidden_layers=2 (was 1)",
        "per_device_train_batch_size": "total batch size=8 (was 4)",
        "validation_fraction": "data=",
        "seed": "seed=7 (was 42)",
    }
    for name in settings:
        assert names.get(name, f"{name}=") in printed
    assert "Traceback" not in printed
    assert {path.name for path in folder.iterdir()} == {"checkpoint-7", RECIPE}


@pytest.mark.slow
def test_more_steps_and_other_groups_of_the_same_batch_are_allowed_with_a_warning(
    run, part, tmp_path
):
    folder = shutil.copytree(part, tmp_path / "run")
    other = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    code, printed = run(folder, "--resume", max_steps=19, save_steps=4, **other)
    assert code == 0
    assert "max_steps=19 (was 17): the learning rate follows the new schedule" in printed
    assert "gradient_accumulation_steps=1 (was 2): equal up to rounding only" in printed
    assert (folder / "checkpoint-19").is_dir()


def test_fewer_steps_than_are_done_are_refused(run, part, tmp_path):
    folder = shutil.copytree(part, tmp_path / "run")
    code, printed = run(folder, "--resume", max_steps=5)
    assert code == 2 and "max_steps=5 is too low" in printed and "7 steps" in printed


@pytest.mark.slow
def test_a_checkpoint_without_what_resuming_needs_is_refused(run, tmp_path):
    folder = tmp_path / "run"
    assert run(folder, save_only_model=True, save_steps=10)[0] == 0
    code, printed = run(folder, "--resume")
    assert code == 2 and "checkpoint-17 cannot be resumed exactly: it was saved with" in printed


# Failures


def test_a_loss_that_is_not_finite_stops_training_and_is_not_saved(run, tmp_path):
    folder = tmp_path / "run"
    code, printed = run(folder, learning_rate=1e30, save_steps=1, logging_steps=50)
    assert code == 2 and "The loss is nan at step" in printed
    assert "the last good checkpoint is" in printed and "below 1e+30" in printed
    for path in folder.glob("*/model.safetensors"):
        assert all(weight.isfinite().all() for weight in load_file(path).values())


def test_weights_that_are_not_finite_are_neither_saved_nor_evaluated(tmp_path):
    trainer = _make_trainer(tmp_path / "run", learning_rate=0.25)
    trainer._tr_loss = torch.zeros(())
    trainer.model.model.norm.weight.data[3] = torch.inf
    for act in (partial(trainer._save_checkpoint, None, None), trainer.evaluate):
        with pytest.raises(ValueError, match=r"is nan at step 0.*no checkpoint yet.*0.25.*0.08"):
            act()
    assert not list(tmp_path.rglob("checkpoint-*"))


@pytest.mark.slow
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_full_disk_is_reported_in_a_sentence_and_saved_checkpoints_stay(
    run, whole, tmp_path, file
):
    folder = tmp_path / "run"
    size = (whole / "checkpoint-17" / file).stat().st_size
    code, printed = run(folder, moment=("checkpoint", 2, str(size // 2)), save_total_limit=2)
    assert code == 2 and "checkpoint-10 could not be written" in printed, printed
    assert len(printed.splitlines()) == 1
    assert {path.name for path in folder.iterdir()} == {"checkpoint-5", RECIPE}
    if file == "optimizer.pt":  # what is left is the same for the others
        again, printed = run(folder, "--resume")
        assert again == 0, printed
        _assert_same(folder, whole)


# Finding


def test_only_whole_checkpoints_are_found_and_only_later_halves_are_deleted(part, tmp_path):
    folder = tmp_path / "run"
    for step in (5, 9, 10, 30):
        shutil.copytree(part / "checkpoint-7", folder / f"checkpoint-{step}")
    (folder / "checkpoint-5" / "rng_state.pth").unlink()  # by a rotation cut short
    weights = folder / "checkpoint-10" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    (folder / "checkpoint-30" / "trainer_state.json").write_text("{")
    for name in (".staged-abcd_123", "checkpoint-12-mine", "thesis"):
        (folder / name).mkdir()
    assert find_last_checkpoint(folder) == str(folder / "checkpoint-9")
    clear_unfinished(folder)
    left = {"checkpoint-5", "checkpoint-9", "checkpoint-12-mine", "thesis"}
    assert {path.name for path in folder.iterdir()} == left


# Damaged, or made by somebody else


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_flipped_byte_in_any_file_is_found_by_name(whole, tmp_path):
    step = shutil.copytree(whole / "checkpoint-17", tmp_path / "run" / "checkpoint-17")
    assert find_damage(step) is None
    assert find_intact_checkpoint(step.parent) == str(step)
    for path in step.iterdir():
        content = path.read_bytes()
        _flip(path)
        if find_last_checkpoint(step.parent):  # else a flipped brace has made it unreadable
            assert find_damage(step) == path.name
            with pytest.raises(ValueError, match=rf"{re.escape(str(path))} is damaged\. Restore"):
                find_intact_checkpoint(step.parent)
        path.write_bytes(content)
    state = step / "trainer_state.json"
    state.write_text(state.read_text().replace('"global_step": 17', '"global_step": 16'))
    assert find_damage(step) == "trainer_state.json"


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_resumed(run, whole, tmp_path):
    folder = tmp_path / "run"
    moment = ("batch", 31, signal.SIGKILL)
    assert run(folder, save_total_limit=3, moment=moment)[0] == KILLED
    _flip(folder / "checkpoint-15" / "optimizer.pt")
    code, printed = run(folder, "--resume")
    assert code == 0, printed
    assert f"{folder / 'checkpoint-15' / 'optimizer.pt'} is damaged" in printed
    _assert_same(folder, whole)


@pytest.mark.slow
def test_a_damaged_best_model_is_not_loaded(run, tmp_path):
    best = {"load_best_model_at_end": True, "greater_is_better": True}  # so that it is the first
    best |= {"save_total_limit": 9, "eval_steps": 4, "save_steps": 4}
    folder = tmp_path / "run"
    assert run(folder, moment=("batch", 20, signal.SIGKILL), **best)[0] == KILLED
    state = json.loads((folder / "checkpoint-8" / "trainer_state.json").read_text())
    chosen = Path(state["best_model_checkpoint"]).name
    assert chosen == "checkpoint-4"
    moved = folder.rename(tmp_path / "moved")  # the path in the file is not where it is now
    _flip(moved / chosen / "model.safetensors")
    code, printed = run(moved, "--resume", **best)
    assert code == 2 and f"{moved / chosen}/model.safetensors is damaged" in printed


class _Attack:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def _reseal(step: Path) -> None:
    """Write the checksums of the files as they are, as an attacker can."""
    path = step / "trainer_state.json"
    state = json.loads(path.read_text())
    record = state["stateful_callbacks"][RECORD]
    files = [file for file in step.iterdir() if file != path]
    record["sizes"] = {file.name: file.stat().st_size for file in files}
    record["checksums"] = {file.name: sum_file(file) for file in files}
    record["checksum"] = sum_state(state)
    path.write_text(json.dumps(state))


def _pickle(value, path: Path) -> None:
    path.write_bytes(pickle.dumps(value))


@pytest.mark.parametrize(
    ("write", "names", "is_loaded"),
    [
        (torch.save, ["optimizer.pt"], True),
        (torch.save, ["scheduler.pt"], True),
        (torch.save, ["rng_state.pth"], True),
        (torch.save, ["pytorch_model.bin"], True),
        (_pickle, ["optimizer.pt"], True),
        (_pickle, ["rng_state.pth"], True),
        pytest.param(
            torch.save, ["training_args.bin", "optimizer.bin"], False, marks=pytest.mark.slow
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_no_code_runs_from_a_checkpoint_of_somebody_else(
    run, part, tmp_path, write, names, is_loaded
):
    folder, marker = shutil.copytree(part, tmp_path / "run"), tmp_path / "code ran"
    step = folder / "checkpoint-7"
    for name in names:
        write(_Attack(marker), step / name)
    if "pytorch_model.bin" in names:
        (step / "model.safetensors").unlink()
    _reseal(step)
    code, printed = run(folder, "--resume", max_steps=8)
    assert not marker.exists()
    assert code == (2 if is_loaded else 0), printed
    assert "Traceback" not in printed
    assert ("holds more than tensors and numbers" in printed) == is_loaded


def _squeeze(state):
    for values in state["state"].values():
        values |= {k: torch.zeros(3) for k, v in values.items() if v.ndim}
    return state


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("optimizer.pt", lambda state: 3),
        ("optimizer.pt", _squeeze),
        ("scheduler.pt", lambda state: [1]),
        ("rng_state.pth", lambda state: {"python": 1}),
    ],
)
def test_a_file_of_the_wrong_type_or_shape_is_refused_in_a_sentence(
    run, part, tmp_path, name, change
):
    folder = shutil.copytree(part, tmp_path / "run")
    path = folder / "checkpoint-7" / name
    torch.save(change(torch.load(path, weights_only=name != "rng_state.pth")), path)
    _reseal(path.parent)
    code, printed = run(folder, "--resume", max_steps=8)
    assert code == 2 and "Traceback" not in printed, printed
    assert f"Cannot resume from {path.parent}: " in printed


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("settings", [1]),
        ("seconds", "x"),
        ("running_losses", ["x"]),
        ("last_logged", None),
        ("TrainerControl", [3]),
        ("TrainerControl", {"args": {"should_evaluate": 1}, "attributes": {}}),
        ("log_history", None),
        ("train_batch_size", "x"),
        ("global_step", -5),
    ],
)
def test_a_hostile_value_in_the_state_is_damage(part, tmp_path, name, value):
    step = shutil.copytree(part / "checkpoint-7", tmp_path / "checkpoint-7")
    path = step / "trainer_state.json"
    state = json.loads(path.read_text())
    callbacks = state["stateful_callbacks"]
    parts = (state, callbacks, callbacks[RECORD])
    next(p for p in parts if name in p)[name] = value
    path.write_text(json.dumps(state))
    _reseal(step)
    assert find_damage(step) == (None if name == "log_history" else "trainer_state.json")


@pytest.mark.slow
def test_a_path_in_a_checkpoint_of_somebody_else_is_not_followed(run, part, tmp_path):
    folder = shutil.copytree(part, tmp_path / "run")
    elsewhere = shutil.copytree(part / "checkpoint-7", tmp_path / "checkpoint-elsewhere")
    _flip(elsewhere / "model.safetensors")
    path = folder / "checkpoint-7" / "trainer_state.json"
    flags = {"max_steps": 8, "load_best_model_at_end": True, "eval_steps": 5}
    for step in ("7/../../checkpoint-elsewhere", 7):
        state = json.loads(path.read_text())
        state |= {"best_model_checkpoint": str(elsewhere), "best_global_step": step}
        path.write_text(json.dumps(state | {"best_metric": 0.0}))
        _reseal(path.parent)
        code, printed = run(folder, "--resume", **flags)
        assert code == (0 if step == 7 else 2), printed
        assert ("is not a plain path inside that folder" in printed) == (step != 7)
    ours, theirs = (f / "model.safetensors" for f in (folder, part / "checkpoint-7"))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
def test_a_worker_whose_launcher_dies_while_the_data_are_prepared_stops_at_once(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(CORPUS[:1300], encoding="utf-8")
    settings = SETTINGS | {"data": str(text), "output_dir": str(tmp_path / "run")}
    life, worker = multiprocessing.Pipe(duplex=False)
    launcher = PROCESSES.Process(target=_launch, args=(settings, worker), daemon=True)
    launcher.start()
    worker.close()
    launcher.join()
    assert launcher.exitcode == KILLED
    # The worker ends, and so closes the pipe, before its data are ready: it sends nothing.
    assert life.poll(20)
    with pytest.raises(EOFError):
        life.recv()


def _launch(settings: dict, worker) -> None:
    """Start a worker as torchrun does, and be killed while it prepares its data."""
    launcher = os.getpid()
    if os.fork():
        signal.pause()
    os.environ["TORCHELASTIC_RUN_ID"] = "none"
    prepare = run_module.prepare_data

    def prepare_data(*args):
        os.kill(launcher, signal.SIGKILL)
        time.sleep(4)
        worker.send("went on")
        return prepare(*args)

    run_module.prepare_data = prepare_data
    run_module.train(**settings)
