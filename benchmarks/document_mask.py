"""What `document_mask=false` costs in loss: the quickstart recipe with and without it, in turns.

Without the mask a document also sees those before it in its block. Each model is measured as it was
trained, on the same documents.

Run: python benchmarks/document_mask.py [STEPS [SEEDS]] (default 240 and 3; 10 minutes on 2 cores)
"""

import sys

from results_file import write_results
from time_to_loss import SEEDS, run_training

WAYS = {"with the mask (default)": True, "document_mask=false": False}


def compare(steps: int, seeds: tuple[int, ...]) -> dict[str, list[dict]]:
    runs: dict[str, list[dict]] = {name: [] for name in WAYS}
    for seed in seeds:
        for name, mask in WAYS.items():
            settings = {"seed": seed, "max_steps": steps, "document_mask": mask}
            runs[name].append(run_training("quickstart", "python-stdlib", **settings))
            print(f"{name:<24} seed {seed}", runs[name][-1], flush=True)
    return runs


if __name__ == "__main__":
    steps, seeds = map(int, [*sys.argv[1:], *("240", "3")[len(sys.argv) - 1 :]])
    write_results("document_mask", {"steps": steps, "runs": compare(steps, SEEDS[:seeds])})
