"""Packed blocks: no token is lost or doubled, and documents do not see each other."""

import math
import pickle
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import TWO_SOON, tiny_model
from datasets import Dataset
from torch.utils.data import DataLoader, IterableDataset
from transformers import ByT5Tokenizer

from hf_nanogpt import PackedCollator, load_text, pack_documents, train_tokenizer
from hf_nanogpt.data.encoding import encode_unlearnt, is_learnt
from hf_nanogpt.data.packing import PackedBlocks, cut_blocks, tokenize_documents

ROWS = [f"Document {i}: naïve 東京 🦊,\r\nwith {'many ' * (i % 7)}words.\n" for i in range(60)]
TOKENIZER = train_tokenizer([], kind="byte")
EOS = TOKENIZER.eos_token_id


DOCUMENTS = ["first document", "", "naïve 東京 🦊\r\n", "<|endoftext|>", "x", "the last one " * 9]


def stream_of(rows: list[str]) -> list[int]:
    """What packed blocks must spell: eos, document, eos ... eos, each document in bytes."""
    ids = [TOKENIZER(row, split_special_tokens=True)["input_ids"] for row in rows]
    assert [len(i) for i in ids] == [len(row.encode()) for row in rows]
    return [EOS, *(token for row in ids for token in (*row, EOS))]


def blocks_of(documents, context_length: int, **settings) -> list[list[int]]:
    blocks = pack_documents(documents, TOKENIZER, context_length=context_length, **settings)
    return [[int(i) for i in row["input_ids"]] for row in blocks]


@pytest.mark.parametrize("length", [2, 3, 7, 64, 500])
@pytest.mark.parametrize("rows", [DOCUMENTS, ROWS, ["a"]], ids=["few", "many", "one"])
def test_no_token_is_lost_or_doubled(length, rows):
    stream = stream_of(rows)
    blocks = blocks_of(Dataset.from_dict({"text": rows}), length)
    assert blocks[0] + [i for block in blocks[1:] for i in block[1:]] == stream
    assert len(blocks) == math.ceil((len(stream) - 1) / (length - 1))
    assert all(len(block) == length for block in blocks[:-1]) and 2 <= len(blocks[-1]) <= length
    assert all(a[-1] == b[0] for a, b in pairwise(blocks))


def cut(seed: int | None = 7, length: int = 32) -> PackedBlocks:
    documents = Dataset.from_dict({"text": ROWS})
    tokens = tokenize_documents(documents, TOKENIZER)
    return cut_blocks(tokens, context_length=length, eos_token_id=EOS, seed=seed)


def rows_of(blocks: PackedBlocks) -> list[list[int]]:
    return [row["input_ids"].tolist() for row in blocks]


@pytest.mark.parametrize("length", [2, 32, 33, 5000, 100_000])
def test_each_pass_predicts_each_token_once_from_other_beginnings(length):
    blocks, fixed = cut(length=length), rows_of(cut(None, length))
    pairs = Counter(pair for row in fixed for pair in pairwise(row))
    assert rows_of(blocks) == fixed  # a single pass is as without a seed
    seen = [fixed]
    for epoch in (1, 2):
        blocks.set_epoch(epoch)
        seen.append(rows_of(blocks))
        assert len(seen[-1]) == len(blocks) == len(fixed)
        assert max(map(len, seen[-1])) <= length
        assert Counter(pair for row in seen[-1] for pair in pairwise(row)) == pairs
    assert length == 2 or (seen[0] != seen[1] != seen[2] != seen[0])
    again, other = cut(7, length), cut(8, length)
    again.set_epoch(2), other.set_epoch(2)
    assert rows_of(again) == seen[2] != rows_of(other)
    blocks.set_epoch(0)
    assert rows_of(blocks) == fixed


def test_processes_that_outlive_an_epoch_cut_at_the_places_of_the_next_one():
    blocks = cut()
    loader = DataLoader(blocks, batch_size=None, num_workers=1, persistent_workers=True)
    for epoch in (0, 1, 2):
        blocks.set_epoch(epoch)
        assert rows_of(loader) == rows_of(blocks)
    assert rows_of(pickle.loads(pickle.dumps(blocks))) == rows_of(blocks)


