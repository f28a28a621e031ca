"""Shards of the weights and of the optimizer, as torch's distributed checkpoint writes them."""

import pickle
from pathlib import Path

import torch

from ..errors import UserError, explain_errors
from ..untrusted import path_inside

# What torch pickles into the table of contents of a folder of shards.
_KNOWN = {
    "pathlib": ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "_MEM_FORMAT_ENCODING",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    ),
}


def check_shards(checkpoint: str | Path) -> None:
    """Refuse folders of shards in a `checkpoint-N` that torch cannot read without risk.

    torch reads the shards as tensors and numbers, but their table of contents, `.metadata`, as a
    pickle that may call any code. Here the same file may name only what such a table needs.

    Raises:
        UserError: the table names something else or cannot be read, or a shard is elsewhere.
    """
    for path in sorted(Path(checkpoint).glob("*/.metadata")):
        with explain_errors(f"Cannot resume from {checkpoint}: {path} cannot be used"):
            with path_inside(checkpoint, str(path.relative_to(checkpoint))).open("rb") as file:
                metadata = _TableReader(file).load()
            for shard in metadata.storage_data.values():
                path_inside(path.parent, shard.relative_path)


class _TableReader(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _KNOWN.get(module, ()):
            return super().find_class(module, name)
        raise UserError(f"it holds {module}.{name}, which no such file needs. Do not trust it.")
