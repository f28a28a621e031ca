"""Read the tensors of a checkpoint one at a time, and name every fault in its files."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError, explain_errors
from ..untrusted import path_inside, read_json

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a known shape that is read only when it is needed."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    is_float: bool = True  # False for the whole numbers of quantized weights


def open_weights(folder: Path) -> dict[str, LazyTensor]:
    """Return the tensors of a folder's safetensors file or shards; only the headers are read.

    Raises:
        UserError: a file or shard is missing, cut off or damaged.
    """
    return {name: t for path in _weight_files(folder) for name, t in _open_file(path).items()}


def _weight_files(folder: Path) -> Iterable[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise UserError(
            f"{folder} has neither {single.name} nor {index.name}: load the model with "
            "transformers and save it again with save_pretrained."
        )
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(n, str) for n in shards.values()):
        raise UserError(f"{index} has no weight_map that says which file holds which tensor.")
    with explain_errors(str(index)):
        return [path_inside(folder, name) for name in sorted(set(shards.values()))]


def _open_file(path: Path) -> dict[str, LazyTensor]:
    try:
        file = safe_open(path, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        return {
            name: LazyTensor(
                tuple(part.get_shape()),
                partial(file.get_tensor, name),
                is_float=part.get_dtype().startswith(("F", "BF")),
            )
            for name, part in slices.items()
        }
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read: it is missing, cut off or damaged ({error})."
        ) from error


def check_tensors(found: Mapping[str, LazyTensor], expected: Shapes, *, where: Path) -> None:
    """Raise a `UserError` that names tensors that are missing, unknown or of another kind."""
    faults = {
        "missing": [repr(name) for name in expected if name not in found],
        "unknown": [repr(name) for name in found if name not in expected],
        "of another shape": [
            f"{name!r} is {found[name].shape} and should be {shape}"
            for name, shape in expected.items()
            if name in found and found[name].shape != shape
        ],
        "of whole numbers": [
            repr(name) for name in expected if name in found and not found[name].is_float
        ],
    }
    named = [f"{fault}: {_shorten(names)}" for fault, names in faults.items() if names]
    if named:
        raise UserError(
            f"{where} does not have the tensors that its config.json describes "
            f"({'; '.join(named)}). Check that the weights and the configuration belong together."
        )


def _shorten(names: list[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
