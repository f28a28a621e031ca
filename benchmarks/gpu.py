"""Every GPU figure of this project, and those of its peers, from one call on one card.

All contestants compile at the same time, next to the tests; then they take turns, each alone. What
is not timed (losses against tokens) follows, and at the end whole processes, one after the other.
An error is recorded, and the rest continues. Results are written after each part, and the table is
printed last. nanoGPT is expected in .gpu/nanogpt/ and the text in .gpu/tinyshakespeare.txt.

Two calls do it: --parts train_124m gpu_tests decoding, and the other parts. What
results/gpu_by_hand.md leaves open takes one call, and a second one if there is time for it:

    python -u benchmarks/gpu.py --parts shakespeare --limit 400
    python -u benchmarks/gpu.py --parts muon_vs_adamw train_124m --limit 480

Run: python -u benchmarks/gpu.py [--rehearse] [--out FOLDER] [--parts NAME ...] [--limit SECONDS]
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import typing
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import gpu_decoding
import gpu_runs
import gpu_shakespeare
import gpu_training
from gpu_table import plot_optimizers, show
from gpu_workers import STARTED, Turns, Worker, say

from hf_nanogpt.benchmark.report import describe_machine
from hf_nanogpt.flops import GPU_PEAKS

ROOT = Path(__file__).parents[1]
PEERS, TEXT = ROOT / ".gpu" / "nanogpt", ROOT / ".gpu" / "tinyshakespeare.txt"
PEAK = 989e12  # dense bfloat16 of an H100 SXM or H200
PARTS = (
    *("train_124m", "gpu_tests", "shakespeare", "muon_vs_adamw", "decoding"),
    *("trainer_overhead", "data_loader"),
)
NANOGPT = "nanoGPT, its train.py"
SHAKESPEARE = "ours, the recipe"
SHAKESPEARE_LIMITS = 100.0, 180.0  # seconds: ours, and nanoGPT's, which compiles
ALONE = {
    "trainer_overhead": "NanoGPTTrainer against a plain loop",
    "data_loader": "DataLoader over a mapped file",
}
ABSENT = {"absent": "peer absent"}
NO_FLEX = {"absent": "no backward on a CPU"}


class Run:
    """One call of the script: its settings, its results so far, and the time that is left."""

    def __init__(self, args: argparse.Namespace, scratch: Path):
        self.rehearse, self.limit, self.out = args.rehearse, args.limit, args.out
        self.parts = [name for name in PARTS if name in args.parts]
        self.scratch, self.log = scratch, args.out / "gpu.log"
        self.sizes = gpu_training.TOY if self.rehearse else gpu_training.CARD
        self.has_peer = PEERS.is_dir()
        self.text = TEXT
        if self.rehearse:  # any text will do
            self.text = scratch / "text.txt"
            self.text.write_text(Path(typing.__file__).read_text(encoding="utf-8")[:60_000])
        self.rows: dict[str, dict[str, dict[str, Any]]] = {part: {} for part in self.parts}
        self.machine = describe_machine()
        self.alone: dict[str, Worker] = {}

    def left(self) -> float:
        return self.limit - (time.perf_counter() - STARTED)

    def start(self, name: str, function: Callable, **settings: Any) -> Worker:
        return Worker(name, function, self.scratch, self.log, **settings)

    def write(self) -> None:
        report = {
            "card": self.machine["gpu"],
            "machine": self.machine,
            "rehearsal": self.rehearse,
            "seconds": time.perf_counter() - STARTED,
            "batch": f"{self.sizes.rows} rows x {self.sizes.accumulation}",
            "parts": self.rows,
        }
        path = self.out / "gpu.json"
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


# What is not timed


def run_tests(turns: Turns, *, limit: float) -> None:
    """Report the last line and the failures of tests/test_gpu.py."""
    file = ROOT / "tests" / "test_gpu.py"
    if not file.is_file():
        turns.report(absent="tests/test_gpu.py is absent")
        return
    command = [sys.executable, "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            timeout=limit,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        output, note = done.stdout, ""
    except subprocess.TimeoutExpired as error:
        output, note = (error.stdout or b"").decode(), f"stopped after {limit:.0f} s; "
    print(output, flush=True)  # into the log
    lines = [line for line in output.splitlines() if line.strip()]
    failures = [line[:300] for line in lines if re.match(r"(FAILED|ERROR) ", line)]
    turns.report(summary=note + (lines[-1] if lines else "no output"), failures=failures)


def start_tests(run: Run, limit: float) -> Worker | None:
    if "gpu_tests" not in run.parts:
        return None
    return run.start("gpu_tests", run_tests, limit=limit)


def start_jobs(run: Run) -> dict[str, Worker]:
    """Start what runs to its end and need not be alone."""
    jobs, rehearse = {}, run.rehearse
    if "muon_vs_adamw" in run.parts:
        function = gpu_runs.compare_optimizers
        jobs["muon_vs_adamw"] = run.start("muon_vs_adamw", function, rehearse=rehearse)
    return jobs


def start_contestants(run: Run) -> dict[str, dict[str, Worker]]:
    """Start the contestants of both races, which then compile."""
    started: dict[str, dict[str, Worker]] = {}
    if "train_124m" in run.parts:
        rows, workers = run.rows["train_124m"], {}
        for name, spec in gpu_training.CONTESTANTS.items():
            if spec["model"] == "nanogpt" and not run.has_peer:
                rows[name] = ABSENT
            elif spec.get("attention") == "flex_attention" and not run.machine["gpu"]:
                rows[name] = NO_FLEX
            else:
                settings = {"sizes": run.sizes, "spec": spec, "peers": str(PEERS)}
                workers[name] = run.start(name, gpu_training.train_contestant, **settings)
        started["train_124m"] = workers
        run.rows["train_124m"] = {name: rows.get(name, {}) for name in gpu_training.CONTESTANTS}
    if "decoding" in run.parts:
        started["decoding"] = {
            name: run.start(name, gpu_decoding.decode_contestant, spec=spec, rehearse=run.rehearse)
            for name, spec in gpu_decoding.CONTESTANTS.items()
        }
    return started


def finish_jobs(run: Run, jobs: dict[str, Worker], deadline: float) -> None:
    """Collect the results of the jobs; a job that is late is ended."""
    if job := jobs.get("muon_vs_adamw"):
        rows = run.rows["muon_vs_adamw"]
        for name in gpu_runs.OPTIMIZERS:
            facts = _collect(run, job, deadline, end=False)
            rows[facts.pop("name", name)] = facts
        job.end()
    run.write()


def _collect(run: Run, job: Worker, deadline: float, *, end: bool = True) -> dict[str, Any]:
    """Return the next report of a job, or its error."""
    facts = job.receive(deadline - (time.perf_counter() - STARTED))
    say(f"{job.name}: {str(facts if facts else job.error)[:150]}")
    if end:
        job.end()
    return facts or {"error": job.error}


def make_ready(run: Run, workers: dict[str, Worker], rows: dict[str, Any], deadline: float) -> None:
    """Wait for the contestants to compile."""
    for name, worker in workers.items():
        facts = worker.receive(deadline - (time.perf_counter() - STARTED))
        rows[name] = facts or {"error": worker.error}
        if facts:
            say(f"{name}: ready after {facts['ready_seconds']:.0f} s")


def try_again(run: Run, workers: dict[str, Worker], rows: dict[str, Any]) -> None:
    """Start again, alone, who ran out of memory while others were there too."""
    for name, worker in list(workers.items()):
        if worker.error and "OutOfMemory" in worker.error and run.left() > 120:
            workers[name] = worker.restart()
            make_ready(run, {name: workers[name]}, rows, time.perf_counter() - STARTED + 75)


# What is timed


def time_training(run: Run, workers: dict[str, Worker]) -> None:
    rows = run.rows["train_124m"]
    try_again(run, workers, rows)
    for turn in range(run.sizes.rounds):
        say(f"train_124m: round {turn + 1} of {run.sizes.rounds}")
        for name, worker in workers.items():
            facts = worker.take_turn("go", min(40.0, run.left()))
            row = rows[name]
            if facts is None:
                rows[name] = {"error": worker.error}
                continue
            for key in ("step_ms", "optimizer_ms"):
                row.setdefault(key, []).extend(facts[key])
            row["peak_bytes"] = facts["peak_bytes"]
        run.write()
    tokens = run.sizes.rows * run.sizes.accumulation * run.sizes.model["block_size"]
    for name in gpu_training.PROFILED:  # into the log
        if name in workers and run.left() > 40:
            workers[name].take_turn("profile", 30.0)
    for name, worker in workers.items():
        worker.end()
        if "step_ms" in (row := rows[name]):
            model = gpu_training.CONTESTANTS[name]["model"]
            flops = gpu_training.count_training_flops(model, run.sizes.model)
            row["tokens_per_second"] = 1000 * tokens / median(row["step_ms"])
            row["mfu"] = row["tokens_per_second"] * flops / PEAK
    run.write()


def time_decoding(run: Run, workers: dict[str, Worker]) -> None:
    rows = run.rows["decoding"]
    for batch in gpu_decoding.BATCHES[: 2 if run.rehearse else None]:
        for turn in range(gpu_decoding.ROUNDS):
            say(f"decoding: {batch} texts, round {turn + 1}")
            for name, worker in workers.items():
                facts = worker.take_turn(batch, min(60.0, run.left()))
                if facts is None:
                    rows[name] = {**rows[name], "error": worker.error}
                    continue
                speed = facts["new_tokens"] / facts["seconds"]
                rows[name].setdefault("tokens_per_second", {}).setdefault(batch, []).append(speed)
        run.write()
    for worker in workers.values():
        worker.end()


def start_alone(run: Run) -> None:
    """Start the processes that work alone later; they only import until then."""
    parts, toy = set(run.parts), {"rehearse": run.rehearse}
    if "trainer_overhead" in parts:
        run.alone["trainer_overhead"] = run.start("overhead", gpu_runs.time_trainer, **toy)
    if "data_loader" in parts:
        run.alone["data_loader"] = run.start("loader", gpu_runs.time_loader, **toy)
    if "shakespeare" in parts:
        settings = {"text": str(run.text), "folder": str(run.scratch / "timed"), **toy}
        run.alone["ours"] = run.start("shakespeare, ours", gpu_shakespeare.time_ours, **settings)
        if run.has_peer:
            settings |= {"folder": str(run.scratch / "nanogpt"), "peers": str(PEERS)}
            function = gpu_shakespeare.time_nanogpt
            run.alone["nanogpt"] = run.start("shakespeare, nanoGPT", function, **settings)


def time_alone(run: Run, part: str, worker: str, name: str, order: Any, limit: float) -> None:
    """Record what one process reports when its turn comes, with nothing else at work."""
    say(f"{part}: {name}")
    facts = run.alone[worker].take_turn(order, min(limit, run.left()))
    run.rows[part][name] = facts or {"error": run.alone[worker].error}
    say(f"{part}: {name}: {str(run.rows[part][name])[:150]}")
    run.write()


def time_shakespeare(run: Run) -> None:
    """Time the recipe, then nanoGPT's train.py."""
    ours, theirs = SHAKESPEARE_LIMITS
    time_alone(run, "shakespeare", "ours", SHAKESPEARE, {}, ours)
    if run.has_peer:
        limit = max(20.0, min(theirs, run.left() - 15))
        time_alone(run, "shakespeare", "nanogpt", NANOGPT, limit, limit + 15)
    else:
        run.rows["shakespeare"][NANOGPT] = ABSENT


