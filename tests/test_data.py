"""From text to batches: which text is trained on, which is held out, and that no token is lost."""

import json
import math
import os
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from dataset_server import call_with_hub, serve_datasets
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers import ByT5Tokenizer

from hf_nanogpt import (
    DataArguments,
    PackedCollator,
    data,
    load_documents,
    load_text,
    pack_documents,
    train_tokenizer,
)
from hf_nanogpt.data import load_tokenizer

ROWS = [f"Document {i}: naïve 東京 🦊,\r\nwith {'many ' * (i % 7)}words.\n" for i in range(60)]
TOKENIZER = train_tokenizer([], kind="byte")
EOS = TOKENIZER.eos_token_id


def load(source, **settings):
    return load_documents(DataArguments(data=str(source), **settings))


def texts(documents) -> list[str]:
    return [row["text"] for row in documents]


def write_files(folder: Path, contents: dict[str, str | bytes]) -> Path:
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def write_table(path: Path, rows: list[str], column: str = "text") -> Path:
    table = Dataset.from_dict({"id": range(len(rows)), column: rows})
    write = {".csv": table.to_csv, ".parquet": table.to_parquet}.get(path.suffix, table.to_json)
    write(path)
    return path


# Text files


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_of_one_file_exactly_the_tail_is_held_out(tmp_path, fraction):
    text = "\ufeff" + "".join(ROWS) + "no newline at the end"
    train, held_out = load(
        write_files(tmp_path, {"a.txt": text}) / "a.txt", validation_fraction=fraction
    )
    cut = math.floor(len(text) * (1 - fraction))
    assert (texts(train), texts(held_out)) == ([text[:cut]], [text[cut:]])


def test_a_file_longer_than_one_piece_is_still_one_document(tmp_path, monkeypatch):
    text = "".join(ROWS) + "\r" * 50 + "no newline at the end"
    write_files(tmp_path, {"whole.txt": text, "pieces.txt": text})
    whole = load(tmp_path / "whole.txt")
    monkeypatch.setattr(data, "_PIECE", 97)
    pieces = load(tmp_path / "pieces.txt")
    for one, many in zip(whole, pieces, strict=True):
        assert len(many) > len(one) == 1
        assert "".join(texts(many)) == texts(one)[0]
        assert [row["starts"] for row in many] == [True] + [False] * (len(many) - 1)
        assert blocks_of(many, 32) == blocks_of(one, 32)


def test_a_folder_is_read_without_its_hidden_empty_and_binary_files(tmp_path):
    documents = {f"part{i % 3}/deep/{i}.txt": row for i, row in enumerate(ROWS)}
    others = {".git/x.txt": "hidden", "a/.x.txt": "hidden", "empty.txt": "", "b.png": b"\x89PNG\0"}
    source = write_files(tmp_path, documents | others)
    assert sorted(texts(load_text(str(source)))) == sorted(ROWS)


def test_documents_are_held_out_by_their_text_whatever_their_order(tmp_path):
    forwards = {f"{i:03}.txt": row for i, row in enumerate(ROWS)}
    backwards = {f"{i:03}.txt": row for i, row in enumerate(reversed(ROWS))}
    sides = load(write_files(tmp_path / "a", forwards))
    again = load(write_files(tmp_path / "b", backwards))
    table = load(write_table(tmp_path / "c.parquet", ROWS))
    train, held_out = (set(texts(side)) for side in sides)
    assert held_out and train | held_out == set(ROWS) and not train & held_out
    for other in (again, table):
        assert tuple(set(texts(side)) for side in other) == (train, held_out)


def test_each_of_few_files_gives_its_tail(tmp_path):
    source = write_files(tmp_path, {"a.txt": "0123456789", "b.txt": "abcdefghijklmnopqrst"})
    train, held_out = load(source, validation_fraction=0.2)
    assert texts(train) == ["01234567", "abcdefghijklmnop"]
    assert texts(held_out) == ["89", "qrst"]
    assert all(row["starts"] for side in (train, held_out) for row in side)


