"""What `hf-nanogpt bench` measures, on the user's own machine."""

from .report import format_report, prepare_output, save_report
from .steps import benchmark_training

__all__ = ["benchmark_training", "format_report", "prepare_output", "save_report"]
