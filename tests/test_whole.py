"""Conversations stay whole in their blocks, each token is learnt once, and streams resume."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader

from hf_nanogpt import PackedCollator, add_chat_template, pack_documents, train_tokenizer
from hf_nanogpt.data import streams, whole
from hf_nanogpt.data.packing import cut_blocks
from hf_nanogpt.data.whole import Conversations, fit_rows

EOS = 0
TOKENIZER = train_tokenizer([], kind="byte")
add_chat_template(TOKENIZER)


def conversation(length: int) -> list[dict]:
    """Return a conversation of so many tokens by `TOKENIZER`, with the eos in front."""
    chat = [{"role": role, "content": "x"} for role in ("user", "assistant")]
    frame = len(TOKENIZER.apply_chat_template(chat)["input_ids"]) - 1
    chat[1]["content"] = "".join(chr(ord("a") + i % 26) for i in range(length - frame))
    assert len(TOKENIZER.apply_chat_template(chat)["input_ids"]) == length
    return chat


def learnt_without_their_beginning(batch) -> float:
    """Return the share of the learnt tokens in blocks that lack the start of the conversation."""
    starts = (batch["input_ids"] == EOS).cummax(dim=1).values
    learnt = batch["labels"] >= 0
    learnt[:, 0] = False
    return ((learnt & ~starts).sum() / learnt.sum()).item()


def batch_of(chats, context_length: int):
    documents = Dataset.from_dict({"messages": chats})
    rows = pack_documents(documents, TOKENIZER, context_length=context_length)
    return PackedCollator(EOS)(list(iter(rows)))


@pytest.mark.parametrize("context_length", [128, 256, 512])
def test_no_answer_is_learnt_without_the_beginning_of_its_conversation(context_length):
    chats = [conversation(85)] * 40
    batch = batch_of(chats, context_length)
    assert learnt_without_their_beginning(batch) == 0
    answers = sum(len(chat[1]["content"]) + 1 for chat in chats)  # and the end of each
    assert (batch["labels"][:, 1:] >= 0).sum() == answers
    assert len(batch["labels"]) == -(-40 // ((context_length - 1) // 85))
    # Cut anywhere, as a text is, many lack it.
    ids = torch.cat([batch["input_ids"][:, :-1].flatten()])
    ids = ids[(ids != EOS) | (ids.roll(-1) != EOS)]
    anywhere = ids[: len(ids) // context_length * context_length].view(-1, context_length)
    assert not (anywhere[:, 0] == EOS).all()


def test_the_blocks_say_how_many_of_their_tokens_only_fill_them():
    for lengths, context_length in (([50, 60, 70], 128), ([127], 128), ([200, 46], 256)):
        documents = Dataset.from_dict({"messages": [conversation(n) for n in lengths]})
        blocks = pack_documents(documents, TOKENIZER, context_length=context_length)
        # With an eos in front of each, and one at the end of all.
        assert blocks.num_tokens - blocks.num_padding == sum(lengths) + 1
        assert (blocks.num_tokens - 1) % (context_length - 1) == 0
    texts = Dataset.from_dict({"text": ["a text"]})
    assert pack_documents(texts, TOKENIZER, context_length=4).num_padding == 0


def test_conversations_of_all_lengths_stay_whole_and_longer_ones_take_several_blocks():
    lengths = [46 + 7 * i % 150 for i in range(150)]
    chats = [conversation(length) for length in lengths]
    batch = batch_of(chats, 128)
    long = sum(length > 127 for length in lengths)
    assert 0 < long < len(lengths)
    whole_ones = {TOKENIZER.apply_chat_template(c, tokenize=False)[13:] for c in chats}
    found = set()
    for row in batch["input_ids"][:, :-1]:
        found |= set(TOKENIZER.decode(row).split("<|endoftext|>"))
    short = {text for text in whole_ones if len(TOKENIZER(text)["input_ids"]) < 127}
    assert short <= found
    answers = sum(len(chat[1]["content"]) + 1 for chat in chats)
    assert (batch["labels"][:, 1:] >= 0).sum() == answers


def test_filled_blocks_waste_little_and_exceed_nothing():
    lengths = np.random.default_rng(0).lognormal(5, 0.6, 1000).astype(int).tolist()  # mean 178
    for size in (511, 1023, 2047):
        rows = fit_rows(lengths, size)
        assert sorted(i for row in rows for i in row) == list(range(1000))
        used = [sum(lengths[i] for i in row) for row in rows]
        blocks = sum(-(-total // size) for total in used)
        assert blocks * size < 1.02 * sum(lengths)
        long = sum(length > size for length in lengths)
        assert sum(total > size for total in used) <= long


def chats_of(shards: list[int]):
    for shard in shards:
        for i in range(40):
            name = 1 + shard * 100 + i
            yield {"input_ids": np.array([~EOS, *[name] * (1 + i % 9)], dtype=np.int32)}


def stream(seed: int | None, num_shards: int = 3):
    shards = {"shards": list(range(num_shards))}
    rows = IterableDataset.from_generator(chats_of, gen_kwargs=shards)
    settings = {"context_length": 9, "eos_token_id": EOS, "seed": seed}
    return cut_blocks(Conversations(rows, EOS), **settings)


def batches_of(packed, count: int, num_workers: int = 0) -> list:
    def collate(rows):
        return [row["input_ids"].tolist() for row in rows]

    loader = DataLoader(packed, batch_size=2, num_workers=num_workers, collate_fn=collate)
    return [batch for _, batch in zip(range(count), loader, strict=False)]


@pytest.fixture
def small_groups(monkeypatch):
    monkeypatch.setattr(streams, "_SHUFFLE_BUFFER", 7)
    monkeypatch.setattr(whole, "_GROUP", 16)


def test_a_stream_keeps_conversations_whole_and_has_each_once_in_a_pass(small_groups):
    blocks = [row["input_ids"] for row in stream(None)]
    tokens = [int(t) for block in blocks for t in block[1:] if t > EOS]
    names = [1 + shard * 100 + i for shard in range(3) for i in range(40)]
    assert sorted(tokens) == sorted(n for n in names for _ in range(1 + (n - 1) % 100 % 9))
    again = [row for batch in batches_of(stream(7), 2000) for row in batch]
    for block in [*blocks, *again]:
        runs = np.split(block[:-1], np.flatnonzero(np.asarray(block[:-1]) == ~EOS))
        for run in runs:
            if len(run) > 1 and (length := 1 + (run[1] - 1) % 100 % 9) < 8:
                assert len(run) == length + 1


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("done", [1, 25, 97])
def test_a_stream_of_conversations_resumes_at_any_batch(done, num_workers, small_groups):
    given = {"batch_size": 2, "num_workers": num_workers}
    expected, packed = batches_of(stream(7), 150, num_workers), stream(7)
    assert batches_of(packed, done + 3, num_workers)[:done] == expected[:done]
    state = json.loads(json.dumps(packed.state_dict(batches=done, **given)))
    again = stream(7)
    again.load_state_dict(state, **given)
    assert batches_of(again, 150 - done, num_workers) == expected[done:]
