"""How fast a device could train a model: the model's FLOPs and the device's peak."""

import json
import os
import platform
import re
import time
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME
from transformers import PreTrainedModel

# FLOP/s in dense products of 16-bit floats, from the vendors' data sheets (which print twice as
# much "with sparsity"), by the driver's name of the GPU; fp16 for T4 and V100, which have no bf16.
_PEAKS = {
    65e12: ["Tesla T4"],
    71e12: ["NVIDIA GeForce RTX 3090"],
    121e12: ["NVIDIA L4"],
    125e12: ["NVIDIA A10", "Tesla V100-SXM2-16GB", "Tesla V100-SXM2-32GB"],
    165e12: ["NVIDIA GeForce RTX 4090"],
    312e12: [
        "NVIDIA A100-PCIE-40GB",
        "NVIDIA A100-SXM4-40GB",
        "NVIDIA A100-SXM4-80GB",
        "NVIDIA A100 80GB PCIe",
    ],
    362e12: ["NVIDIA L40S"],
    756e12: ["NVIDIA H100 PCIe"],
    989e12: ["NVIDIA H100 80GB HBM3", "NVIDIA H200"],
    1307e12: ["AMD Instinct MI300X"],
}
GPU_PEAKS: dict[str, float] = {name: peak for peak, names in _PEAKS.items() for name in names}


def count_flops(model: PreTrainedModel, *, context_length: int | None = None) -> int:
    """Return the FLOPs per token of a forward pass of our model; training takes 3 times as many.

    Each weight in a matrix product takes 2, and each layer, position and head dimension 4 for
    scores and weighted sum, at full context, as if causality saved nothing. This is a third of
    6N + 12LHQT in Chowdhery et al. 2022 (PaLM, arXiv:2204.02311), appendix B, after Kaplan et al.
    2020 (arXiv:2001.08361), section 2.1. Works on the meta device.
    """
    config = model.config
    context = context_length or config.max_position_embeddings
    trunk: Any = model.base_model
    head: Any = model.get_output_embeddings()
    tables = [trunk.embed_tokens, trunk.embed_positions]
    looked_up = sum(table.weight.numel() for table in tables if table is not None)
    # A module that PEFT trains has a frozen original, which is not used.
    named = [(n, p) for n, p in model.named_parameters() if ".original_module." not in n]
    multiplied = sum(p.numel() for _, p in named if p.ndim == 2) - looked_up
    if head is not None and config.tie_word_embeddings:
        multiplied += head.weight.numel()
    seen = [
        min(context, config.sliding_window) if layer == "sliding_attention" else context
        for layer in config.layer_types
    ]
    return 2 * multiplied + 4 * config.num_attention_heads * config.head_dim * sum(seen)


def find_peak(device: torch.device, dtype: torch.dtype = torch.float32) -> float | None:
    """Return a device's peak FLOP/s in matrix products, or `None` if it is unknown.

    On a CPU this is measured, with torch's threads and `dtype`, in about 0.3 s. A machine that is
    busy measures too little, so the best figure ever measured is kept in the cache folder of
    Hugging Face. For a GPU it is the data sheet's figure for 16-bit floats, whatever `dtype` is, as
    is usual for MFU.
    """
    if device.type == "cpu":
        measured = max(_measure_product(size, dtype) for size in (512, 1024))
        return _keep_best(
            f"{name_processor()}, {torch.get_num_threads()} threads, {dtype}", measured
        )
    return GPU_PEAKS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def name_processor() -> str:
    """Return the processor's model: Linux has it in a file, other systems in `platform`."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(errors="replace") if path.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _keep_best(key: str, measured: float) -> float:
    """Return the best figure of this key so far, and keep it for later processes if possible."""
    path = Path(HF_HOME) / "hf_nanogpt" / "peaks.json"
    try:
        peaks = json.loads(path.read_text(encoding="utf-8"))
        best = max(measured, float(peaks.get(key, 0)))
    except (OSError, ValueError, TypeError, AttributeError):  # none yet, or damaged
        peaks, best = {}, measured
    if best == measured:
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(peaks | {key: measured}, indent=2) + "\n", encoding="utf-8")
            os.replace(part, path)
        except OSError:
            pass  # the next process measures again
    return best


def _measure_product(size: int, dtype: torch.dtype, seconds: float = 0.12) -> float:
    # Ones, so that no random numbers are drawn; a CPU does not multiply them faster than others.
    a, b = (torch.ones(size, size, dtype=dtype) for _ in range(2))
    out = a @ b
    best, end = float("inf"), time.perf_counter() + seconds
    while (start := time.perf_counter()) < end or best == float("inf"):
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
