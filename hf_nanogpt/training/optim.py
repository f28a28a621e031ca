"""Muon for the matrices inside the layers and AdamW for the rest, as one optimizer.

Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks") replaces the
momentum of a matrix by the nearest orthogonal matrix, so that all its directions learn at the same
pace.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from ..errors import UserError, did_you_mean
from .orthogonal import orthogonalize, working_dtype

OptimRecipe = Literal["muon", "adamw"]
_Named: TypeAlias = list[tuple[str, nn.Parameter]]
_Groups: TypeAlias = dict[str, dict[str, Any]]
_Params: TypeAlias = list[torch.Tensor]
_Updates: TypeAlias = tuple[_Params, _Params]  # of one shape: matrices, and what to add to each


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


class MuonAdamW(torch.optim.Optimizer):
    """Step each group by its `algorithm`: `"muon"` (matrices only) or `"adamw"`.

    Both decay weights apart from the gradient. Matrices of the same shape are orthogonalised
    together, in batched products. Groups of `"muon"` use `momentum` (Nesterov), which starts 0.1
    lower and rises during the first `momentum_warmup` steps; those of `"adamw"` use `betas` and
    `eps`. Parameters may be sharded (`DTensor`), as with FSDP2 and tensor parallelism.

    In a `process_group` whose processes hold the same parameters and the same gradients, as those
    of DDP do, each orthogonalises a share of the matrices and sends it to the others. Without one,
    each does all.
    """

    process_group: dist.ProcessGroup | None = None  # a copy of the optimizer shares with nobody

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
        process_group: dist.ProcessGroup | None = None,
    ):
        adamw = {"betas": betas, "eps": eps, "algorithm": "adamw"}
        muon = {"momentum": momentum, "momentum_warmup": momentum_warmup, "steps": 0}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay} | adamw | muon)
        self.process_group = process_group

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # torch leaves `step` where it was saved, but the fused AdamW needs it next to the weights.
        for p, state in self.state.items():
            if "step" in state:
                state["step"] = state["step"].to(p.device)

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
        piles = _group_by_shape(params)
        for same in piles:
            for p in same:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            torch._foreach_lerp_(self._buffers(same), _gradients(same), 1 - momentum)
        alone = self.process_group is None or isinstance(params[0], DTensor)
        find = self._find_updates if alone else self._share_updates
        for same, updates in find(piles, momentum):
            # Decay, then step. Matrices with more rows than columns take longer steps.
            rows, columns = same[0].shape
            torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
            scale = max(1.0, rows / columns) ** 0.5
            torch._foreach_add_(same, updates, alpha=-group["lr"] * scale)

    def _find_updates(self, piles: list[_Params], momentum: float) -> Iterator[_Updates]:
        for same in piles:
            # Nesterov: the update looks one step ahead along the momentum.
            ahead = torch.stack(_gradients(same))
            torch._foreach_lerp_(list(ahead.unbind()), self._buffers(same), momentum)
            yield same, list(orthogonalize(ahead).unbind())

    def _share_updates(self, piles: list[_Params], momentum: float) -> Iterator[_Updates]:
        """Yield the same, with a share of the matrices from each process of the group.

        All end with the same bits. Those of one process may differ by rounding, because products
        in smaller batches may be summed in another order.
        """
        assert self.process_group is not None
        ranks, rank = self.process_group.size(), self.process_group.rank()
        # Deal the matrices like cards: for each shape, the processes differ by at most one matrix.
        cards = [p for same in piles for p in same]
        hands = [cards[i::ranks] for i in range(ranks)]
        # Each process sends its results in one row, in the dtype of the computation.
        length = max(sum(p.numel() for p in hand) for hand in hands)
        row = cards[0].new_zeros(length, dtype=working_dtype(cards[0].device))
        found = self._find_updates(_group_by_shape(hands[rank]), momentum)
        own = [update for _, updates in found for update in updates]
        for place, update in zip(_split_row(row, hands[rank]), own, strict=True):
            place.copy_(update)
        rows = row.new_empty(ranks, length)
        dist.all_gather(list(rows), row, group=self.process_group)
        received: dict[torch.Tensor, torch.Tensor] = {}
        for hand, row in zip(hands, rows.to(cards[0].dtype), strict=True):
            received |= zip(hand, _split_row(row, hand), strict=True)
        for same in piles:
            yield same, [received[p] for p in same]

    def _buffers(self, params: _Params) -> _Params:
        return [self.state[p]["momentum_buffer"] for p in params]

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
            _gradients(params),
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


def _gradients(params: _Params) -> _Params:
    return [p.grad for p in params if p.grad is not None]


def _group_by_shape(params: _Params) -> list[_Params]:
    groups = defaultdict(list)
    for p in params:
        groups[p.shape, p.device, p.dtype].append(p)
    return list(groups.values())


def _split_row(row: torch.Tensor, params: _Params) -> _Params:
    """Return views of the numbers in `row`, one in the shape of each parameter."""
    sizes = [p.numel() for p in params]
    pieces = row[: sum(sizes)].split(sizes)
    return [piece.view_as(p) for piece, p in zip(pieces, params, strict=True)]


def build_optimizer(
    model: nn.Module,
    *,
    recipe: OptimRecipe = "muon",
    learning_rate: float | None = None,
    head_learning_rate: float | None = None,
    weight_decay: float | None = None,
    betas: tuple[float, float] | None = None,
    eps: float = 1e-8,
    momentum_warmup: int = 0,
    process_group: dist.ProcessGroup | None = None,
) -> torch.optim.Optimizer:
    """Make the optimizer of a recipe; an argument of `None` means the value in `OPTIM_DEFAULTS`.

    `"muon"`: Muon for the matrices inside the layers, at `learning_rate`; AdamW for untied
    embeddings at 5 times that rate, and for all else (head, norms, biases) at `head_learning_rate`,
    which is half of it by default.
    `"adamw"`: AdamW for everything at `learning_rate`, with weight decay on matrices only. Groups
    have a `name`, and every trainable parameter is in exactly one group. For `process_group`, see
    `MuonAdamW`.

    One rate serves all widths: the norm of Muon's update does not depend on the width, and AdamW's
    rates next to it fall with the square root of a width above 128, as nanochat's do (but for a
    `head_learning_rate` that is given). The default suits some hundred steps of 256 to 2,048 tokens
    each. With more tokens in a step, the rate can be up to twice as high; for many thousand steps
    it should be lower.
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
    if recipe == "adamw":
        if head_learning_rate is not None:
            raise UserError(
                f"head_learning_rate={head_learning_rate} has an effect only with recipe=muon."
            )
        groups = _split_for_adamw(named, lr, decay)
    else:
        groups = _split_for_muon(named, model.config, lr, head_learning_rate, decay)
    filled = [{"name": name, **group} for name, group in groups.items() if group["params"]]
    return MuonAdamW(
        filled,
        lr=lr,
        betas=betas,
        eps=eps,
        momentum_warmup=momentum_warmup,
        process_group=process_group,
    )