def test_a_stream_packs_to_the_same_blocks():
    documents = Dataset.from_dict({"text": ROWS})
    stream = documents.to_iterable_dataset(num_shards=1)
    packed = pack_documents(stream, TOKENIZER, context_length=32)
    assert isinstance(packed, IterableDataset)
    assert blocks_of(stream, 32) == blocks_of(documents, 32)


def test_two_processes_pack_the_same_blocks_as_one():
    # The number makes another entry of the cache: the second call must not be served from it.
    alone, both = (Dataset.from_dict({"text": ROWS, "id": [i] * len(ROWS)}) for i in (1, 2))
    assert blocks_of(alone, 32) == blocks_of(both, 32, num_proc=2)


def test_tokens_are_mapped_from_disk_and_made_only_once_for_all_lengths(tmp_path):
    (tmp_path / "a.txt").write_text("".join(ROWS), encoding="utf-8")
    documents = load_text(str(tmp_path / "a.txt"))
    first, other = (pack_documents(documents, TOKENIZER, context_length=n) for n in (48, 49))
    [files, again] = (blocks.open_pieces.args[0].cache_files for blocks in (first, other))
    assert files and files == again
    assert first[0]["input_ids"].dtype == "uint16"
    assert not first[0]["input_ids"].flags.owndata  # a view of the file, not a copy


def test_a_tokenizer_written_in_python_packs_too():
    tokenizer = ByT5Tokenizer()
    documents = Dataset.from_dict({"text": ["abc", "de"]})
    [row] = pack_documents(documents, tokenizer, context_length=32)
    letters = tokenizer.convert_tokens_to_ids(list("abcde"))
    eos = tokenizer.eos_token_id
    assert row["input_ids"].tolist() == [eos, *letters[:3], eos, *letters[3:], eos]


def test_tokens_that_are_not_learnt_keep_their_ids_and_have_no_label():
    ids = np.array([0, 7, 65000], dtype=np.int32)
    marked = encode_unlearnt(ids)
    assert marked.dtype == ids.dtype and not is_learnt(marked).any() and is_learnt(ids).all()
    assert (encode_unlearnt(marked) == marked).all()
    mixed = np.concatenate((marked, ids))
    batch = PackedCollator(None)([{"input_ids": mixed}])
    assert batch["input_ids"].tolist() == [[*ids, *ids]]
    assert batch["labels"].tolist() == [[-100] * 3 + ids.tolist()]


def test_the_collator_pads_the_last_block_and_restarts_positions():
    blocks = pack_documents(Dataset.from_dict({"text": DOCUMENTS}), TOKENIZER, context_length=50)
    rows = list(blocks)
    batch = PackedCollator(EOS)(rows)
    assert {t.dtype for t in batch.values()} == {torch.int64}
    assert len(rows[-1]["input_ids"]) < 50
    for i, row in enumerate(rows):
        ids, count = row["input_ids"].tolist(), len(row["input_ids"])
        assert batch["input_ids"][i].tolist() == ids + [EOS] * (50 - count)
        assert batch["labels"][i].tolist() == ids + [-100] * (50 - count)
        position, positions = -1, []
        for token in ids:
            position = 0 if token == EOS else position + 1
            positions.append(position)
        assert batch["position_ids"][i].tolist() == positions + [0] * (50 - count)


@pytest.mark.parametrize("settings", [{}, {"use_cache": True}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("family", TWO_SOON)
def test_packed_documents_do_not_see_each_other(family, settings):
    model = tiny_model(family, vocab_size=len(TOKENIZER))
    blocks = pack_documents(Dataset.from_dict({"text": DOCUMENTS}), TOKENIZER, context_length=30)
    loader = DataLoader(blocks, batch_size=3, collate_fn=PackedCollator(EOS))
    with torch.no_grad():
        for batch in loader:
            del batch["labels"]
            logits = model(**batch, **settings).logits
            for row, ids in enumerate(batch["input_ids"]):
                starts = [0, *(i for i in range(1, len(ids)) if ids[i] == EOS), len(ids)]
                for start, end in pairwise(starts):
                    alone = model(ids[None, start:end]).logits[0]
                    torch.testing.assert_close(logits[row, start:end], alone, atol=2e-5, rtol=1e-4)
