"""What test_many_nodes.py starts by torchrun: `hf-nanogpt train`, in which one worker fails once.

Run: node_checks.py FAULT MARKER FLAGS, where FAULT is none, die or stall.
"""

import os
import signal
import sys
import threading
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from hf_nanogpt import NanoGPTTrainer
from hf_nanogpt.cli import main

STEP, RANK = 5, "3"  # after the first checkpoint; a worker of the second machine


def fail_once(fault: str, marker: Path) -> None:
    """Make worker `RANK` fail as it begins the step after `STEP`, unless `marker` exists."""
    train_step = NanoGPTTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == STEP and os.environ["RANK"] == RANK and not marker.exists():
            marker.touch()
            if fault == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            threading.Event().wait()  # stalled until somebody ends it
        return train_step(self, *args, **kwargs)

    NanoGPTTrainer.training_step = training_step


if __name__ == "__main__":
    fault, marker, *flags = sys.argv[1:]
    if fault == "stall":  # on CPUs, transformers does not pass on --ddp_timeout
        dist.init_process_group("gloo", timeout=timedelta(seconds=40))
    if fault != "none":
        fail_once(fault, Path(marker))
    sys.exit(main(["train", *flags]))
