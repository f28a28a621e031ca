"""The benchmark for GPUs, rehearsed on a CPU: no row is missing, and an error does not end it."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_shakespeare
import gpu_table
import gpu_training
import gpu_workers


@pytest.mark.slow
def test_the_rehearsal_fills_every_row_of_the_table(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--rehearse", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "REHEARSAL, no figures." in done.stdout and "FAULT" not in done.stdout
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert list(parts["train_124m"]) == list(gpu_training.CONTESTANTS)
    assert len(parts) == 7 and all(parts.values())
    assert len(list(tmp_path.iterdir())) <= 8


def fail(turns):
    raise ValueError("as it should")


def obey(turns):
    turns.ready()
    while True:
        turns.report(answer=2 * turns.wait())


def test_a_worker_that_fails_says_why_and_others_go_on(tmp_path):
    log = tmp_path / "log"
    bad, good = (gpu_workers.Worker("name", f, tmp_path, log) for f in (fail, obey))
    assert bad.receive(60) is None and bad.error == "ValueError: as it should"
    assert bad.take_turn(1, 60) is None  # it keeps its error
    assert "ready_seconds" in good.receive(60)
    assert good.take_turn(21, 60) == {"answer": 42}
    assert good.receive(0) is None and good.error == "no answer within 0 s"
    assert "Traceback" in log.read_text()


def test_models_of_one_shape_are_given_the_same_flops():
    sizes = gpu_training.CARD.model
    flops = {model: gpu_training.count_training_flops(model, sizes) for model in ("nano", "llama")}
    layer = 4 * 768**2 + 3 * 768 * 2048
    assert set(flops.values()) == {6 * (12 * layer + 768 * 50304) + 12 * 12 * 768 * 1024}
    # GPT-2's MLP has two matrices of four times the width: as many weights in all.
    assert gpu_training.count_training_flops("nanogpt", sizes) == flops["nano"]


def test_nanogpt_gets_the_split_that_its_own_preparation_makes(tmp_path):
    peers, text = tmp_path / "peers", tmp_path / "text.txt"
    peers.mkdir()
    text.write_text("hello world, hello", encoding="utf-8")
    folder = gpu_shakespeare.prepare_nanogpt(peers, text, tmp_path / "copy")
    train, test = (
        np.fromfile(folder / "data/shakespeare_char" / name, dtype=np.uint16)
        for name in ("train.bin", "val.bin")
    )
    alphabet = sorted(set("hello world, hello"))
    assert "".join(alphabet[i] for i in train) == "hello world, hel"
    assert "".join(alphabet[i] for i in test) == "lo"


def test_a_row_with_an_error_shows_its_last_line():
    assert gpu_table.explain({"error": "Traceback\nValueError: a | b"}) == "ValueError: a / b"
    assert gpu_table.explain({"loss": 1.0}) is None
