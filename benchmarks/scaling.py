"""What one training step costs on many GPUs, on paper: nothing here was measured.

A step has a fixed number of tokens, divided among the GPUs. It computes at an assumed share of the
peak (MFU), waits for what the network cannot send meanwhile, and runs Muon. Left out: delays before
a transfer, slow GPUs, the elementwise work of the optimizer, reading data.

- DDP sums float32 gradients over all GPUs, during the backward pass of the last micro-batch.
- FSDP2 gathers bfloat16 weights twice in each micro-batch and sums the gradients as DDP does, but
  each GPU keeps only its shards. It does so while computing.
- Muon shares the matrices: under DDP among 8 neighbours, under FSDP2 among all GPUs.

Run: python benchmarks/scaling.py [--mfu 0.4]
"""

import argparse
from collections import Counter
from dataclasses import dataclass

import torch

from hf_nanogpt import NanoGPTForCausalLM, load_preset
from hf_nanogpt.flops import GPU_PEAKS, count_flops

PEAK = GPU_PEAKS["NVIDIA H100 80GB HBM3"]  # FLOP/s
MEMORY = 80e9  # bytes of a GPU
NODE = 8  # GPUs of a machine
INSIDE, BETWEEN = 450e9, 50e9  # bytes/s of each GPU, one way: NVLink; between machines
MICRO_BATCH = 16_384  # tokens of a GPU at once, at most
STATE = 16  # bytes of each weight: itself, its gradient and two averages, in float32
COLUMNS = [
    "model",
    "GPUs",
    "way",
    "compute, ms",
    "traffic, ms",
    "waits, ms",
    "Muon, ms",
    "tokens/s",
]
# Presets, and the tokens of a step that GPT-3's authors chose for models of that size.
MODELS = {"gpt2": 524_288, "gpt2-xl": 1_048_576, "qwen3-8b": 2_097_152}


@dataclass
class Model:
    """What the arithmetic needs to know: weights, FLOPs per token, and how many of each shape."""

    weights: int
    flops: float
    shapes: Counter[tuple[int, int]]

    @property
    def in_matrices(self) -> int:
        return sum(count * a * b for (a, b), count in self.shapes.items())


def read_preset(name: str) -> Model:
    with torch.device("meta"):
        model = NanoGPTForCausalLM(load_preset(name))
    named = [(n, p) for n, p in model.named_parameters() if p.ndim == 2 and "layers." in n]
    shapes = Counter((min(p.shape), max(p.shape)) for _, p in named)
    return Model(sum(p.numel() for p in model.parameters()), 3 * count_flops(model), shapes)


def gather_seconds(size: float, gpus: int) -> float:
    """Return the time to gather `size` bytes on every GPU; to sum and scatter them takes the same.

    All GPUs of a machine bring in different parts from the others, then exchange them.
    """
    near, machines = min(gpus, NODE), max(1, gpus // NODE)
    between = size / near * (machines - 1) / machines / BETWEEN
    return between + size * (near - 1) / near / INSIDE


def muon_flops(rows: int, columns: int) -> float:
    a, b = sorted((rows, columns))
    return 3 * (2 * a * a * b + 2 * a**3 + 2 * a * a * b)  # in three iterations


def muon_seconds(model: Model, gpus: int, rate: float, *, sharded: bool) -> float:
    """Return the time of Muon's products and exchanges; results travel in bfloat16."""
    shares = gpus if sharded else min(gpus, NODE)
    products = sum(-(-count // shares) * muon_flops(*s) for s, count in model.shapes.items())
    size = 2 * model.in_matrices
    if not sharded:
        return products / rate + gather_seconds(size, shares)
    # Each GPU sends its shards to the owners of the matrices, and gets shards of results back.
    far = max(0, gpus - NODE) / gpus
    return products / rate + 2 * size / gpus * (far / BETWEEN + (gpus > 1) * (1 - far) / INSIDE)


def step(model: Model, tokens: int, gpus: int, mfu: float, *, sharded: bool) -> dict[str, float]:
    """Return the seconds of a step: to compute, of traffic, waiting for it, and of Muon."""
    each, rate = tokens / gpus, mfu * PEAK
    compute, micro_batches = model.flops * each / rate, max(1, each / MICRO_BATCH)
    gradients = gather_seconds(4 * model.weights, gpus)
    if sharded:
        weights = gather_seconds(2 * model.weights, gpus)
        network, hidden = 2 * weights * micro_batches + gradients, compute
    else:
        network, hidden = 2 * gradients, compute * 2 / 3 / micro_batches
    muon = muon_seconds(model, gpus, rate, sharded=sharded)
    waiting = max(0.0, network - hidden)
    speed = {"tokens_per_second": tokens / (compute + waiting + muon)}
    return {"compute": compute, "network": network, "waiting": waiting, "muon": muon} | speed


def rows(mfu: float) -> list[list[str]]:
    found = []
    for name, tokens in MODELS.items():
        model = read_preset(name)
        for gpus in (1, 8, 64, 512):
            for sharded in (False, True) if gpus > 1 else (False,):
                way = "FSDP2" if sharded else "DDP" if gpus > 1 else "alone"
                *times, speed = step(model, tokens, gpus, mfu, sharded=sharded).values()
                cells = [*(f"{1e3 * seconds:,.1f}" for seconds in times), f"{speed:,.0f}"]
                if STATE * model.weights / (gpus if sharded else 1) > MEMORY:
                    cells = ["does not fit", *[""] * 4]
                found.append([name, f"{gpus}", way, *cells])
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak; an assumption")
    dashes = ["---"] * len(COLUMNS)
    for cells in [COLUMNS, dashes, *rows(parser.parse_args().mfu)]:
        print(f"| {' | '.join(cells)} |")
