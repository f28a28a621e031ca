"""What test_distributed.py runs in two processes; the first of them writes the figures as JSON."""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from accelerate import PartialState
from accelerate.utils import DistributedType
from packaging.version import parse
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard

from hf_nanogpt import NanoGPTConfig, NanoGPTForCausalLM, build_optimizer, train

BATCHES = torch.randint(1, 61, (4, 4, 16), generator=torch.Generator().manual_seed(1))
RECIPES = ("muon", "adamw")
NO_TENSOR_PARALLEL = "tensor parallelism is tested with transformers 5.23 and newer"
HAS_TENSOR_PARALLEL = parse(transformers.__version__) >= parse("5.23")


def train_steps(model: NanoGPTForCausalLM, recipe: str, *, own: slice = slice(None)) -> list[float]:
    """Train on the rows `own` of each of `BATCHES`, and return the losses over all processes."""
    optimizer = build_optimizer(model, recipe=recipe)
    losses = torch.empty(len(BATCHES))
    for i, batch in enumerate(BATCHES):
        loss = model(input_ids=batch[own], labels=batch[own]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses[i] = loss.detach()
    if dist.is_initialized():
        dist.all_reduce(losses)
        losses /= dist.get_world_size()
    return losses.tolist()


def shard_model(config: NanoGPTConfig) -> NanoGPTForCausalLM:
    """Build on the meta device, shard each layer and the rest, and only then make the weights."""
    with torch.device("meta"):
        model = NanoGPTForCausalLM(config)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    model.to_empty(device="cpu")
    model.init_weights()
    return model


def check_fsdp(folder: Path, recipe: str) -> list[float]:
    whole = NanoGPTForCausalLM.from_pretrained(folder)
    model = shard_model(whole.config)
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, whole.state_dict(), options=options)
    return train_steps(model, recipe, own=slice(dist.get_rank(), None, 2))


def save_sharded(folder: Path, destination: Path) -> None:
    dist.init_process_group("gloo")
    whole = NanoGPTForCausalLM.from_pretrained(folder)
    model, weights = shard_model(whole.config), whole.state_dict()
    model.save_pretrained(destination, state_dict=weights)
    assert isinstance(model, FSDPModule)  # again
    dist.destroy_process_group()


def check_first_loss() -> float:
    config = NanoGPTConfig(vocab_size=61, n_layer=1, n_embd=32, n_head=2, block_size=16)
    batch = BATCHES[0]
    return shard_model(config)(input_ids=batch, labels=batch).loss.item()


def load_in_parallel(folder: Path) -> NanoGPTForCausalLM:
    return NanoGPTForCausalLM.from_pretrained(folder, tp_plan="auto")


@torch.no_grad()
def check_logits(folder: Path) -> list:
    return load_in_parallel(folder)(input_ids=BATCHES[0]).logits.tolist()


def check_all(folder: Path, settings: dict) -> dict:
    """Train by DDP, and take the models in `folder` apart in both other ways."""
    train(output_dir=str(folder / "ddp"), **settings)
    models = {path.name: path for path in (folder / "models").iterdir()}
    trained = {name: models[name] for name in ("nano", "gpt2")}
    return {
        "processes": dist.get_world_size(),
        "fully_sharded": {
            name: {recipe: check_fsdp(path, recipe) for recipe in RECIPES}
            for name, path in trained.items()
        },
        "first_loss": check_first_loss(),
        **(check_parallel(models, trained) if HAS_TENSOR_PARALLEL else {}),
    }


def check_parallel(models: dict[str, Path], trained: dict[str, Path]) -> dict:
    return {
        "logits": {name: check_logits(path) for name, path in models.items()},
        "tensor_parallel": {
            name: {recipe: train_steps(load_in_parallel(path), recipe) for recipe in RECIPES}
            for name, path in trained.items()
        },
    }


def shard_on_cpus() -> None:
    """Make accelerate shard on CPUs too: it looks at the name alone, and would use DDP."""
    make = PartialState.__init__

    def make_sharded(self, *args, **kwargs):
        make(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = make_sharded


def train_by_fsdp(folder: Path, settings: dict) -> dict:
    """Train through Trainer and FSDP2, and again from the checkpoint in the middle.

    First with checkpoints as examples/accelerate/fsdp2.yaml has them, then with whole weights.
    """
    if settings.get("use_cpu"):
        shard_on_cpus()
    for name in ("shards", "whole"):
        if name == "whole":
            os.environ["FSDP_STATE_DICT_TYPE"] = "FULL_STATE_DICT"
        output_dir = folder / name
        train(output_dir=str(output_dir), **settings)
        if dist.get_rank() == 0:
            shutil.copytree(output_dir, folder / f"uninterrupted {name}")
            shutil.rmtree(output_dir / f"checkpoint-{settings['max_steps']}")
        dist.barrier()
        train(output_dir=str(output_dir), resume=True, **settings)
    return {"processes": dist.get_world_size()}


def run_check(name: str, folder: str) -> None:
    settings = json.loads((Path(folder) / f"{name}.json").read_text(encoding="utf-8"))
    checks = {"check_all": check_all, "train_by_fsdp": train_by_fsdp}
    figures = checks[name](Path(folder), settings)
    if dist.get_rank() == 0:
        (Path(folder) / "figures.json").write_text(json.dumps(figures), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    run_check(*sys.argv[1:])
