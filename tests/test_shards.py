"""Folders of shards, as torch writes them, are read without running code."""

import os
import pickle

import pytest
import torch
from torch.distributed import checkpoint as distributed_checkpoint

from hf_nanogpt.training.shards import check_shards


@pytest.fixture
def checkpoint(tmp_path):
    """Return a checkpoint with shards of several types, written by torch in one process."""
    types = torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool
    state = {str(dtype): torch.ones(3, 2, dtype=dtype) for dtype in types} | {"number": 1, "x": "y"}
    distributed_checkpoint.save(state, checkpoint_id=tmp_path / "optimizer_0", no_dist=True)
    return tmp_path


class Shell:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_shards_that_torch_wrote_are_accepted(checkpoint):
    assert (checkpoint / "optimizer_0" / ".metadata").exists()
    check_shards(checkpoint)


def test_code_in_the_table_of_contents_is_refused_and_not_run(checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint)
    (checkpoint / "optimizer_0" / ".metadata").write_bytes(pickle.dumps(Shell()))
    with pytest.raises(ValueError, match=r"it holds \w+\.system, which no such file needs"):
        check_shards(checkpoint)
    assert not (checkpoint / "ran").exists()


@pytest.mark.parametrize("name", ["nn.Module", "load", "float32.__class__"])
def test_other_names_of_torch_are_refused(checkpoint, name):
    table = b"\x80\x04" + b"".join(
        pickle.SHORT_BINUNICODE + bytes([len(s)]) + s.encode() for s in ("torch", name)
    )
    (checkpoint / "optimizer_0" / ".metadata").write_bytes(table + pickle.STACK_GLOBAL + b".")
    with pytest.raises(ValueError, match=rf"it holds torch\.{name}"):
        check_shards(checkpoint)


def test_shards_outside_their_folder_are_refused(checkpoint):
    path = checkpoint / "optimizer_0" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "../../elsewhere"
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="not a plain path inside that folder"):
        check_shards(checkpoint)


def test_damaged_table_of_contents_is_named(checkpoint):
    path = checkpoint / "optimizer_0" / ".metadata"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"Cannot resume from .*\.metadata cannot be used"):
        check_shards(checkpoint)
