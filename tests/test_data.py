"""Sources of text: what is read, which documents are held out, and what is refused."""

import codecs
import json
import math
import os
from collections import Counter
from pathlib import Path

import pytest
from conftest import _HUB
from dataset_server import COMMIT, call_with_hub, serve_datasets
from datasets import Dataset, IterableDataset

from hf_nanogpt import (
    DataArguments,
    load_documents,
    load_text,
    pack_documents,
    train_tokenizer,
)
from hf_nanogpt.data import documents as documents_module
from hf_nanogpt.data.sources import find_files
from hf_nanogpt.data.tokenization import load_tokenizer

# The process that asks a Hub is started once.
pytestmark = pytest.mark.xdist_group("data")
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
    text = text.removeprefix("\ufeff")  # a byte-order mark is not part of the text
    cut = math.floor(len(text) * (1 - fraction))
    assert (texts(train), texts(held_out)) == ([text[:cut]], [text[cut:]])


def test_a_file_longer_than_one_piece_is_still_one_document(tmp_path, monkeypatch):
    text = "".join(ROWS) + "\r" * 50 + "no newline at the end"
    write_files(tmp_path, {"whole.txt": text, "pieces.txt": text})
    whole = load(tmp_path / "whole.txt")
    monkeypatch.setattr(documents_module, "_PIECE", 97)
    pieces = load(tmp_path / "pieces.txt")
    for one, many in zip(whole, pieces, strict=True):
        assert len(many) > len(one) == 1
        assert "".join(texts(many)) == texts(one)[0]
        assert [row["starts"] for row in many] == [True] + [False] * (len(many) - 1)
        packed = [pack_documents(side, TOKENIZER, context_length=32) for side in (one, many)]
        rows = zip(*packed, strict=True)
        assert all((a["input_ids"] == b["input_ids"]).all() for a, b in rows)


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
    tests = [p.read_bytes().decode("utf-8", "replace") for p in library.glob("test/test_*.py")]
    assert not found & set(tests)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_changed_file_is_read_anew(tmp_path, name):
    source, seen = tmp_path / name, []
    for letter in "xy":
        text = letter * 50
        source.write_text(json.dumps({"text": text}) if name == "a.jsonl" else text)
        os.utime(source, ns=(0, (10**9 + ord(letter)) * 10**9))
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


def test_a_stream_trains_on_all_documents_that_it_does_not_validate_on(tmp_path):
    rows = [f"document {i % 900}" for i in range(1000)]  # some of them twice
    source = write_table(tmp_path / "t.jsonl", rows)
    train, held_out = load(source, streaming=True, validation_documents=20)
    assert len(held_out) == 20 and len(load(source)[1]) > 60
    assert Counter(texts(train)) == Counter(row for row in rows if row not in texts(held_out))


