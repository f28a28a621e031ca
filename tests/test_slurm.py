"""The script for Slurm, with stand-ins for its commands: it is not on this machine."""

import os
import subprocess

import pytest
from conftest import ROOT

STAND_INS = {
    # So many machines fill a pipe: a reader of the first line alone would break it.
    "scontrol": '[ "$1" = show ] && seq -f node%.0f 20000 || echo "scontrol $*"',
    "srun": 'echo "srun $*"; exit $SRUN_CODE',
}


@pytest.fixture
def submit(tmp_path):
    for name, script in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)

    def run(code: int, restarts: int | None = None) -> subprocess.CompletedProcess:
        job = {"JOB_NODELIST": "node[1-2]", "NNODES": "2", "GPUS_ON_NODE": "8", "JOB_ID": "42"}
        if restarts is not None:
            job["RESTART_COUNT"] = str(restarts)
        environment = os.environ | {f"SLURM_{name}": value for name, value in job.items()}
        environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SRUN_CODE": str(code)}
        command = ["bash", str(ROOT / "examples/slurm/train.sbatch"), "gpt2_124m", "--seed", "a b"]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return run


def test_the_job_starts_one_launcher_for_each_machine(submit):
    done = submit(0)
    assert done.returncode == 0 and "requeue" not in done.stdout
    assert "torchrun --nnodes=2 --nproc_per_node=8 --max_restarts=3" in done.stdout
    assert "--rdzv_endpoint=node1:29500 --rdzv_id=42" in done.stdout
    assert done.stdout.endswith("-m hf_nanogpt train gpt2_124m --seed a b --resume\n")


@pytest.mark.parametrize(("restarts", "again"), [(None, True), (2, True), (3, False)])
def test_a_job_that_ended_early_is_queued_again_three_times(submit, restarts, again):
    done = submit(137, restarts)
    assert ("scontrol requeue 42" in done.stdout) == again
    assert again or done.returncode != 0
