"""Muon for the matrices inside the layers and AdamW for the rest, as one optimizer.

Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks") replaces the
momentum of a matrix by the nearest orthogonal matrix, so that all its directions learn at the same
pace.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim.adamw import adamw

from ..errors import UserError, did_you_mean

OptimRecipe = Literal["muon", "adamw"]
_Named: TypeAlias = list[tuple[str, nn.Parameter]]
_Groups: TypeAlias = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class OptimDefaults:
    """What a recipe sets if the user does not."""

    learning_rate: float
    adam_beta1: float
    adam_beta2: float
    weight_decay: float
    max_grad_norm: float


OPTIM_DEFAULTS: dict[str, OptimDefaults] = {
    "muon": OptimDefaults(0.03, 0.8, 0.95, 0.0, 0.0),
    "adamw": OptimDefaults(1e-3, 0.9, 0.95, 0.1, 1.0),
}

# The learning rates of embeddings and all else, relative to that of the matrices, with "muon".
_EMBEDDING_LR, _OTHER_LR = 5.0, 0.5
_REFERENCE_WIDTH = 128  # above it, these two fall with the square root of the width

# Polar Express (Amsel et al. 2025, arXiv:2505.16932): the best odd polynomials of degree 5, one for
# each iteration, for singular values from 1e-3 to 1; found by minimax, slightly damped for safety.
_POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Return nearly the closest orthogonal matrix to each of `matrices` (..., rows, columns).

    All singular values become about 1. Computed in float32 on a CPU, where bfloat16 is slow, and in
    bfloat16 elsewhere. Sharded matrices (at least 3 dimensions) come back in the same shards.
    """
    if isinstance(matrices, DTensor):
        return _orthogonalize_sharded(matrices)
    x = matrices.float() if matrices.device.type == "cpu" else matrices.bfloat16()
    x = x.reshape(-1, *x.shape[-2:])
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    # From here on no singular value is above 1; each polynomial moves them closer to 1.
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    for a, b, c in _POLAR_EXPRESS:
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        x = polynomial @ x
    return (x.mT if tall else x).to(matrices.dtype).view_as(matrices)


def _orthogonalize_sharded(matrices: DTensor) -> DTensor:
    """Give each process some whole matrices, and return the results in shards.

    This takes two exchanges between processes; with sharded matrices, each product would take one.
    """
    by_matrix = [place if place.is_replicate() else Shard(0) for place in matrices.placements]
    dealt = matrices.redistribute(placements=by_matrix)
    results = DTensor.from_local(
        orthogonalize(dealt.to_local()),
        dealt.device_mesh,
        by_matrix,
        run_check=False,
        shape=dealt.shape,
        stride=dealt.stride(),
    )
    return results.redistribute(placements=matrices.placements)


