"""The speed of a training step and Trainer's overhead, with `hf-nanogpt bench train`.

Run: python benchmarks/step_speed.py [--compile] (2 minutes on 2 cores; compiled 10 more)
"""

import sys

from results_file import write_results

from hf_nanogpt.benchmark import benchmark_training, format_report

if __name__ == "__main__":
    compiled = sys.argv[1:] == ["--compile"]
    report = benchmark_training(rounds=9, compile=compiled, show_progress=True)
    print(format_report(report))
    write_results("step_speed_compiled" if compiled else "step_speed", report)
