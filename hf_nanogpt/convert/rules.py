"""The engine of all conversions: a format is one table of weights, and it works in both directions.

Each row names a module of the other format, our module that holds the same weights, and the
operations that turn one into the other. `{n}` stands for each layer, `{qkv}` for our three
projections. Where only one of two modules has a bias, the other counts as zero: import and export
fill in zeros where a bias is missing, and refuse to drop one that is not zero.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    """What happens to the tensors of a row on import, and the inverse for export."""

    on_import: _Change
    on_export: _Change


def _each(function: Callable[[Tensor, int], Tensor]) -> _Change:
    return lambda tensors, head_dim: [function(tensor, head_dim) for tensor in tensors]


def _split(tensors: list[Tensor], head_dim: int) -> list[Tensor]:
    [fused] = tensors
    return [part.clone(memory_format=torch.contiguous_format) for part in fused.chunk(3)]


def _swap_halves(x: Tensor, head_dim: int) -> Tensor:
    return x.unflatten(0, (-1, 2, head_dim // 2)).flip(1).flatten(0, 2)


_transpose = _each(lambda x, head_dim: x.t())  # leaves a bias as it is

# GPT-2's Conv1D stores its weight as (inputs, outputs).
TRANSPOSE = Operation(_transpose, _transpose)
# One matrix for queries, keys and values, one below the other.
SPLIT = Operation(_split, lambda tensors, head_dim: [torch.cat(tensors)])
# Scores that are not divided by sqrt(head_dim): the queries carry the factor. This is exact to the
# bit where the factor is a power of two, as for head_dim 16, 64 and 256.
SCALE = Operation(
    _each(lambda x, head_dim: x * math.sqrt(head_dim)),
    _each(lambda x, head_dim: x / math.sqrt(head_dim)),
)
# RoPE that rotates in the other direction: the halves of each head change places.
SWAP_HALVES = Operation(_each(_swap_halves), _each(_swap_halves))
# A table of positions with two rows in front that no token uses.
SKIP_TWO = Operation(
    _each(lambda x, head_dim: x[2:]),
    _each(lambda x, head_dim: torch.cat([torch.zeros_like(x[:1]).expand(2, -1), x])),
)

Rows = Sequence[tuple[Any, ...]]  # (module of the other format, our module, *operations)


@dataclass(frozen=True)
class Format:
    """Another format: its class in transformers, its table, and how its configuration converts."""

    model_type: str
    rows: Rows
    import_config: Callable[[dict[str, Any]], dict[str, Any]]  # its fields -> NanoGPTConfig's
    export_config: Callable[[NanoGPTConfig], dict[str, Any]]  # the inverse
    ignored: str = r"$^"  # tensors that are not weights, as a regular expression
    newer: str = r"$^"  # tensors of later versions of the format, which we cannot express

    @property
    def embedding(self) -> str:
        """Return the name of the other format's token embeddings."""
        [name] = [native for native, ours, *_ in self.rows if ours == "model.embed_tokens"]
        return f"{name}.weight"


# Weights


@dataclass(frozen=True)
class Step:
    """A row of a table, spelled out for one layer and one direction."""

    sources: list[str]
    targets: list[str]
    changes: list[_Change]
    head_dim: int

    def apply(self, tensors: list[Tensor]) -> list[Tensor]:
        for change in self.changes:
            tensors = change(tensors, self.head_dim)
        return [tensor.contiguous() for tensor in tensors]


def expand(rows: Rows, config: NanoGPTConfig, *, exporting: bool = False) -> Iterator[Step]:
    """Spell out a table layer by layer, weights before biases."""
    head_dim = config.head_dim
    assert head_dim is not None  # it was derived
    for native, ours, *operations in rows:
        paths = [ours.replace("{qkv}", x) for x in "qkv"] if "{qkv}" in ours else [ours]
        for n in range(config.num_hidden_layers if "{n}" in native else 1):
            for suffix in (".weight", ".bias"):
                native_names = [native.replace("{n}", str(n)) + suffix]
                our_names = [path.replace("{n}", str(n)) + suffix for path in paths]
                if exporting:
                    changes = [operation.on_export for operation in reversed(operations)]
                    yield Step(our_names, native_names, changes, head_dim)
                else:
                    changes = [operation.on_import for operation in operations]
                    yield Step(native_names, our_names, changes, head_dim)