def _split_for_adamw(named: _Named, lr: float, decay: float) -> _Groups:
    matrices, vectors = ([p for _, p in named if (p.ndim >= 2) is two_d] for two_d in (True, False))
    return {
        "matrices": {"lr": lr, "weight_decay": decay, "params": matrices},
        "vectors": {"lr": lr, "weight_decay": 0.0, "params": vectors},
    }


def _split_for_muon(
    named: _Named, config: Any, lr: float, head_lr: float | None, decay: float
) -> _Groups:
    narrowed = lr * min(1.0, _REFERENCE_WIDTH / config.hidden_size) ** 0.5
    other_lr = narrowed * _OTHER_LR if head_lr is None else head_lr
    groups: _Groups = {
        "matrices": {"lr": lr, "weight_decay": decay, "algorithm": "muon", "params": []},
        "embeddings": {"lr": narrowed * _EMBEDDING_LR, "weight_decay": 0.0, "params": []},
        "others": {"lr": other_lr, "weight_decay": 0.0, "params": []},
    }
    tied = getattr(config, "tie_word_embeddings", False)
    for name, parameter in named:
        if parameter.ndim == 2 and "layers." in name:
            group = "matrices"
        else:
            group = "embeddings" if "embed_tokens" in name and not tied else "others"
        groups[group]["params"].append(parameter)
    return groups
