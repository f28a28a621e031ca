"""What test_many_nodes.py starts by torchrun: `hf-nanogpt train`, in which a worker may fail.

Run: node_checks.py FOLDER, where FOLDER/plan.json has the flags of each `run` and the `faults`.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from hf_nanogpt import NanoGPTTrainer
from hf_nanogpt.cli import main
from hf_nanogpt.data.streams import PackedStream

STEP, RANK = 5, "3"  # after the first checkpoint; a worker of the second machine
WRITER = "0"  # the worker that has locked output_dir


def fail(fault: str) -> None:
    if fault == "lost launcher":
        os.kill(os.getppid(), signal.SIGKILL)
        return time.sleep(5)  # a long step
    if fault == "stalled":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # else torchrun waits 30 seconds to kill it
        threading.Event().wait()
    if fault == "killed launcher":
        os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def fail_in_turn(faults: list[str], folder: Path) -> None:
    """Make a worker fail each time it begins the step after `STEP`, by each fault once."""
    train_step = NanoGPTTrainer.training_step

    def training_step(self, *args, **kwargs):
        left = [fault for fault in faults if not (folder / fault).exists()]
        rank = WRITER if left == ["lost launcher"] else RANK
        if left and self.state.global_step == STEP and os.environ["RANK"] == rank:
            (folder / left[0]).touch()
            fail(left[0])
        return train_step(self, *args, **kwargs)

    NanoGPTTrainer.training_step = training_step


def note_reading() -> None:
    """Write down what this process reads of a stream while it trains, next to its output folder.

    A byte for each block, and the name of each table that it opens.
    """
    cut, train, rank = PackedStream._cut, NanoGPTTrainer.train, os.environ["RANK"]
    runs: list[str] = []

    def note(what: str, text: str) -> None:
        if runs:
            with open(f"{runs[-1]} {what} {rank}", "a", encoding="utf-8") as file:
                file.write(text)

    def _cut(self, *args):
        for block in cut(self, *args):
            note("blocks", ".")
            yield block

    def train_noting(self, *args, **kwargs):
        runs.append(self.args.output_dir)
        result = train(self, *args, **kwargs)
        runs.pop()
        return result

    def note_table(event: str, arguments: tuple) -> None:
        if event == "open" and str(arguments[0]).endswith(".jsonl"):
            note("tables", f"{Path(arguments[0]).name}\n")

    PackedStream._cut, NanoGPTTrainer.train = _cut, train_noting
    sys.addaudithook(note_table)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    fail_in_turn(plan["faults"], folder)
    note_reading()
    for flags in plan["runs"]:
        if code := main(["train", *flags]):
            sys.exit(code)
