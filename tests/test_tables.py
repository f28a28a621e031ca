"""Tables: what was written is what is read, whatever the format, the types and the first row."""

import bz2
import csv
import gzip
import io
import json
import os
import signal
import tempfile
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset, IterableDataset, config
from pyarrow import parquet

from hf_nanogpt import DataArguments, load_documents, load_text, pack_documents, train_tokenizer
from hf_nanogpt.data.conversations import get_text
from hf_nanogpt.data.stored import load_tokens

ROWS = [f'Document {i}: naïve 東京 🦊,\r\nwith {"many " * (i % 7)}"words".\n' for i in range(30)]
WORDS = ["null", "NA", "None", "nan", "N/A", "true", "007", "1.50", "1e3", "2024-01-02T10:00:00Z"]


def texts(documents) -> list[str]:
    return [get_text(row) for row in documents]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def as_jsonl(rows: list, column: str = "text") -> str:
    return "".join(json.dumps({column: row}, ensure_ascii=False) + "\n" for row in rows)


def as_csv(rows: list[str], delimiter: str = ",") -> str:
    out = io.StringIO()
    table = [["n", "text"], *([i, row] for i, row in enumerate(rows))]
    csv.writer(out, delimiter=delimiter).writerows(table)
    return out.getvalue()


FORMATS = {
    "rows.jsonl": as_jsonl(ROWS),
    "UPPER.JSONL": as_jsonl(ROWS),
    "rows.ndjson": as_jsonl(ROWS),
    "lines.json": as_jsonl(ROWS),
    "list.json": json.dumps([{"text": row} for row in ROWS], indent=1),
    "strings.json": json.dumps(ROWS),
    "columns.json": json.dumps({"id": list(range(30)), "text": ROWS}, indent=1),
    "rows.csv": as_csv(ROWS),
    "UPPER.CSV": as_csv(ROWS),
    "rows.tsv": as_csv(ROWS, "\t"),
    "bom.jsonl": "\ufeff" + as_jsonl(ROWS),
    "bom.csv": "\ufeff" + "text,n\nfirst,1\n",
    "part[1].jsonl": as_jsonl(ROWS),
    "rows.jsonl.gz": gzip.compress(as_jsonl(ROWS[:9]).encode())
    + gzip.compress(as_jsonl(ROWS[9:]).encode()),
    "rows.csv.bz2": bz2.compress(as_csv(ROWS).encode()),
    "rows.JSONL.ZST": pa.compress(as_jsonl(ROWS).encode(), codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_texts_that_were_written(tmp_path, name):
    write(tmp_path / "part1.jsonl", as_jsonl(["another file, which the name as a glob matches"]))
    source = write(tmp_path / name, FORMATS[name])
    expected = ["first"] if name == "bom.csv" else ROWS
    assert texts(load_text(str(source))) == expected
    stream = DataArguments(data=str(source), validation_data=str(source), streaming=True)
    assert texts(load_documents(stream)[0]) == expected


@pytest.mark.parametrize("name", ["book.txt.gz", "book.TXT.BZ2", "book.zst"])
def test_compressed_texts_are_read_as_texts(tmp_path, name):
    text = ("\ufeff" + "".join(ROWS)).encode()
    zstd = pa.compress(text, codec="zstd", asbytes=True)
    packed = {".gz": gzip.compress(text), ".bz2": bz2.compress(text), ".zst": zstd}
    content = packed[Path(name).suffix.lower()]
    assert texts(load_text(str(write(tmp_path / name, content)))) == ["".join(ROWS)]
    with pytest.raises(ValueError, match=rf"{name} cannot be read: Truncated"):
        load_text(str(write(tmp_path / name, content[: len(content) // 2])))


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_words_that_look_like_something_else_stay_text(tmp_path, suffix):
    path = tmp_path / f"words.{suffix}"
    rows = [*(str(i) for i in range(200)), *WORDS]
    if suffix == "parquet":
        Dataset.from_dict({"text": rows}).to_parquet(path)
    else:
        write(path, as_jsonl(rows) if suffix == "jsonl" else as_csv(rows, ",\t"[suffix == "tsv"]))
    assert texts(load_text(str(path))) == rows


def test_a_table_of_dates_is_a_table_of_texts(tmp_path):
    rows = [f"2024-01-{i % 28 + 1:02} 10:00:00" for i in range(90)]
    sides = load_documents(DataArguments(data=str(write(tmp_path / "d.jsonl", as_jsonl(rows)))))
    assert sorted(texts(sides[0]) + texts(sides[1])) == sorted(rows)


BAD_ROWS = {
    "number": ([None, "a", 5], r"row 3 has text=5, which is not text"),
    "list": ([None, *[["a", "b"]] * 9], r"row 2 has text=\['a', 'b'\], which is not text"),
    "late": ([*"abc" * 999, {"x": 1}], r"row 2998 has text={'x': 1}, which is not text"),
    "surrogate": (["a", "b", "\ud800"], r"row 3 has text='\\ud800', which is not valid Unicode"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_row_that_is_not_text_is_refused_with_its_number_and_value(tmp_path, case, streaming):
    rows, message = BAD_ROWS[case]
    source = write(tmp_path / "t.jsonl", "\n".join(json.dumps({"text": row}) for row in rows))
    arguments = {"data": str(source), "validation_data": str(source), "streaming": streaming}
    with pytest.raises(ValueError, match=rf"data={source}: {message}"):
        print(texts(load_documents(DataArguments(**arguments))[0]))


def test_a_conversation_that_is_null_is_refused_with_its_number(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for rows in ([None, turns], [turns, None], [turns, "text"]):
        source = write(tmp_path / "t.jsonl", as_jsonl(rows, "messages"))
        bad = next(i for i, row in enumerate(rows, 1) if row is not turns)
        with pytest.raises(ValueError, match=rf"row {bad} has messages="):
            load_text(str(source))
    lost = json.dumps({"messages": [turns[0] | {"content": "\ud800"}]})
    source = write(tmp_path / "t.jsonl", as_jsonl([turns], "messages") + lost)
    with pytest.raises(ValueError, match=r"row 2 has messages=.*not valid Unicode"):
        load_text(str(source))
    source = write(tmp_path / "t.jsonl", as_jsonl([turns, turns[:1]], "messages"))
    assert texts(load_text(str(source))) == ["a\nb", "a"]


def test_a_table_without_the_column_is_named_whichever_it_is(tmp_path):
    write(tmp_path / "a.jsonl", as_jsonl(["one"]) + '{"id": 3}\n')  # a row may lack it
    assert texts(load_text(str(tmp_path))) == ["one"]
    write(tmp_path / "b.jsonl", as_jsonl(["two"], "body"))
    with pytest.raises(ValueError, match=r"'text' is not in .*b\.jsonl; its columns are: body"):
        load_text(str(tmp_path))
    Dataset.from_dict({"n": [1], "text": ["three"]}).to_parquet(tmp_path / "c.parquet")
    Dataset.from_dict({"text": ["four"], "m": ["x"]}).to_parquet(tmp_path / "d.parquet")
    assert texts(load_text(str(tmp_path / "[cd].parquet"))) == ["three", "four"]


BROKEN = {
    "fields.csv": ("n,text\n1,one\n2,two, and a half\n", "row 2 has more fields than the header"),
    "lines.csv": ("text,n\none\nand more,1\n", "row 1 has fewer fields than the header"),
    "twice.csv": ("text,n,text\none,1,two\n", "has several columns of the name 'text': rename"),
    "twice.tsv": ("n\ttext\tn\n1\tone\t2\n", "has several columns of the name 'n'"),
    "quote.csv": ('n,text\n1,"one\n', "is not CSV: unexpected end of data"),
    "scalar.jsonl": ('{"text": "a"}\n5\n', "row 2 is 5, not an object"),
    "both.jsonl": ('{"text": "a"}\n{"messages": []}\n', "row 2 has messages, but no text"),
    "deep.jsonl": ('{"text": "a"}\n' + "[" * 99_999 + "\n", "line 2 cannot be read as JSON"),
    "cut.jsonl.gz": (gzip.compress(as_jsonl(ROWS).encode())[:90], "cannot be read: Truncated"),
    "two.jsonl": (
        '{"text": "a"}\n{"text": "b", "text": "c"}\n',
        "line 2 cannot be read as JSON: 'text' is there twice, as 'b' and as 'c'",
    ),
    "turns.jsonl": (
        '{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}\n',
        "line 1 cannot be read as JSON: 'role' is there twice",
    ),
    "prose.json": ("Once upon a time.", "line 1 cannot be read as JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_table_is_refused_with_the_place(tmp_path, name):
    content, message = BROKEN[name]
    source = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=f"data={source}.*{message}"):
        load_text(str(source))


def test_a_parquet_file_with_two_columns_of_one_name_is_refused(tmp_path):
    table = pa.table([pa.array(["one"]), pa.array(["two"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(ValueError, match="has several columns of the name 'text': rename"):
        load_text(str(tmp_path / "twice.parquet"))


def test_a_folder_of_tables_of_two_formats_is_refused(tmp_path):
    write(tmp_path / "a.csv", as_csv(ROWS))
    write(tmp_path / "b.jsonl", as_jsonl(ROWS))
    with pytest.raises(ValueError, match=r"mixes csv \(a\.csv\) and json \(b\.jsonl\): select one"):
        load_text(str(tmp_path))


@pytest.mark.parametrize("rows", [["one"], ["one"] * 60])
def test_rows_that_are_all_equal_are_not_answered_with_another_fraction(tmp_path, rows):
    source = write(tmp_path / "t.jsonl", as_jsonl(rows))
    with pytest.raises(ValueError, match=r"one row, or one that is repeated.*validation_data"):
        load_documents(DataArguments(data=str(source)))


# The files of a source


def test_a_late_bad_byte_is_blamed_on_its_file(tmp_path):
    for i in range(3):
        write(tmp_path / f"{i}.txt", b"text and text\n" * 9999 + (b"it\x92s" if i == 1 else b""))
    for source in (tmp_path, tmp_path / "1.txt"):
        with pytest.raises(ValueError, match=r"1\.txt is not UTF-8 text: it has the byte 0x92"):
            load_documents(DataArguments(data=str(source)))


def test_blank_files_of_a_folder_are_left_out(tmp_path):
    for i, content in enumerate(["\n", "", "\ufeff", "the only text"]):
        write(tmp_path / f"{i}.py", content)
    assert texts(load_text(str(tmp_path))) == ["the only text"]


def test_a_byte_order_mark_is_dropped_at_the_start_of_each_file(tmp_path):
    for i in range(30):  # many files, and one
        write(tmp_path / f"{i:02}.txt", f"\ufefftext {i}\ufeff")
    expected = [f"text {i}\ufeff" for i in range(30)]
    assert texts(load_text(str(tmp_path))) == expected
    assert texts(load_text(str(tmp_path / "00.txt"))) == expected[:1]


def test_a_pipe_is_refused_with_a_reason(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"is a pipe or a device.*write the text into a file"):
        load_text(str(tmp_path / "pipe"))


def test_bad_validation_data_is_called_by_its_own_setting(tmp_path):
    good = str(write(tmp_path / "good.txt", "text"))
    for bad in (tmp_path / "missing.txt", write(tmp_path / "b.txt", b"\xff\xfe" * 9)):
        with pytest.raises(ValueError, match=f"^validation_data={bad}"):
            load_documents(DataArguments(data=good, validation_data=str(bad)))


@pytest.mark.parametrize("name", ["input.txt", "input.jsonl"])
def test_equal_size_and_time_do_not_hide_another_content(tmp_path, monkeypatch, name):
    seen = []
    for folder, letter in (("a", "x"), ("b", "y"), ("b", "z")):
        (tmp_path / folder).mkdir(exist_ok=True)
        text = letter * 50
        write(tmp_path / folder / name, as_jsonl([text]) if name != "input.txt" else text)
        os.utime(tmp_path / folder / name, ns=(0, 10**18))
        monkeypatch.chdir(tmp_path / folder)
        seen += texts(load_text(name))
    assert seen == ["x" * 50, "y" * 50, "z" * 50]


def test_a_long_name_is_one_sentence():
    for load in (load_text, lambda name: load_tokens(DataArguments(data=name))):
        with pytest.raises(ValueError, match=r"data=x+ cannot be read: .*name too long"):
            load("x" * 300)


@pytest.fixture
def ordinary_user():
    """Give up what root may do with files, and yield a folder that everyone may write to."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        # What is imported late must be imported before.
        tokenizer = train_tokenizer([], kind="byte")
        pack_documents(load_text(str(write(Path(folder, "a"), "a"))), tokenizer, context_length=4)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        yield Path(folder)
        if is_root:
            os.seteuid(0)


def test_what_may_not_be_read_or_written_is_one_sentence(ordinary_user, monkeypatch):
    folder = ordinary_user
    texts, rows = write(folder / "a.txt", "text"), write(folder / "b.jsonl", as_jsonl(["text"]))
    (folder / "all" / "secret").mkdir(parents=True)
    hidden = write(folder / "all" / "c.txt", "text")
    closed = (hidden, folder / "all" / "secret", folder / "all" / "secret" / "d.txt")
    for path in closed[:2]:
        path.chmod(0)
    for path in (*closed, folder / "all"):
        with pytest.raises(ValueError, match=rf"data={path}.* cannot be read: .*denied"):
            load_text(str(path))
    hidden.chmod(0o600)
    with pytest.raises(ValueError, match=r"all cannot be read: .*denied: '.*secret'"):
        load_text(str(folder / "all"))

    cache = folder / "cache"
    cache.mkdir(mode=0o500)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", cache)
    for path in (texts, rows):
        with pytest.raises(ValueError, match=rf"The cache {cache} cannot be used: .*set HF_HOME"):
            load_text(str(path))
    closed[1].chmod(0o700)


def test_a_full_cache_is_one_sentence(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    text = write(tmp_path / "a.txt", "".join(str(i) for i in range(500_000)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing more raises an OSError
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"The cache .* cannot be used: .*Make room"):
            load_text(str(text))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_validation_data_of_a_stream_are_no_stream(tmp_path):
    """Processes that share a stream would repeat its first rows at the end, and measure them."""
    source = write(tmp_path / "t.jsonl", as_jsonl(ROWS))
    given = {"data": str(source), "validation_data": str(source), "streaming": True}
    train, held_out = load_documents(DataArguments(**given))
    assert isinstance(train, IterableDataset) and isinstance(held_out, Dataset)
    assert texts(train) == texts(held_out) == ROWS
