"""nanoGPT's checkpoint as its train.py writes it, and its model in plain torch, for comparison."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

ARGS: dict[str, Any] = {
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 32,
    "block_size": 24,
    "vocab_size": 96,
}
# Outputs and inputs of a block's linear maps, in widths of the model.
LINEARS = {"attn.c_attn": (3, 1), "attn.c_proj": (1, 1), "mlp.c_fc": (4, 1), "mlp.c_proj": (1, 4)}


def make_state(*, bias: bool, **args: Any) -> dict[str, Tensor]:
    """Return random tensors under the names and in the shapes that nanoGPT gives them."""
    args = ARGS | args
    width = args["n_embd"]
    shapes = {"wte.weight": (args["vocab_size"], width), "wpe.weight": (args["block_size"], width)}
    norms = ["ln_f"]
    for n in range(args["n_layer"]):
        norms += [f"h.{n}.ln_1", f"h.{n}.ln_2"]
        for name, (outputs, inputs) in LINEARS.items():
            shapes[f"h.{n}.{name}.weight"] = (outputs * width, inputs * width)
            shapes[f"h.{n}.{name}.bias"] = (outputs * width,)
    shapes |= {f"{name}.{kind}": (width,) for name in norms for kind in ("weight", "bias")}
    generator = torch.Generator().manual_seed(0)
    state = {
        f"transformer.{name}": 0.2 * torch.randn(shape, generator=generator)
        + (name.endswith("weight") and len(shape) == 1)
        for name, shape in shapes.items()
        if bias or not name.endswith("bias")
    }
    return state | {"lm_head.weight": state["transformer.wte.weight"]}


def evaluate_layout(state: dict[str, Tensor], ids: Tensor, *, heads: int = 4) -> Tensor:
    """Compute the logits (B, T, V) of a state dict in nanoGPT's layout."""

    def linear(x: Tensor, name: str) -> Tensor:
        return functional.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
        return functional.layer_norm(x, weight.shape, weight, bias, eps=1e-5)

    rows, length = ids.shape
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    x = state["transformer.wte.weight"][ids] + state["transformer.wpe.weight"][:length]
    width, n = x.shape[-1], 0
    while f"transformer.h.{n}.ln_1.weight" in state:
        block = f"transformer.h.{n}"
        fused = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn")
        q, k, v = (
            part.view(rows, length, heads, width // heads).transpose(1, 2)
            for part in fused.split(width, dim=2)
        )
        scores = (q @ k.transpose(2, 3) / math.sqrt(width // heads)).masked_fill(future, -math.inf)
        attended = (scores.softmax(-1) @ v).transpose(1, 2).reshape(rows, length, width)
        x = x + linear(attended, f"{block}.attn.c_proj")
        inner = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))  # the exact GELU
        x = x + linear(inner, f"{block}.mlp.c_proj")
        n += 1
    return norm(x, "transformer.ln_f") @ state["lm_head.weight"].t()


def write_checkpoint(folder: Path, state: dict[str, Any], **args: Any) -> Path:
    """Write a ckpt.pt with the optimizer and the run's settings next to the weights."""
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(3)
    optimizer.step()
    checkpoint = {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "model_args": ARGS | args,
        "iter_num": 5,
        "best_val_loss": torch.tensor(1.5),
        "config": {"out_dir": "out", "learning_rate": 6e-4, "compile": True},
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, folder / "ckpt.pt")
    return folder / "ckpt.pt"
