"""What `hf-nanogpt bench` measures, on the user's own machine."""

from ..analysis.plots import plot_generation, plot_training
from .decoding import benchmark_generation
from .report import format_generation, format_report, prepare_output, save_report
from .steps import benchmark_training

__all__ = [
    "benchmark_generation",
    "benchmark_training",
    "format_generation",
    "format_report",
    "plot_generation",
    "plot_training",
    "prepare_output",
    "save_report",
]