class MuonAdamW(torch.optim.Optimizer):
    """Step each group by its `algorithm`: `"muon"` (matrices only) or `"adamw"`.

    Both decay weights apart from the gradient. Matrices of the same shape are orthogonalised
    together, in batched products. Groups of `"muon"` use `momentum` (Nesterov), which starts 0.1
    lower and rises during the first `momentum_warmup` steps; those of `"adamw"` use `betas` and
    `eps`. Parameters may be sharded (`DTensor`), as with FSDP2 and tensor parallelism.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = OPTIM_DEFAULTS["muon"].learning_rate,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.95,
        momentum_warmup: int = 0,
        weight_decay: float = 0.0,
    ):
        # "fused" tells `load_state_dict` that the number of steps is on the device, too.
        adamw = {"betas": betas, "eps": eps, "algorithm": "adamw", "fused": True}
        muon = {"momentum": momentum, "momentum_warmup": momentum_warmup, "steps": 0}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay} | adamw | muon)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # A parameter without a gradient is left as it is.
            params = [p for p in group["params"] if p.grad is not None]
            for sharded in (False, True):  # tensor parallelism has both; no call takes both at once
                same = [p for p in params if isinstance(p, DTensor) is sharded]
                if same:
                    (self._muon if group["algorithm"] == "muon" else self._adamw)(same, group)
            group["steps"] += 1
        return loss

    def _muon(self, params: list[torch.Tensor], group: dict[str, Any]) -> None:
        # Momentum rises linearly during the warm-up.
        missing = 1 - group["steps"] / group["momentum_warmup"] if group["momentum_warmup"] else 0
        momentum = group["momentum"] - 0.1 * max(0.0, missing)
        # Collect the matrices of each shape, to orthogonalise them together.
        shapes = defaultdict(list)
        for p in params:
            shapes[p.shape].append(p)
        for (rows, columns), same in shapes.items():
            grads = torch.stack([p.grad for p in same if p.grad is not None])
            for p in same:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            # Nesterov: the update looks one step ahead along the momentum.
            buffers = [self.state[p]["momentum_buffer"] for p in same]
            torch._foreach_lerp_(buffers, list(grads.unbind()), 1 - momentum)
            updates = orthogonalize(grads.lerp(torch.stack(buffers), momentum))
            # Decay, then step. Matrices with more rows than columns take longer steps.
            torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
            scale = max(1.0, rows / columns) ** 0.5
            torch._foreach_add_(same, list(updates.unbind()), alpha=-group["lr"] * scale)

    def _adamw(self, params: list[torch.Tensor], group: dict[str, Any]) -> None:
        # torch's own fused AdamW takes the states as lists.
        for p in params:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        states = [self.state[p] for p in params]
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def build_optimizer(
    model: nn.Module,
    *,
    recipe: OptimRecipe = "muon",
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    betas: tuple[float, float] | None = None,
    eps: float = 1e-8,
    momentum_warmup: int = 0,
) -> torch.optim.Optimizer:
    """Make the optimizer of a recipe; an argument of `None` means the value in `OPTIM_DEFAULTS`.

    `"muon"`: Muon for the matrices inside the layers, at `learning_rate`; AdamW for untied
    embeddings at 5 times that rate, and for all else (head, norms, biases) at half of it.
    `"adamw"`: AdamW for everything at `learning_rate`, with weight decay on matrices only. Groups
    have a `name`, and every trainable parameter is in exactly one group.

    One rate serves all widths: the norm of Muon's update does not depend on the width, and AdamW's
    rates next to it fall with the square root of a width above 128, as nanochat's do. The default
    suits some hundred steps of 256 to 2,048 tokens each. With more tokens in a step, the rate can
    be up to twice as high; for many thousand steps it should be lower.
    """
    if recipe not in OPTIM_DEFAULTS:
        known = ", ".join(OPTIM_DEFAULTS)
        hint = did_you_mean(recipe, OPTIM_DEFAULTS)
        raise UserError(f"recipe={recipe!r} is unknown.{hint} Known: {known}.")
    # What the caller leaves open comes from the recipe.
    defaults = OPTIM_DEFAULTS[recipe]
    lr = defaults.learning_rate if learning_rate is None else learning_rate
    decay = defaults.weight_decay if weight_decay is None else weight_decay
    betas = (defaults.adam_beta1, defaults.adam_beta2) if betas is None else betas
    # Groups without parameters, such as embeddings under LoRA, are left out.
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    split = _split_for_adamw if recipe == "adamw" else _split_for_muon
    groups = split(named, model.config, lr, decay)
    filled = [{"name": name, **group} for name, group in groups.items() if group["params"]]
    return MuonAdamW(filled, lr=lr, betas=betas, eps=eps, momentum_warmup=momentum_warmup)


def _split_for_adamw(named: _Named, config: Any, lr: float, decay: float) -> _Groups:
    matrices, vectors = ([p for _, p in named if (p.ndim >= 2) is two_d] for two_d in (True, False))
    return {
        "matrices": {"lr": lr, "weight_decay": decay, "params": matrices},
        "vectors": {"lr": lr, "weight_decay": 0.0, "params": vectors},
    }


def _split_for_muon(named: _Named, config: Any, lr: float, decay: float) -> _Groups:
    narrowed = lr * min(1.0, _REFERENCE_WIDTH / config.hidden_size) ** 0.5
    groups: _Groups = {
        "matrices": {"lr": lr, "weight_decay": decay, "algorithm": "muon", "params": []},
        "embeddings": {"lr": narrowed * _EMBEDDING_LR, "weight_decay": 0.0, "params": []},
        "others": {"lr": narrowed * _OTHER_LR, "weight_decay": 0.0, "params": []},
    }
    tied = getattr(config, "tie_word_embeddings", False)
    for name, parameter in named:
        if parameter.ndim == 2 and "layers." in name:
            group = "matrices"
        else:
            group = "embeddings" if "embed_tokens" in name and not tied else "others"
        groups[group]["params"].append(parameter)
    return groups
