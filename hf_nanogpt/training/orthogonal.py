"""The nearest orthogonal matrices: the part of Muon that takes the time."""

import math
from collections.abc import Callable
from subprocess import SubprocessError
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.tensor import DTensor, Shard
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Polar Express (Amsel et al. 2025, arXiv:2505.16932): the best odd polynomials of degree 5, one for
# each iteration, for singular values from 1e-3 to 1; found by minimax, slightly damped for safety.
_POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
)
# The GPUs of most machines. Between machines, sending takes longer than computing.
_MOST_SHARES = 8
# What torch.compile raises without a compiler, or with one that does not work.
_COMPILE_ERRORS = (RuntimeError, ImportError, OSError, SubprocessError)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Return nearly the closest orthogonal matrix to each of `matrices` (..., rows, columns).

    Singular values come to lie between 0.12 and 1.88, which is close enough for Muon; those below a
    thousandth of the matrix's norm remain smaller. Computed in float32 on a CPU, where bfloat16 is
    slow, and in bfloat16 elsewhere; compiled on CUDA, at the first call for each shape. Sharded
    matrices (at least 3 dimensions) come back in the same shards.
    """
    if isinstance(matrices, DTensor):
        return _orthogonalize_sharded(matrices)
    batch = matrices.reshape(-1, *matrices.shape[-2:])
    results = _run_compiled(batch) if matrices.is_cuda else _iterate(batch)
    return results.to(matrices.dtype).view_as(matrices)


def working_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype that `orthogonalize` computes in; its results hold no more digits."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def find_sharing_group() -> dist.ProcessGroup | None:
    """Return the processes to share the matrices with: all, or 8 neighbours of many.

    All processes must call this together. It is `None` where there is nobody to share with.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if 1 < ranks <= _MOST_SHARES:
        return dist.group.WORLD
    size = math.gcd(ranks, _MOST_SHARES)
    return dist.new_subgroups(group_size=size)[0] if size > 1 else None


def _iterate(matrices: torch.Tensor) -> torch.Tensor:
    """Orthogonalise `matrices` (N, rows, columns); return them in the working dtype."""
    x = matrices.to(working_dtype(matrices.device))
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
    return x.mT if tall else x


_compiled: Callable[[torch.Tensor], torch.Tensor] | None = None  # made by the first call


def _run_compiled(matrices: torch.Tensor) -> torch.Tensor:
    """Run `_iterate` compiled; from the first failure on, run it as it is."""
    global _compiled
    try:
        if _compiled is None:
            _compiled = torch.compile(_iterate, dynamic=False)
        return _compiled(matrices)
    except _COMPILE_ERRORS as error:
        if _compiled is _iterate:
            raise
        reason = str(error).strip().split("\n")[0]
        logger.warning(f"Muon is slower than it could be: torch.compile failed ({reason}).")
        _compiled = _iterate
        return _iterate(matrices)


def _orthogonalize_sharded(matrices: DTensor) -> torch.Tensor:
    """Give each process some whole matrices, and return the results in shards.

    This takes two exchanges between processes; with sharded matrices, each product would take one.
    """
    by_matrix = [place if place.is_replicate() else Shard(0) for place in matrices.placements]
    # What travels has the dtype of the computation, which is the smaller one on a GPU.
    sent: Any = matrices.to(working_dtype(matrices.device))  # a DTensor; torch declares a Tensor
    dealt = sent.redistribute(placements=by_matrix)
    results = DTensor.from_local(
        orthogonalize(dealt.to_local()),
        dealt.device_mesh,
        by_matrix,
        run_check=False,
        shape=dealt.shape,
        stride=dealt.stride(),
    )
    return results.redistribute(placements=matrices.placements).to(matrices.dtype)