# Run with a Hub of our own, in a fresh process: the client reads HF_ENDPOINT when imported.
HUB_SCRIPT = """
import json, sys
from hf_nanogpt import DataArguments, load_documents, load_text
for settings in json.loads(sys.argv[1]):
    try:
        sides = load_documents(DataArguments(**settings))
        texts = ([row["text"] for row in side] for side in sides)
        print(json.dumps([type(sides[0]).__name__, *texts]))
    except ValueError as error:
        print(json.dumps([type(error).__name__, str(error)]))
url = sys.argv[2]
print(json.dumps("".join(row["text"] for row in load_text(url))))
try:
    load_text(url + "x")
except ValueError as error:
    print(json.dumps(str(error)))
"""
HUB_CASES = {
    "whole": {"data": "user/corpus"},
    "stream": {"data": "user/corpus", "streaming": True},
    "config": {"data": "user/corpus", "dataset_config": "other", "text_column": "body"},
    "split": {"data": "user/corpus", "dataset_split": "test"},
    "parquet": {"data": "user/tables"},
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
  data_files: c/*.jsonl
---
"""


@pytest.fixture(scope="module")
def hub_answers(tmp_path_factory) -> dict[str, list]:
    """What `load_documents` gave for each of `HUB_CASES`: class, training and validation texts.

    Then what `load_text` gave for the address of a text, and for one where there is none.
    """
    folder = tmp_path_factory.mktemp("hub")
    rows = write_table(folder / "rows.jsonl", ROWS).read_bytes()
    test = write_table(folder / "test.jsonl", ["left", "right"]).read_bytes()
    other = write_table(folder / "other.jsonl", ["up", "down"], "body").read_bytes()
    table = write_table(folder / "rows.parquet", ROWS).read_bytes()
    files = {"README.md": CARD.encode(), "a.jsonl": rows, "b.jsonl": test, "c/0.jsonl": other}
    datasets = {
        "user/corpus": files,
        "user/tables": {"data/train-00000.parquet": table},
        "user/corpus-1.0": {"data.jsonl": rows},
        "user/texts": {"plays.txt": "".join(ROWS).encode()},
    }
    with serve_datasets(datasets) as hub:
        cases = json.dumps(list(HUB_CASES.values()))
        url = f"{hub.url}/datasets/user/texts/resolve/main/plays.txt"
        output = call_with_hub(hub, HUB_SCRIPT, cases, url, home=folder)
    assert f"GET /datasets/user/corpus/resolve/{COMMIT}/a.jsonl" in hub.requests
    names = [*HUB_CASES, "address", "no address"]
    return dict(zip(names, map(json.loads, output.splitlines()), strict=True))


@pytest.mark.slow
def test_a_hub_dataset_gives_the_same_documents_as_its_file(hub_answers, tmp_path):
    expected = [texts(side) for side in load(write_table(tmp_path / "t.jsonl", ROWS))]
    assert hub_answers["whole"] == ["Dataset", *expected]
    assert hub_answers["parquet"] == ["Dataset", *expected]
    assert hub_answers["stream"] == ["IterableDataset", *expected]


@pytest.mark.slow
def test_a_hub_dataset_has_configurations_and_splits(hub_answers):
    assert hub_answers["config"] == ["Dataset", ["up"], ["down"]]
    assert hub_answers["split"] == ["Dataset", ["left"], ["right"]]


@pytest.mark.slow
def test_a_hub_id_may_have_a_dot(hub_answers):
    assert hub_answers["dotted"] == hub_answers["whole"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["no config", "no split", "no dataset"])
def test_what_the_hub_does_not_have_is_refused(hub_answers, case):
    error, message = hub_answers[case]
    assert error == "UserError"
    assert HUB_CASES[case]["data"] in message
    assert "nope" in message


@pytest.mark.slow
def test_a_text_on_the_web_is_read_like_a_file(hub_answers):
    assert hub_answers["address"] == "".join(ROWS)
    assert "could not be downloaded" in hub_answers["no address"]


# Bad input

BAD_FILES = {
    "empty.txt": "",
    "blank.txt": " \n\n",
    "one byte.txt": "a",
    "binary.txt": bytes(range(256)),
    "late.txt": b"text " * 5000 + b"\xff\xfe",
    "empty.jsonl": "",
    "cut.jsonl": '{"text": "a"}\n{"text": ',
    "prose.jsonl": "not a table",
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
BAD_SOURCES = [name for name in BAD_FILES if "/" not in name]
BAD_SOURCES += ["mixed", "none", "missing.txt", "*.nothing"]


BAD_CASES = [(name, False) for name in BAD_SOURCES]
BAD_CASES += [(name, True) for name in BAD_SOURCES if name.endswith((".jsonl", ".parquet", ".csv"))]


@pytest.mark.parametrize(("name", "streaming"), BAD_CASES)
def test_bad_data_is_refused_with_its_name(tmp_path, name, streaming):
    source = write_files(tmp_path, BAD_FILES) / name
    with pytest.raises(ValueError, match=r"(data|text_column)=.") as caught:
        load(source, streaming=streaming)
    assert str(source) in str(caught.value)
    assert not str(caught.value).rstrip().endswith(":")  # a reason follows


def test_a_corrupt_table_is_refused_with_its_cause(tmp_path):
    source = write_files(tmp_path, BAD_FILES) / "cut.jsonl"
    with pytest.raises(ValueError, match=r"cut\.jsonl: line 2 cannot be read as JSON: Expecting"):
        load(source)


@pytest.mark.parametrize("side", ["data", "validation_data"])
@pytest.mark.parametrize("name", ["user/corpus", "wikitext", "/no/such/folder"])
def test_a_hub_id_while_offline_is_refused_and_nobody_is_asked(tmp_path, name, side):
    settings = {"data": str(write_table(tmp_path / "t.jsonl", ROWS)), side: name}
    _HUB.reset()
    with pytest.raises(ValueError, match=rf"data='?{name}'? (is|was) no"):
        load_documents(DataArguments(**settings))
    assert not _HUB.requests


def test_a_wrong_text_column_is_answered_with_the_columns(tmp_path):
    source = write_table(tmp_path / "t.csv", ROWS, "body")
    with pytest.raises(ValueError, match=r"text_column='text' is not in .*: id, body"):
        load(source)


@pytest.mark.parametrize("fraction", [0, 1, 1.5, -0.1, math.nan])
def test_an_impossible_validation_fraction_is_refused(fraction):
    with pytest.raises(ValueError, match=f"validation_fraction={fraction} must be between 0 and 1"):
        DataArguments(validation_fraction=fraction)


@pytest.mark.parametrize(("files", "fraction"), [(1, 0.9), (3, 0.9), (25, 1 - 1e-9)])
def test_a_fraction_that_leaves_a_side_empty_is_refused(tmp_path, files, fraction):
    source = write_files(tmp_path, {f"{i}.txt": f"text {i}" for i in range(files)})
    with pytest.raises(ValueError, match=f"data={source} .*validation_fraction={fraction}"):
        load(source, validation_fraction=fraction)


def test_at_least_one_document_is_held_out(tmp_path):
    source = write_files(tmp_path, {f"{i}.txt": f"text {i}" for i in range(25)})
    train, validation = load(source, validation_fraction=1e-9)
    assert (len(train), len(validation)) == (24, 1)
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(25)))
    train, validation = load(table, validation_fraction=1e-9)
    assert (len(train), len(validation)) == (24, 1)


@pytest.mark.parametrize("name", ["bpee", "gpt2", "user/tokenizer", "./here"])
def test_an_unknown_tokenizer_is_refused(name):
    with pytest.raises(ValueError, match=f"tokenizer='{name}' .*bpe, char, byte"):
        load_tokenizer(name)
    with pytest.raises(ValueError, match="Did you mean bpe"):
        load_tokenizer("bpee")


def test_a_text_may_begin_with_a_byte_order_mark_and_many_blank_lines(tmp_path):
    file = tmp_path / "late.txt"
    file.write_bytes(codecs.BOM_UTF8 + b"\n" * 300_000 + b"the text")
    assert find_files(str(file)) == [file]
