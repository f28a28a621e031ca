"""The speed of generation with `hf-nanogpt bench generate`: two model sizes, one text or eight.

Run: python benchmarks/generation.py [NAME ...] (names of RUNS; half an hour for all on 2 cores)
"""

import sys
from pathlib import Path

from results_file import write_results

from hf_nanogpt.benchmark import benchmark_generation, format_generation, plot_generation

RUNS = {
    "generation_10m": {"batch_size": 1, "rounds": 7, "compile": True},
    "generation_10m_batch8": {"batch_size": 8, "rounds": 7, "compile": True},
    "generation_124m": {"model": "gpt2", "batch_size": 1, "rounds": 5, "tokens": 8},
    "generation_124m_batch8": {
        "model": "gpt2",
        "batch_size": 8,
        "rounds": 5,
        "tokens": 8,
        "compile": True,
    },
}

if __name__ == "__main__":
    for name in sys.argv[1:] or RUNS:
        report = benchmark_generation(**RUNS[name], num_threads=2, show_progress=True)
        print(format_generation(report), flush=True)
        plot_generation(report, Path(__file__).parent / f"{name}.png")
        write_results(name, report)
