"""Memory of the first process while a model that is sharded by FSDP2 is saved: whole or in shards.

Two processes on CPUs (gloo) share GPT-2 of 124 M weights and AdamW's two averages, and save them by
the functions that `Trainer` calls. Each way runs in processes of its own.

Run: python benchmarks/checkpoint_memory.py (1 minute on 2 cores; Linux)
"""

import ctypes
import os
import re
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import save_fsdp_model, save_fsdp_optimizer
from results_file import write_results
from torch import multiprocessing
from torch.distributed.fsdp import fully_shard

from hf_nanogpt import NanoGPTForCausalLM, build_optimizer, load_preset

PROCESSES = 2
WAYS = {
    "whole (FULL_STATE_DICT)": "FULL_STATE_DICT",
    "in shards (SHARDED_STATE_DICT)": "SHARDED_STATE_DICT",
}


def read_memory(name: str) -> int:
    """Return a figure of this process in /proc, in bytes: VmRSS, or the peak VmHWM."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
    assert found
    return 1024 * int(found[1])


def make_trained() -> tuple[NanoGPTForCausalLM, torch.optim.Optimizer]:
    """Return a sharded model and its optimizer after a step."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = NanoGPTForCausalLM(load_preset("gpt2"))
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = build_optimizer(model, recipe="adamw")
    tokens = torch.randint(model.config.vocab_size, (1, 32))
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def measure(rank: int, way: str, folder: str) -> None:
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=PROCESSES)
    ranks, sizes = ("RANK", "LOCAL_RANK"), ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
    os.environ |= dict.fromkeys(ranks, str(rank)) | dict.fromkeys(sizes, str(PROCESSES))
    model, optimizer = make_trained()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=way)
    state = PartialState(cpu=True)
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the step left is not used again unseen
    before = read_memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    save_fsdp_model(plugin, state, model, folder)
    save_fsdp_optimizer(plugin, state, optimizer, model, folder)
    if rank == 0:
        added = read_memory("VmHWM") - before
        weights = sum(p.numel() for p in model.parameters())
        (Path(folder) / "measured").write_text(f"{weights} {before} {added}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    rows = []
    for name, way in WAYS.items():
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(measure, (way, folder), nprocs=PROCESSES)
            weights, before, added = map(int, (Path(folder) / "measured").read_text().split())
        rows.append({"name": name, "parameters": weights, "before": before, "added": added})
        print(rows[-1], flush=True)
    write_results("checkpoint_memory", {"processes": PROCESSES, "rows": rows})
