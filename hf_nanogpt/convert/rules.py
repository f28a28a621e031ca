"""The engine of all conversions: one table per format, read from left to right and back.

A row of a table names a module of the foreign model, the module of ours that it is, and the
operations that its weight and bias go through on the way; `{n}` stands for each layer, `{qkv}` for
our three projections. Where one side has a bias and the other has no place for it, the bias is
zero: it is filled in on the way to a side that has it, and must be zero on the way to one that has
not.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..checkpoint.weights import LazyTensor, Shapes
from ..configuration_nanogpt import NanoGPTConfig
from ..errors import UserError

logger = logging.get_logger(__name__)

_Change = Callable[[list[Tensor], int], list[Tensor]]  # (tensors, head_dim) -> tensors


@dataclass(frozen=True)
class Operation:
    """What turns the foreign tensors of a row into ours, and the inverse."""

    to_ours: _Change
    to_theirs: _Change


def _each(function: Callable[[Tensor, int], Tensor]) -> _Change:
    return lambda parts, head_dim: [function(part, head_dim) for part in parts]


def _split(parts: list[Tensor], head_dim: int) -> list[Tensor]:
    [fused] = parts
    return [part.clone(memory_format=torch.contiguous_format) for part in fused.chunk(3)]


def _transpose(x: Tensor, head_dim: int) -> Tensor:
    return x.t()  # of a bias: the bias


def _swap_halves(x: Tensor, head_dim: int) -> Tensor:
    return x.unflatten(0, (-1, 2, head_dim // 2)).flip(1).flatten(0, 2)


# GPT-2's Conv1D keeps its weight as (inputs, outputs).
TRANSPOSE = Operation(_each(_transpose), _each(_transpose))
# One matrix for queries, keys and values, one below the other.
SPLIT = Operation(_split, lambda parts, head_dim: [torch.cat(parts)])
# Scores that are not divided by sqrt(head_dim): the queries carry the factor (exact to the bit
# where it is a power of two, as for head_dim 16, 64 and 256).
SCALE = Operation(
    _each(lambda x, head_dim: x * math.sqrt(head_dim)),
    _each(lambda x, head_dim: x / math.sqrt(head_dim)),
)
# RoPE that turns the other way round: the halves of each head change places.
SWAP_HALVES = Operation(_each(_swap_halves), _each(_swap_halves))

Rows = Sequence[tuple[Any, ...]]  # (their module, our module, *operations)


@dataclass(frozen=True)
class Format:
    """A foreign format: its class in transformers, its table, and its configuration, both ways."""

    model_type: str
    architecture: str
    rows: Rows
    read_config: Callable[[dict[str, Any]], dict[str, Any]]  # theirs -> fields of ours
    write_config: Callable[[NanoGPTConfig], dict[str, Any]]
    ignored: str = r"$^"  # what a file may hold beside weights, as a regular expression
    newer: str = r"$^"  # tensors of later versions of the format, which ours has no place for

    @property
    def embedding(self) -> str:
        """Return the name of the foreign token embeddings."""
        [name] = [theirs for theirs, ours, *_ in self.rows if ours == "model.embed_tokens"]
        return f"{name}.weight"


def translate(
    rows: Rows,
    source: Mapping[str, LazyTensor],
    target: Shapes,
    *,
    config: NanoGPTConfig,
    to_ours: bool,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of `target` by name, made one after the other from those of `source`.

    Both must have been checked: each tensor that the table leads to is there.

    Raises:
        UserError: a bias is not zero that the target has no place for.
    """
    dtype = torch.float32
    for theirs, ours, operations in _expand(rows, config.num_hidden_layers):
        here, there = ([theirs], ours) if to_ours else (ours, [theirs])
        if here[0] not in source:
            filled = [name for name in there if name in target]
            assert all(name.endswith(".bias") for name in filled), filled
            yield from ((name, torch.zeros(target[name], dtype=dtype)) for name in filled)
            continue
        parts = [source[name].read() for name in here]
        dtype = parts[0].dtype
        if there[0] not in target:
            _check_zero(here, parts)
            continue
        parts = _apply(operations, parts, config, to_ours=to_ours)
        yield from ((name, part.contiguous()) for name, part in zip(there, parts, strict=True))


def _apply(
    operations: list[Operation], parts: list[Tensor], config: NanoGPTConfig, *, to_ours: bool
) -> list[Tensor]:
    assert config.head_dim is not None  # derived
    for operation in operations if to_ours else reversed(operations):
        change = operation.to_ours if to_ours else operation.to_theirs
        parts = change(parts, config.head_dim)
    return parts


def _expand(rows: Rows, layers: int) -> Iterator[tuple[str, list[str], list[Operation]]]:
    """Spell out the rows: (their tensor, our tensors, operations), weights before biases."""
    for theirs, ours, *operations in rows:
        for n in range(layers if "{n}" in theirs else 1):
            paths = [ours.replace("{qkv}", x) for x in ("qkv" if "{qkv}" in ours else "q")]
            for kind in ("weight", "bias"):
                names = [f"{path}.{kind}".replace("{n}", str(n)) for path in paths]
                yield f"{theirs}.{kind}".replace("{n}", str(n)), names, operations


def _check_zero(names: Sequence[str], tensors: list[Tensor]) -> None:
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.count_nonzero():
            raise UserError(
                f"{name!r} is not zero, and this format has no such bias: choose another one, or "
                "train with attention_bias=False."
            )


def their_shapes(rows: Rows, ours: Shapes, *, config: NanoGPTConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the foreign tensors that all of ours would become."""
    shapes = {}
    for theirs, names, operations in _expand(rows, config.num_hidden_layers):
        if names[0] in ours:
            parts = [torch.empty(ours[name], device="meta") for name in names]
            [made] = _apply(operations, parts, config, to_ours=False)
            shapes[theirs] = tuple(made.shape)
    return shapes


# Configurations


def rename(theirs: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields of ours that go by another name in `theirs`."""
    return {ours: theirs[name] for name, ours in fields.items()}


def rename_back(config: NanoGPTConfig, fields: Mapping[str, str]) -> dict[str, Any]:
    """Return the foreign fields that go by another name in ours."""
    return {name: getattr(config, ours) for name, ours in fields.items()}


def plain_heads(fields: Mapping[str, Any]) -> dict[str, int | None]:
    """Return the fields of attention that shares no keys and whose heads make up the width."""
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    head_dim = None if width % heads else width // heads
    return {"num_key_value_heads": heads, "head_dim": head_dim}


def expect(theirs: Mapping[str, Any], **values: Any) -> None:
    """Raise a `UserError` that names the first foreign setting that ours has no counterpart of."""
    for name, value in values.items():
        if theirs.get(name, value) != value:
            raise UserError(
                f"{name}={theirs[name]!r} has no counterpart in NanoGPTConfig: only models with "
                f"{name}={value!r} can be converted."
            )


def one_dropout(theirs: Mapping[str, Any], *names: str, everywhere: bool = True) -> float:
    """Return the dropout of embeddings, attention and sublayers, which are one field in ours.

    Where they differ, or a format has only one of them, and it is not 0, nothing is taken over.
    """
    values = {name: theirs[name] for name in names}
    shared = set(values.values()) if everywhere else {0.0, *values.values()}
    if len(shared) == 1:
        return shared.pop()
    logger.warning(f"{values} is not taken over: dropout=0.0, set it before training further.")
    return 0.0