def test_a_glob_selects_files(tmp_path):
    source = write_files(tmp_path, {"a/1.md": "one", "a/b/2.md": "two", "a/3.txt": "three"})
    assert texts(load_text(str(source / "a/*.md"))) == ["one"]
    assert sorted(texts(load_text(str(source / "**/*.md")))) == ["one", "two"]


def test_the_standard_library_is_a_corpus_without_its_tests():
    found = set(texts(load_text("python-stdlib")))
    library = Path(json.__file__).parent.parent
    assert len(found) > 300
    assert library.joinpath("json/decoder.py").read_bytes().decode() in found
    assert not any("import unittest\nclass Test" in text for text in found)
    assert not any(p.read_text(errors="replace") in found for p in library.glob("test/test_*.py"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_changed_file_is_read_anew(tmp_path, name):
    source, seen = tmp_path / name, []
    for letter in "xy":
        text = letter * 50
        source.write_text(json.dumps({"text": text}) if name == "a.jsonl" else text)
        os.utime(source, ns=(0, 10**18 + ord(letter)))
        seen += texts(load_text(str(source)))
    assert seen == ["x" * 50, "y" * 50]


def test_validation_data_is_taken_whole_and_holds_nothing_out(tmp_path):
    source = write_files(tmp_path, {"a.txt": ROWS[0], "b.txt": ROWS[1]})
    train, held_out = load(source / "a.txt", validation_data=str(source / "b.txt"))
    assert (texts(train), texts(held_out)) == (ROWS[:1], ROWS[1:2])


# Tables and the Hub


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("column", ["text", "body"])
def test_tables_give_the_rows_of_their_text_column(tmp_path, suffix, column):
    source = write_table(tmp_path / f"t.{suffix}", ["first", "", *ROWS[:10]], column)
    train, held_out = load(source, text_column=column)
    assert train.column_names == held_out.column_names == ["text"]
    assert texts(train) + texts(held_out) == ["first", *ROWS[:10]]  # the empty row is left out
    assert len(held_out) == math.ceil(11 * 0.1)


def test_a_stream_gives_the_same_documents(tmp_path):
    source = write_table(tmp_path / "t.jsonl", ROWS)
    train, held_out = load(source, streaming=True)
    assert isinstance(train, IterableDataset)
    assert [texts(train), texts(held_out)] == [texts(side) for side in load(source)]
    assert len(load(source, streaming=True, validation_documents=2)[1]) == 2


# Run with a Hub of our own, in a fresh process: the client reads HF_ENDPOINT when imported.
HUB_SCRIPT = """
import json, sys
from hf_nanogpt import DataArguments, load_documents
for settings in json.loads(sys.argv[1]):
    try:
        sides = load_documents(DataArguments(**settings))
        kind = type(sides[0]).__name__
        print(json.dumps([kind, *([row["text"] for row in side] for side in sides)]))
    except ValueError as error:
        print(json.dumps(["ValueError", str(error)]))
"""
HUB_CASES = {
    "whole": {"data": "user/corpus"},
    "stream": {"data": "user/corpus", "streaming": True},
    "config": {"data": "user/corpus", "dataset_config": "other", "text_column": "body"},
    "split": {"data": "user/corpus", "dataset_split": "test"},
    "dotted": {"data": "user/corpus-1.0"},
    "no config": {"data": "user/corpus", "dataset_config": "nope"},
    "no split": {"data": "user/corpus", "dataset_split": "nope"},
    "no dataset": {"data": "user/nope"},
}
CARD = """---
configs:
- config_name: main
  default: true
  data_files: [{split: train, path: a.jsonl}, {split: test, path: b.jsonl}]
- config_name: other
  data_files: c/*.parquet
---
"""


@pytest.fixture(scope="module")
def hub_answers(tmp_path_factory) -> dict[str, list]:
    """What `load_documents` gave for each of `HUB_CASES`: kind, training and validation texts."""
    folder = tmp_path_factory.mktemp("hub")
    rows = write_table(folder / "rows.jsonl", ROWS).read_bytes()
    test = write_table(folder / "test.jsonl", ["left", "right"]).read_bytes()
    other = write_table(folder / "other.parquet", ["up", "down"], "body").read_bytes()
    files = {"README.md": CARD.encode(), "a.jsonl": rows, "b.jsonl": test, "c/0.parquet": other}
    datasets = {"user/corpus": files, "user/corpus-1.0": {"data.jsonl": rows}}
    with serve_datasets(datasets) as hub:
        cases = json.dumps(list(HUB_CASES.values()))
        output = call_with_hub(hub, HUB_SCRIPT, cases, home=folder)
    return dict(zip(HUB_CASES, map(json.loads, output.splitlines()), strict=True))


def test_a_hub_dataset_gives_the_same_documents_as_its_file(hub_answers, tmp_path):
    expected = [texts(side) for side in load(write_table(tmp_path / "t.jsonl", ROWS))]
    assert hub_answers["whole"] == ["Dataset", *expected]
    assert hub_answers["stream"] == ["IterableDataset", *expected]


def test_a_hub_dataset_has_configurations_and_splits(hub_answers):
    assert hub_answers["config"] == ["Dataset", ["up"], ["down"]]
    assert hub_answers["split"] == ["Dataset", ["left"], ["right"]]


def test_a_hub_id_may_have_a_dot(hub_answers):
    assert hub_answers["dotted"] == hub_answers["whole"]


@pytest.mark.parametrize("case", ["no config", "no split", "no dataset"])
def test_what_the_hub_does_not_have_is_refused(hub_answers, case):
    kind, message = hub_answers[case]
    assert kind == "ValueError"
    assert HUB_CASES[case]["data"] in message
    assert "nope" in message


# Bad input

BAD_FILES = {
    "empty.txt": "",
    "blank.txt": " \n\n",
    "one byte.txt": "a",
    "binary.txt": bytes(range(256)),
    "late.txt": b"text " * 5000 + b"\xff\xfe",
    "empty.jsonl": "",
    "cut.jsonl": '{"text": "a"}\n{"text": ',
    "prose.jsonl": "no table",
    "cut.parquet": b"PAR1 and then nothing",
    "cut.csv": 'text,n\n"a,1\n',
    "one row.jsonl": '{"text": "a"}\n',
    "numbers.jsonl": "".join(f'{{"text": {i}}}\n' for i in range(3)),
    "many numbers.jsonl": "".join(f'{{"text": {i}}}\n' for i in range(30)),
    "lists.jsonl": '{"text": ["a", "b"]}\n' * 3,
    "mixed/a.txt": "text",
    "mixed/b.jsonl": '{"text": "a"}\n',
    "none/b.png": b"\x89PNG\0",
}


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    "name", [n for n in BAD_FILES if "/" not in n] + ["mixed", "none", "missing.txt", "*.nothing"]
)
def test_bad_data_is_refused_with_its_name(tmp_path, name, streaming):
    source = write_files(tmp_path, BAD_FILES) / name
    with pytest.raises(ValueError, match="(data|text_column)=.") as caught:
        load(source, streaming=streaming)
    assert str(source) in str(caught.value)
    assert not str(caught.value).rstrip().endswith(":")  # a reason follows


@pytest.mark.parametrize("side", ["data", "validation_data"])
@pytest.mark.parametrize("name", ["user/corpus", "wikitext", "/no/such/folder"])
def test_a_hub_id_while_offline_is_refused_at_once(name, side):
    started = time.perf_counter()
    with pytest.raises(ValueError, match=rf"data='?{name}'? (is|was) no"):
        load(**{"source": "python-stdlib", side: name} if side != "data" else {"source": name})
    assert time.perf_counter() - started < 5


def test_a_wrong_text_column_is_answered_with_the_columns(tmp_path):
    source = write_table(tmp_path / "t.csv", ROWS, "body")
    with pytest.raises(ValueError, match="text_column='text' is not in .*: id, body"):
        load(source)


@pytest.mark.parametrize("fraction", [0, 1, 1.5, -0.1, math.nan])
def test_an_impossible_validation_fraction_is_refused(fraction):
    with pytest.raises(ValueError, match=f"validation_fraction={fraction} must be between 0 and 1"):
        DataArguments(validation_fraction=fraction)


@pytest.mark.parametrize("files", [1, 3, 25])
def test_a_fraction_too_small_to_hold_anything_out_is_refused(tmp_path, files):
    source = write_files(tmp_path, {f"{i}.txt": f"text {i}" for i in range(files)})
    for fraction in (1e-9, 1 - 1e-9):
        with pytest.raises(ValueError, match=f"data={source} .*validation_fraction={fraction}"):
            load(source, validation_fraction=fraction)


@pytest.mark.parametrize("name", ["bpee", "gpt2", "user/tokenizer", "./here"])
def test_an_unknown_tokenizer_is_refused(name):
    with pytest.raises(ValueError, match=f"tokenizer='{name}' .*bpe, char, byte"):
        load_tokenizer(DataArguments(tokenizer=name), [])


# Packing

DOCUMENTS = ["first document", "", "naïve 東京 🦊\r\n", "<|endoftext|>", "x", "the last one " * 9]


def stream_of(rows: list[str]) -> list[int]:
    """What packed blocks must spell: eos, document, eos ... eos, of the bytes of each document."""
    byte_ids = {chr(c): TOKENIZER(chr(c))["input_ids"][0] for c in range(128)}
    assert byte_ids["a"] != EOS
    ids = [TOKENIZER(row, split_special_tokens=True)["input_ids"] for row in rows]
    assert [len(i) for i in ids] == [len(row.encode()) for row in rows]
    return [EOS] + [token for row in ids for token in [*row, EOS]]


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
    assert all(a[-1] == b[0] for a, b in zip(blocks, blocks[1:], strict=False))


def test_a_stream_packs_to_the_same_blocks():
    documents = Dataset.from_dict({"text": ROWS})
    stream = documents.to_iterable_dataset(num_shards=1)
    packed = pack_documents(stream, TOKENIZER, context_length=32)
    assert isinstance(packed, IterableDataset)
    assert blocks_of(stream, 32) == blocks_of(documents, 32)


def test_two_processes_pack_the_same_blocks_as_one():
    other_cache = Dataset.from_dict({"text": ROWS, "id": range(len(ROWS))})
    expected = blocks_of(Dataset.from_dict({"text": ROWS}), 32)
    assert blocks_of(other_cache, 32, num_proc=2) == expected


def test_blocks_are_mapped_from_disk_and_packed_only_once():
    documents = Dataset.from_dict({"text": ROWS})
    first, again = (pack_documents(documents, TOKENIZER, context_length=48) for _ in range(2))
    assert first.cache_files and first.cache_files == again.cache_files
    assert first.features["input_ids"].feature.dtype == "uint16"
    other = pack_documents(documents, TOKENIZER, context_length=49)
    assert other.cache_files != first.cache_files


def test_a_tokenizer_written_in_python_packs_too():
    tokenizer = ByT5Tokenizer()
    documents = Dataset.from_dict({"text": ["abc", "de"]})
    [row] = pack_documents(documents, tokenizer, context_length=32)
    eos = tokenizer.eos_token_id
    letter = {c: tokenizer.convert_tokens_to_ids(c) for c in "abcde"}
    assert row["input_ids"].tolist() == [
        eos,
        *(letter[c] for c in "abc"),
        eos,
        *(letter[c] for c in "de"),
        eos,
    ]


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


def test_packed_documents_do_not_see_each_other(family):
    model = tiny_model(family, vocab_size=len(TOKENIZER))
    blocks = pack_documents(Dataset.from_dict({"text": DOCUMENTS}), TOKENIZER, context_length=30)
    loader = DataLoader(blocks, batch_size=3, collate_fn=PackedCollator(EOS))
    with torch.no_grad():
        for batch in loader:
            del batch["labels"]
            logits = model(**batch, use_cache=False).logits
            for row, ids in enumerate(batch["input_ids"]):
                starts = [0, *(i for i in range(1, len(ids)) if ids[i] == EOS), len(ids)]
                for start, end in zip(starts, starts[1:], strict=False):
                    alone = model(ids[None, start:end]).logits[0]
                    torch.testing.assert_close(logits[row, start:end], alone, atol=2e-5, rtol=1e-4)
