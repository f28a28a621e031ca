"""Two machines, rehearsed on this one: two launchers of torchrun with two workers each, by gloo.

To start four workers takes most of the time, so one start serves several tests.
"""

import json
import os
import signal
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

from hf_nanogpt import DataArguments, tokenize_corpus, train

pytestmark = [forked, pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 7  # into the second epoch of 5
NODES = 2
SOURCES = ("corpus", "tokens", "stream")
OWN_SHARDS = {"accelerator_config": '{"dispatch_batches": false}'}
FAULTS = ("killed worker", "stalled", "killed launcher")
RUN = {
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 2,
    "block_size": 32,
    "max_steps": STEPS,
    "logging_steps": 1,
    "eval_steps": STEPS,
    "save_steps": 4,
    "num_threads": 1,
    "use_cpu": True,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, dict]:
    """The same kind of text as a file, as a folder of tokens, and as a stream of four shards."""
    folder, text = tmp_path_factory.mktemp("data"), (ROOT / "LICENSE").read_text(encoding="utf-8")
    (folder / "text.txt").write_text(text[:1260])
    corpus = {"data": str(folder / "text.txt"), "tokenizer": "char"}
    tokenize_corpus(DataArguments(**corpus), folder / "tokens")
    (folder / "rows").mkdir()
    for shard in range(4):
        rows = [json.dumps({"text": line}) for line in text.splitlines()[shard::4] if line.strip()]
        (folder / "rows" / f"{shard}.jsonl").write_text("\n".join(rows))
    stream = {"data": str(folder / "rows"), "tokenizer": "byte", "streaming": True}
    tokens = {"data": str(folder / "tokens")}
    found = {"corpus": corpus, "tokens": tokens, "stream": stream | {"validation_documents": 20}}
    return {name: RUN | data for name, data in found.items()}


def launch(
    folder: Path, runs: list[dict], *, faults: tuple[str, ...] = ()
) -> list[tuple[int, str]]:
    """Train by one launcher for each machine, as examples/slurm/train.sbatch starts them.

    A launcher that was killed is started again at once, as whatever looks after a cluster does.
    Return the exit code of each launcher, and what was printed.
    """
    flags = [["--resume", *(f"--{key}={value}" for key, value in run.items())] for run in runs]
    plan = {"runs": flags, "faults": faults}
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    # The launchers meet at a port that is taken already, so that nobody else can take it.
    meeting = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += [f"--nnodes={NODES}", "--nproc_per_node=2", "--max_restarts=3"]
    command += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{meeting.port}"]
    command += ["--rdzv_id=rehearsal", str(ROOT / "tests/node_checks.py"), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # As in train.sbatch, which says why.
    environment |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

    def run(node: int) -> list[tuple[int, str]]:
        starts: list[tuple[int, str]] = []
        while not starts or starts[-1][0] == -signal.SIGKILL:
            # Into a file: a pipe would stay open for as long as a worker has it.
            log = folder / f"log {node} {len(starts)}"
            with log.open("w") as file:
                given = {"stdout": file, "stderr": subprocess.STDOUT, "cwd": folder}
                done = subprocess.run(command, timeout=800, env=environment, check=False, **given)
            starts.append((done.returncode, log.read_text(encoding="utf-8")))
        return starts

    with ThreadPoolExecutor(NODES) as pool:
        return [start for starts in pool.map(run, range(NODES)) for start in starts]


@pytest.fixture(scope="module")
def uninterrupted(sources, tmp_path_factory) -> Path:
    """The folder of a run of each source on two machines."""
    folder = tmp_path_factory.mktemp("nodes")
    shares = {"per_device_train_batch_size": 2}
    runs = [sources[name] | shares | {"output_dir": str(folder / name)} for name in SOURCES]
    runs.append(runs[-1] | OWN_SHARDS | {"output_dir": str(folder / "own shards")})
    for code, printed in launch(folder, runs):
        assert code == 0, printed[-3000:]
    return folder


def _losses(folder: Path) -> list[float]:
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [row.get("loss", row.get("eval_loss")) for row in state["log_history"]]


@pytest.mark.parametrize("name", SOURCES)
def test_two_machines_give_the_losses_and_weights_of_one_process(
    sources, uninterrupted, tmp_path, name
):
    train(output_dir=str(tmp_path / "one"), per_device_train_batch_size=8, **sources[name])
    assert_same_run(uninterrupted / name, tmp_path / "one")


def test_machines_that_read_their_own_shards_equal_one_process_with_as_many_workers(
    sources, uninterrupted, tmp_path
):
    turns = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    turns["dataloader_num_workers"] = 4
    train(output_dir=str(tmp_path / "one"), **sources["stream"], **turns)
    assert_same_run(uninterrupted / "own shards", tmp_path / "one")


def assert_same_run(found: Path, expected: Path) -> None:
    assert _losses(found) == pytest.approx(_losses(expected), abs=1e-5)
    weights = load_file(expected / "model.safetensors")
    for key, weight in load_file(found / "model.safetensors").items():
        torch.testing.assert_close(weight, weights[key], rtol=0, atol=1e-4)


def test_one_process_reads_a_stream_for_all_machines(uninterrupted):
    [blocks] = uninterrupted.glob("stream blocks *")
    assert blocks.name == "stream blocks 0" and blocks.stat().st_size >= STEPS * 8
    assert _list_tables(uninterrupted / "stream", 0) == {f"{shard}.jsonl" for shard in range(4)}


def test_each_process_reads_only_its_own_shards_if_batches_are_not_dispatched(uninterrupted):
    for rank in range(4):
        blocks = (uninterrupted / f"own shards blocks {rank}").stat().st_size
        assert STEPS * 2 <= blocks < STEPS * 2 + 8  # a few in advance
        assert _list_tables(uninterrupted / "own shards", rank) == {f"{rank}.jsonl"}


def _list_tables(run: Path, rank: int) -> set[str]:
    return set(Path(f"{run} tables {rank}").read_text(encoding="utf-8").split())


@pytest.fixture(scope="module")
def interrupted(sources, tmp_path_factory) -> tuple[Path, str]:
    """A run that lost a worker, then waited for one, then lost a launcher; what was printed."""
    folder = tmp_path_factory.mktemp("deaths")
    run = sources["corpus"] | {"per_device_train_batch_size": 2, "ddp_timeout": 30}
    starts = launch(folder, [run | {"output_dir": str(folder / "run")}], faults=FAULTS)
    codes, printed = sorted(code for code, _ in starts), "".join(text for _, text in starts)
    assert codes == [-signal.SIGKILL, 0, 0], printed[-5000:]
    assert all((folder / fault).exists() for fault in FAULTS)
    return folder / "run", printed


def test_three_deaths_change_nothing_in_the_result(interrupted, uninterrupted):
    run, expected = interrupted[0], uninterrupted / "corpus"
    before, after = (
        load_file(folder / "checkpoint-4" / "model.safetensors") for folder in (run, expected)
    )
    assert all(before[name].equal(weight) for name, weight in after.items())
    assert_nothing_changed(run, expected)


def assert_nothing_changed(run: Path, expected: Path) -> None:
    assert _losses(run) == pytest.approx(_losses(expected), abs=1e-6)
    # Not the same bits: more than two processes may add up gradients in another order.
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (run, expected))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-5)


def test_a_killed_worker_is_reported(interrupted):
    assert "SIGKILL" in interrupted[1] or "exitcode: -9" in interrupted[1]


def test_a_stalled_worker_is_named_within_the_time_limit(interrupted):
    assert "Step 6 does not end, because a process is gone or stalled: " in interrupted[1]
    assert "Ranks 3 failed to pass monitoredBarrier" in interrupted[1]


def test_workers_that_have_lost_their_launcher_stop_for_the_next_start(
    sources, uninterrupted, tmp_path
):
    run = sources["corpus"] | {"per_device_train_batch_size": 2, "ddp_timeout": 60}
    run["output_dir"] = str(tmp_path / "run")
    starts = launch(tmp_path, [run], faults=("lost launcher",))
    codes, printed = sorted(code for code, _ in starts), "".join(text for _, text in starts)
    assert codes == [-signal.SIGKILL, 0, 0], printed[-5000:]
    # They saved a checkpoint together, after the step in which the launcher died.
    assert (tmp_path / "run" / "checkpoint-6").is_dir()
    assert_nothing_changed(tmp_path / "run", uninterrupted / "corpus")
