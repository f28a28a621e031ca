"""Two machines, rehearsed on this one: two launchers of torchrun with two workers each, by gloo."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from children import forked
from conftest import ROOT
from safetensors.torch import load_file
from torch.distributed import TCPStore

from hf_nanogpt import train

pytestmark = [forked, pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 7  # into the second epoch of 5
NODES = 2


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text((ROOT / "LICENSE").read_text(encoding="utf-8")[:1260])
    model = {"n_layer": 2, "n_embd": 32, "n_head": 2, "block_size": 32}
    run = {"max_steps": STEPS, "logging_steps": 1, "eval_steps": STEPS, "save_steps": 4}
    machine = {"num_threads": 1, "use_cpu": True, "disable_tqdm": True}
    return {"data": str(path), "tokenizer": "char"} | model | run | machine


def launch(flags: dict, *, fault: str = "none", restarts: int = 0) -> list:
    """Train by one launcher for each machine, as examples/slurm/train.sbatch starts them."""
    # The launchers meet at a port that is taken already, so that nobody else can take it.
    meeting = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    folder = Path(flags["output_dir"]).parent
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += [f"--nnodes={NODES}", "--nproc_per_node=2", f"--max_restarts={restarts}"]
    command += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{meeting.port}"]
    command += ["--rdzv_id=rehearsal", str(ROOT / "tests/node_checks.py")]
    command += [fault, str(folder / "failed"), "--resume"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # As in train.sbatch, which says why.
    environment |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

    def run(node: int) -> subprocess.CompletedProcess:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=600, cwd=folder, env=environment
        )

    with ThreadPoolExecutor(NODES) as pool:
        return list(pool.map(run, range(NODES)))


@pytest.fixture(scope="module")
def uninterrupted(settings, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nodes") / "run"
    flags = settings | {"output_dir": str(folder), "per_device_train_batch_size": 2}
    for done in launch(flags):
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def _losses(folder: Path) -> list[float]:
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [row.get("loss", row.get("eval_loss")) for row in state["log_history"]]


def test_two_machines_give_the_losses_and_weights_of_one_process(settings, uninterrupted, tmp_path):
    train(output_dir=str(tmp_path / "one"), per_device_train_batch_size=8, **settings)
    assert _losses(uninterrupted) == pytest.approx(_losses(tmp_path / "one"), abs=1e-5)
    expected = load_file(tmp_path / "one" / "model.safetensors")
    for name, weight in load_file(uninterrupted / "model.safetensors").items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-4)


def test_a_killed_worker_is_replaced_and_the_run_ends_like_an_uninterrupted_one(
    settings, uninterrupted, tmp_path
):
    flags = settings | {"output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 2}
    done = launch(flags, fault="die", restarts=3)
    assert (tmp_path / "failed").exists()
    assert [d.returncode for d in done] == [0, 0], [d.stderr[-3000:] for d in done]
    assert any("SIGKILL" in d.stderr or "exitcode: -9" in d.stderr for d in done)
    assert _losses(tmp_path / "run") == pytest.approx(_losses(uninterrupted), abs=1e-6)
    before, after = (
        load_file(folder / "checkpoint-4" / "model.safetensors")
        for folder in (tmp_path / "run", uninterrupted)
    )
    assert all(before[name].equal(weight) for name, weight in after.items())
    # Not the same bits: more than two processes may add up gradients in another order.
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "run", uninterrupted))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-5)


def test_a_stalled_worker_is_named_within_the_time_limit(settings, tmp_path):
    flags = settings | {"output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 2}
    done = launch(flags, fault="stall")
    assert (tmp_path / "failed").exists()
    assert all(d.returncode != 0 for d in done)
    printed = "".join(d.stdout + d.stderr for d in done)
    assert "Step 6 does not end, because a process is gone or stalled: " in printed
    assert "Ranks 3 failed to pass monitoredBarrier" in printed
    assert (tmp_path / "run" / "checkpoint-4").is_dir()  # to resume from
