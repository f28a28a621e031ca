"""Streams of documents: their order depends only on the seed and the readers, and they resume."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from children import forked, run_ranks
from datasets import IterableDataset
from torch.utils.data import DataLoader

from hf_nanogpt import train
from hf_nanogpt.checkpoint.steps import read_record
from hf_nanogpt.cli import main
from hf_nanogpt.data import streams
from hf_nanogpt.data.streams import PackedStream
from hf_nanogpt.errors import UserError

EOS, LENGTH, BATCH = 0, 8, 2


def documents_of(shards: list[int], log: Path | None = None):
    """Yield documents whose tokens name the shard and the document; shards from 90 are empty."""
    for shard in shards:
        for i in range(30 if shard < 90 else 0):
            if log:
                with log.open("a") as file:
                    file.write(".")
            yield {"input_ids": np.array([EOS, *[1 + shard * 100 + i] * (1 + i % 4)])}


def stream(num_shards: int = 4, *, seed: int | None = 7, shards=None, log=None) -> PackedStream:
    given = {"shards": shards or list(range(num_shards)), "log": log}
    tokens = IterableDataset.from_generator(documents_of, gen_kwargs=given)
    return PackedStream(tokens, context_length=LENGTH, eos_token_id=EOS, seed=seed)


def batches_of(packed: PackedStream, count: int, num_workers: int = 0) -> list:
    def collate(rows):
        return [row["input_ids"].tolist() for row in rows]

    loader = DataLoader(packed, batch_size=BATCH, num_workers=num_workers, collate_fn=collate)
    return [batch for _, batch in zip(range(count), loader, strict=False)]


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr(streams, "_SHUFFLE_BUFFER", 16)


@pytest.mark.parametrize("seed", [None, 7])
def test_workers_without_shards_yield_nothing_and_change_nothing(seed):
    count = 1000 if seed is None else 60
    [two, five] = (batches_of(stream(2, seed=seed), count, workers) for workers in (2, 5))
    assert two == five and len(two) > 10
    # Only at the end of a stream that ends can a block be short: at most one for each reader.
    short = [block for batch in two for block in batch if len(block) < LENGTH]
    assert len(short) <= (2 if seed is None else 0) and all(len(block) > 1 for block in short)


def test_a_reader_without_documents_yields_nothing():
    packed = stream(shards=[0, 90])
    assert batches_of(packed, 40, 2) == batches_of(stream(1), 40)
    state = packed.state_dict(batches=40, batch_size=BATCH, num_workers=2)
    assert "places" not in state  # it cannot be resumed in place
    with pytest.raises(ValueError, match="resume with dataloader_num_workers=2"):
        stream(shards=[0, 90]).load_state_dict(state, batch_size=BATCH)
    again = stream(shards=[0, 90])
    again.load_state_dict(state, batch_size=BATCH, num_workers=2)
    assert batches_of(again, 40, 2) == batches_of(stream(1), 40)
    assert not list(stream(shards=[90])) and not list(stream(shards=[90], seed=None))


def test_one_worker_reads_what_the_process_itself_reads():
    assert batches_of(stream(), 50, 0) == batches_of(stream(), 50, 1)


def test_each_pass_has_every_document_once_in_a_new_order():
    tokens = [i for batch in batches_of(stream(2), 200) for block in batch for i in block[1:]]
    kinds = [token for i, token in enumerate(tokens) if token != EOS and token != tokens[i - 1]]
    passes = kinds[:60], kinds[60:120]
    names = sorted(1 + shard * 100 + i for shard in range(2) for i in range(30))
    assert all(sorted(found) == names for found in passes)
    assert passes[0] != passes[1] != names
    assert (
        batches_of(stream(2), 20) == batches_of(stream(2), 20) != batches_of(stream(2, seed=8), 20)
    )


@pytest.mark.parametrize("done", [0, 1, 25, 58, 97])
def test_a_stream_resumes_at_any_batch(done, caplog):
    check_resuming(0, done, caplog)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 3, 6])
@pytest.mark.parametrize("done", [0, 1, 58, 97])
def test_a_stream_resumes_at_any_batch_with_workers(num_workers, done, caplog):
    check_resuming(num_workers, done, caplog)


def check_resuming(num_workers, done, caplog):
    whole, packed = batches_of(stream(), 130, num_workers), stream()
    assert batches_of(packed, done + 3, num_workers)[:done] == whole[:done]  # 3 read in advance
    given = {"batch_size": BATCH, "num_workers": num_workers}
    state = json.loads(json.dumps(packed.state_dict(batches=done, **given)))
    again = stream()
    with caplog.at_level(logging.WARNING, logger="datasets"):
        again.load_state_dict(state, **given)
        assert batches_of(again, 130 - done, num_workers) == whole[done:]
    assert not caplog.records
    # Once more, from the resumed stream; and from the start.
    state = again.state_dict(batches=120, **given)
    third = stream()
    third.load_state_dict(state, **given)
    assert batches_of(third, 10, num_workers) == whole[120:]
    third.load_state_dict(None, **given)
    assert batches_of(third, 10, num_workers) == whole[:10]


def test_a_resumed_stream_does_not_read_the_documents_of_former_shards(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    packed, again = stream(12, log=first), stream(12, log=second)
    whole = batches_of(packed, 55)
    state = packed.state_dict(batches=50, batch_size=BATCH)
    again.load_state_dict(state, batch_size=BATCH)
    assert batches_of(again, 5) == whole[50:]
    # `datasets` finds its place in a shard by reading it from its start; here it has 30 documents.
    assert len(second.read_text()) <= 30 + 2 * 16 and len(first.read_text()) > 100


def test_another_number_of_readers_is_refused():
    packed = stream()
    batches_of(packed, 9, 2)
    state = packed.state_dict(batches=8, batch_size=BATCH, num_workers=2)
    with pytest.raises(ValueError, match="resume with dataloader_num_workers=2"):
        stream().load_state_dict(state, batch_size=BATCH, num_workers=0)
    with pytest.raises(ValueError, match="resume with 2 as per_device_train_batch_size"):
        stream().load_state_dict(state, batch_size=4, num_workers=2)


def test_readers_in_several_processes_take_turns_as_the_workers_of_one():
    whole = batches_of(stream(7), 40, 3)
    parts = [batches_of(share(7, process, 3), 20) for process in range(3)]
    assert [batch for turn in zip(*parts, strict=True) for batch in turn][:40] == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"), [((2, 0), (2, 1)), ((2, 2), (4, 1)), ((2, 2), (1, 4))]
)
@pytest.mark.parametrize("done", [0, 3, 41])
def test_what_several_processes_read_resumes_in_any_of_the_same_readers(before, after, done):
    """`done` steps of `before` processes and workers, two batches each, then those of `after`."""
    steps, readers = 60, before[0] * max(1, before[1])
    whole = batches_of(stream(9), steps * 4, readers)
    processes, workers = before
    positions, total = [], done * 4
    for process in range(processes):
        packed = share(9, process, processes)
        batches = batches_of(packed, total // processes + 3, workers)  # 3 read in advance
        assert batches[: total // processes] == whole[process:total:processes]
        given = {"batch_size": BATCH, "num_workers": workers}
        positions.append(packed.state_dict(batches=total, **given))
    position = json.loads(json.dumps(streams.merge_positions(positions)))
    processes, workers = after
    for process in range(processes):
        packed = share(9, process, processes)
        packed.load_state_dict(position, batch_size=BATCH, num_workers=workers)
        expected = whole[total + process :: processes]
        assert batches_of(packed, len(expected), workers) == expected


def share(num_shards: int, process: int, processes: int, **settings) -> PackedStream:
    packed = stream(num_shards, **settings)
    packed.split(processes, process)
    return packed


def test_each_process_reads_the_documents_of_its_own_shards_only():
    found = []
    for process in range(2):
        blocks = [block for batch in batches_of(share(5, process, 2), 60) for block in batch]
        found.append({(token - 1) // 100 for block in blocks for token in block if token != EOS})
    assert found == [{0, 2, 4}, {1, 3}]


def test_processes_without_shards_or_documents_are_refused():
    with pytest.raises(UserError, match="has 2 for 3 processes: leave it out"):
        share(2, 0, 3)
    with pytest.raises(UserError, match="some of these have no documents"):
        list(share(2, 1, 2, shards=[0, 90]))


def test_other_processes_than_before_are_refused():
    position = share(4, 0, 2).state_dict(batches=0, batch_size=BATCH, num_workers=0)
    with pytest.raises(UserError, match=r"_num_workers=0 in 4 processes .* with 2 workers in all"):
        share(4, 0, 4).load_state_dict(position, batch_size=BATCH)
    one = stream(4).state_dict(batches=0, batch_size=BATCH)  # the first process read for all
    with pytest.raises(UserError, match=r"leave out dispatch_batches=False and set .*_workers=1\."):
        share(4, 0, 2).load_state_dict(one, batch_size=BATCH)
    with pytest.raises(UserError, match="resume with dataloader_num_workers=2"):
        stream(4).load_state_dict(position, batch_size=BATCH)


SIZE = {"n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 16, "num_threads": 1}


@pytest.fixture
def shards(tmp_path) -> str:
    for shard in range(3):
        texts = [f"{shard}: row {i} " + "of a stream " * (i % 5) for i in range(90)]
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"rows-{shard}.jsonl").write_text(rows, encoding="utf-8")
    return str(tmp_path / "rows-*.jsonl")


def history(folder: Path, step: int) -> list[dict]:
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    exact = ("step", "epoch", "loss", "grad_norm", "learning_rate", "eval_loss")
    return [{name: row[name] for name in exact if name in row} for row in state["log_history"]]


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_training_resumes_in_place_to_the_bit(num_workers, shards, tmp_path, monkeypatch):
    settings = SIZE | {
        "data": shards,
        "streaming": True,
        "tokenizer": "byte",
        "dropout": 0.2,  # random numbers must be restored too
        "max_steps": 12,
        "save_steps": 4,
        "eval_steps": 6,
        "logging_steps": 1,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "dataloader_num_workers": num_workers,
        "disable_tqdm": True,
        "sample_steps": 0,
    }
    whole, folder = tmp_path / "whole", tmp_path / "run"
    train(output_dir=str(whole), **settings)
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoint-12")  # as if it had been killed after step 8
    monkeypatch.setattr("transformers.trainer.skip_first_batches", None)  # nothing is skipped
    train(output_dir=str(folder), resume=True, **settings)
    assert history(folder, 12) == history(whole, 12) and len(history(folder, 12)) >= 14
    files = [path / "checkpoint-12" / "model.safetensors" for path in (whole, folder)]
    assert files[0].read_bytes() == files[1].read_bytes()
    if num_workers:
        return
    with pytest.raises(ValueError, match="resume with dataloader_num_workers=1"):
        train(output_dir=str(folder), resume=True, **settings | {"dataloader_num_workers": 2})


@forked
@pytest.mark.slow
def test_processes_that_read_their_own_shards_resume_in_place_to_the_bit(
    shards, tmp_path, monkeypatch
):
    monkeypatch.undo()  # the processes know nothing of it
    settings = SIZE | {
        "data": shards,
        "streaming": True,
        "tokenizer": "byte",
        "max_steps": 8,
        "save_steps": 4,
        "eval_steps": 8,
        "logging_steps": 1,
        "per_device_train_batch_size": 3,
        "sample_steps": 0,
        "use_cpu": True,
    }
    whole, folder, one = tmp_path / "whole", tmp_path / "run", tmp_path / "one"
    flags = [f"--{name}={value}" for name, value in settings.items()]
    flags.append('--accelerator_config={"dispatch_batches": false}')
    for output_dir in (whole, folder):
        if output_dir == folder:
            shutil.copytree(whole, folder)
            shutil.rmtree(folder / "checkpoint-8")  # as if it had been killed after step 4
            shutil.copytree(folder, one)
        ranks = run_ranks(2, main, ["train", *flags, f"--output_dir={output_dir}", "--resume"])
        for done in ranks:
            assert done.returncode == 0, done.stderr[-3000:]
    position = read_record(folder / "checkpoint-4")["stream"]
    assert position["blocks"] == [12, 12] and all(position["places"])
    assert history(folder, 8) == history(whole, 8)
    files = [path / "checkpoint-8" / "model.safetensors" for path in (whole, folder)]
    assert files[0].read_bytes() == files[1].read_bytes()
    # One process with as many readers is the same run.
    shares = {"dataloader_num_workers": 2, "gradient_accumulation_steps": 2}
    train(output_dir=str(one), resume=True, **settings | shares)
    for ours, theirs in zip(history(one, 8), history(whole, 8), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    with pytest.raises(UserError, match="resume with dataloader_num_workers=2"):
        train(output_dir=str(one), resume=True, **settings | {"gradient_accumulation_steps": 2})
