"""Memory and time of the loss: all logits at once against `linear_cross_entropy`.

Each way runs in a process of its own, for its peak memory; then both take turns for their time:
that of the processor, in one thread, which other programs change little.

Run: python benchmarks/loss_memory.py (3 minutes on 2 cores)
"""

import multiprocessing
import resource
import time

import torch
from results_file import write_results

from hf_nanogpt.benchmark.turns import summarize, take_turns
from hf_nanogpt.linear_cross_entropy import linear_cross_entropy
from hf_nanogpt.modeling_nanogpt import NanoGPTForCausalLM
from hf_nanogpt.presets import load_preset

ROWS, LENGTH, ROUNDS = 4, 512, 3
WAYS = {"all logits": None, "in chunks": linear_cross_entropy}


def make_model() -> tuple[NanoGPTForCausalLM, torch.Tensor]:
    """Return a GPT-2 of one layer and a batch; the loss takes more memory than the rest."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    config = load_preset("gpt2", n_layer=1)
    return NanoGPTForCausalLM(config), torch.randint(config.vocab_size, (ROWS, LENGTH))


def run_step(model: NanoGPTForCausalLM, tokens: torch.Tensor, way: str) -> float:
    model.zero_grad()
    loss = model(tokens, labels=tokens, use_cache=False, linear_loss=WAYS[way]).loss
    loss.backward()
    return loss.item()


def measure_peak(way: str) -> float:
    """Return the megabytes of a process at its peak, less those before the step."""
    model, tokens = make_model()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run_step(model, tokens, way)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def measure_seconds() -> dict[str, list[float]]:
    """Return the processor's seconds for a step: minimum, median and maximum of the rounds."""
    model, tokens = make_model()
    torch.set_num_threads(1)  # several would count how long they wait for each other
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn, way in take_turns(WAYS, ROUNDS, description="Steps"):
        start = time.process_time()
        run_step(model, tokens, way)
        if turn:
            seconds[way].append(time.process_time() - start)
    return {way: summarize(values) for way, values in seconds.items()}


if __name__ == "__main__":
    fresh = multiprocessing.get_context("spawn")
    peaks = {}
    for way in WAYS:
        with fresh.Pool(1) as pool:
            peaks[way] = round(pool.apply(measure_peak, (way,)))
    print(peaks)
    report = {"rows": ROWS, "tokens": LENGTH, "rounds": ROUNDS, "peak_megabytes": peaks}
    report["seconds"] = measure_seconds()
    print(report)
    write_results("loss_memory", report)
