"""Quality at equal time: the quickstart recipe compared with nanoGPT's on Python's source code.

Both use the same blocks of the same documents, the same tokenizer, sizes and batches. Ours trains
for a number of steps. The peer then trains for the same time, without evaluations: a short run
before times its steps, so that the times differ by a few percent. Rows alternate, once per seed.

Run: python benchmarks/equal_time.py [STEPS [SEEDS]] (default 150 and 3; 10 minutes on 2 cores)
"""

import json
import sys

from results_file import write_results
from time_to_loss import SEEDS, run_training

NANOGPT = {
    "preset": "gpt2",
    "n_layer": 4,  # quickstart's sizes
    "n_head": 3,
    "n_embd": 192,
    "block_size": 256,
    "bias": False,
    "hidden_act": "gelu",
    "dropout": 0.0,
    "optim_recipe": "adamw",
    "adam_beta2": 0.99,
    "lr_scheduler_type": "cosine_with_min_lr",
    "warmup_steps": 0.05,
}
PEERS = {f"nanoGPT's recipe, AdamW {rate:g}": rate for rate in (1e-3, 3e-3)}
STEPS_TIMED = 25


def compare(steps: int, seeds: tuple[int, ...]) -> dict[str, list[dict]]:
    runs: dict[str, list[dict]] = {"quickstart (nano, Muon)": [], **{name: [] for name in PEERS}}
    for seed in seeds:
        ours = run_training("quickstart", "python-stdlib", seed=seed, max_steps=steps)
        runs["quickstart (nano, Muon)"].append(ours)
        for name, rate in PEERS.items():
            decay = json.dumps({"min_lr": rate / 10})
            settings = NANOGPT | {"learning_rate": rate, "lr_scheduler_kwargs": decay}
            timed = run_training(
                "quickstart", "python-stdlib", seed=seed, max_steps=STEPS_TIMED, **settings
            )
            fitting = round(ours["step_seconds"] / timed["step_seconds"] * STEPS_TIMED)
            peer = run_training(
                "quickstart", "python-stdlib", seed=seed, max_steps=fitting, **settings
            )
            runs[name].append(peer)
        for name, rows in runs.items():
            print(f"{name:<34} seed {seed}", json.dumps(rows[-1]), flush=True)
    return runs


if __name__ == "__main__":
    steps, seeds = map(int, [*sys.argv[1:], *("150", "3")[len(sys.argv) - 1 :]])
    write_results("equal_time", {"steps": steps, "runs": compare(steps, SEEDS[:seeds])})