def translate(
    steps: Iterable[Step], source: Mapping[str, LazyTensor], target: Shapes
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of `target` by name, made one after the other from those of `source`.

    Both must have been checked: each tensor that the table leads to is there.

    Raises:
        UserError: a bias that the target cannot hold is not zero.
    """
    dtype, rounded = torch.float32, []
    for step in steps:
        if step.sources[0] not in source:  # a bias that only the target has
            missing = [name for name in step.targets if name in target]
            assert all(name.endswith(".bias") for name in missing), missing
            yield from ((name, torch.zeros(target[name], dtype=dtype)) for name in missing)
            continue
        tensors = [source[name].read() for name in step.sources]
        dtype = tensors[0].dtype
        if step.targets[0] in target:
            if _is_rounded(step, dtype):
                rounded.append(step.sources[0])
            yield from zip(step.targets, step.apply(tensors), strict=True)
            continue
        for name, tensor in zip(step.sources, tensors, strict=True):
            if tensor.count_nonzero():
                raise UserError(
                    f"{name!r} is not zero, but this format does not have that bias: choose "
                    "another format, or train with attention_bias=False."
                )
    if rounded:
        logger.warning(
            f"{rounded[0]} and {len(rounded) - 1} more are rounded: they are {dtype}, and between "
            "these formats they change by a factor that is not a power of two. The logits differ a "
            "little; a float32 checkpoint keeps them."
        )


def _is_rounded(step: Step, dtype: torch.dtype) -> bool:
    """Return whether a step scales tensors of 16 bits by what is not a power of two."""
    scales = not {SCALE.on_import, SCALE.on_export}.isdisjoint(step.changes)
    return scales and dtype.itemsize < 4 and not math.log2(math.sqrt(step.head_dim)).is_integer()


def native_shapes(rows: Rows, ours: Shapes, config: NanoGPTConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes that all of our tensors would have in the other format."""
    shapes = {}
    for step in expand(rows, config, exporting=True):
        if step.sources[0] in ours:
            [made] = step.apply([torch.empty(ours[name], device="meta") for name in step.sources])
            shapes[step.targets[0]] = tuple(made.shape)
    return shapes


# Configurations

# Fields with the same name in all the formats that have them.
SHARED_FIELDS = {
    name: name
    for name in (
        "vocab_size",
        "initializer_range",
        "tie_word_embeddings",
        "use_cache",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
}


def import_fields(native: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return fields of another configuration by our names; `names` maps its names to ours."""
    return {ours: native[name] for name, ours in names.items()}


def export_fields(config: NanoGPTConfig, names: Mapping[str, str]) -> dict[str, Any]:
    """Return fields of ours by the names of another configuration."""
    return {name: getattr(config, ours) for name, ours in names.items()}


def plain_heads(fields: Mapping[str, Any]) -> dict[str, int | None]:
    """Return the fields of heads that share no keys and together are as wide as the model."""
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    return {"num_key_value_heads": heads, "head_dim": None if width % heads else width // heads}


def require(native: Mapping[str, Any], **values: Any) -> None:
    """Raise a `UserError` that names the first setting that differs from what we can express."""
    for name, value in values.items():
        if native.get(name, value) != value:
            raise UserError(
                f"{name}={native[name]!r} has no counterpart in NanoGPTConfig: only models with "
                f"{name}={value!r} can be converted."
            )


def import_dropouts(
    native: Mapping[str, Any], attention: str, *names: str, everywhere: bool = True
) -> dict[str, Any]:
    """Return `attention_dropout`, and `dropout`: one field for `names` of embeddings and sublayers.

    The second is 0 where those differ. With `everywhere=False` the format lacks some of these
    places, so that any value but 0 differs from that of the others.
    """
    values = {name: native[name] for name in names}
    distinct = set(values.values()) if everywhere else {0.0, *values.values()}
    dropout = distinct.pop() if len(distinct) == 1 else 0.0
    if distinct:
        logger.warning(
            f"{values} is not converted: dropout is 0.0, set it before you train further."
        )
    own = native[attention]
    return {"dropout": dropout, "attention_dropout": None if own == dropout else own}


def export_dropouts(config: NanoGPTConfig, attention: str, *names: str) -> dict[str, Any]:
    """Return the fields of another configuration that `import_dropouts` reads."""
    return {attention: config.find_attention_dropout(), **dict.fromkeys(names, config.dropout)}