# The whole


def expected_rows(run: Run) -> dict[str, list[str]]:
    """Return the rows that every part must have."""
    rows = {
        "train_124m": list(gpu_training.CONTESTANTS),
        "gpu_tests": ["tests/test_gpu.py"],
        "shakespeare": [SHAKESPEARE, NANOGPT],
        "muon_vs_adamw": list(gpu_runs.OPTIMIZERS),
        "decoding": list(gpu_decoding.CONTESTANTS),
        **{part: [name] for part, name in ALONE.items()},
    }
    return {part: rows[part] for part in run.parts}


def find_faults(run: Run) -> list[str]:
    """Return the rows that are missing or failed."""
    faults = []
    for part, names in expected_rows(run).items():
        for name in names:
            row = run.rows[part].get(name, {"error": "missing"})
            if problem := row.get("error") or row.get("failed"):
                faults.append(f"{part}, {name}: {problem[:300]}")
    return faults


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="every row at toy size, on a CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--limit", type=float, default=480.0, help="seconds for all of it")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def measure(run: Run) -> None:
    # First: compile all contestants and run the tests, at the same time.
    # On a machine with slow CPUs, 9 contestants needed more than 180 seconds for that.
    longer = {"shakespeare", "muon_vs_adamw"} & set(run.parts)
    ready_at = (0.42 if longer else 0.8) * run.limit
    jobs_at = 0.95 * run.limit
    if "shakespeare" in run.parts and not run.rehearse:
        jobs_at = run.limit - sum(SHAKESPEARE_LIMITS) - 20
    contestants, tests = start_contestants(run), start_tests(run, ready_at - 40)
    for part, workers in contestants.items():
        make_ready(run, workers, run.rows[part], ready_at)
        run.write()
    if tests:
        run.rows["gpu_tests"]["tests/test_gpu.py"] = _collect(run, tests, ready_at)
        run.write()
    # Then the contestants take turns, each alone.
    if "train_124m" in contestants:
        time_training(run, contestants["train_124m"])
    if "decoding" in contestants:
        time_decoding(run, contestants["decoding"])
    # Then what is not timed; and last, whole processes, each alone.
    start_alone(run)
    finish_jobs(run, start_jobs(run), jobs_at)
    for worker in run.alone.values():
        worker.receive(30.0)
    say("from here on each is alone")
    for part, name in ALONE.items():
        if part in run.parts:
            time_alone(run, part, part, name, "go", 60.0)
    if "shakespeare" in run.parts:
        time_shakespeare(run)


def main() -> int:
    args = parse_args()
    if args.rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_COMPILE_THREADS": "3"}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        run = Run(args, Path(folder))
        assert run.rehearse or GPU_PEAKS.get(run.machine["gpu"]) == PEAK, run.machine["gpu"]
        try:
            measure(run)
        finally:
            Worker.end_all()
    run.write()
    if rows := run.rows.get("muon_vs_adamw"):
        title = f"124 M, {run.machine['gpu']}"
        plot_optimizers(rows, run.out / "muon_vs_adamw.png", title=title)
    table = show(run)
    (run.out / "gpu.md").write_text(table, encoding="utf-8")
    faults = find_faults(run)
    print(f"\n{table}", *(f"FAULT {fault}" for fault in faults), sep="\n", flush=True)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
