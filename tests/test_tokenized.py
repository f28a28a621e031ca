"""Folders of tokens: the same blocks as from the text, made once, resumed, and refused."""

import json
import os
import pickle
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from children import forked, run_python, run_ranks
from conftest import tiny_model
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hf_nanogpt import (
    DataArguments,
    NanoGPTTrainer,
    NanoGPTTrainingArguments,
    load_documents,
    pack_documents,
    tokenize_corpus,
    train,
    train_tokenizer,
)
from hf_nanogpt.checkpoint.writing import staged_folder
from hf_nanogpt.cli import main
from hf_nanogpt.data import stored
from hf_nanogpt.data.encoding import DocumentEncoder
from hf_nanogpt.data.packing import cut_blocks
from hf_nanogpt.data.stored import holds_tokens, load_tokens

ROOT = Path(__file__).parent.parent
ROWS = [f"Document {i}: naïve 東京 🦊,\r\nwith {'many ' * (i % 7)}words.\n" for i in range(60)]
TINY = {
    "n_layer": 1,
    "n_embd": 16,
    "n_head": 2,
    "block_size": 16,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "disable_tqdm": True,
    "num_threads": 1,
}


@pytest.fixture
def table(tmp_path) -> Path:
    return _write_rows(tmp_path / "rows.jsonl", ROWS)


def _write_rows(path: Path, rows: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return path


def _tokenize(source: Path, folder: Path, **settings) -> Path:
    tokenize_corpus(DataArguments(data=str(source), tokenizer="char", **settings), folder)
    return folder


def _content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.arrow"))}


def _blocks(tokenizer, tokens, length: int, **settings) -> list[list[int]]:
    eos = tokenizer.eos_token_id
    blocks = cut_blocks(tokens, context_length=length, eos_token_id=eos, **settings)
    return [row["input_ids"].tolist() for row in blocks]


def _history(folder: Path, step: int) -> list[float]:
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [row["loss"] for row in state["log_history"] if "loss" in row]


# The same as from the text


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_blocks_of_a_folder_are_those_of_the_text(table, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(stored, "_CHARACTERS", 99)  # several files
    args = DataArguments(data=str(table), tokenizer=kind, vocab_size=290)
    described = tokenize_corpus(args, tmp_path / "tokens")
    tokenizer, *sides = load_tokens(DataArguments(data=str(tmp_path / "tokens")))
    texts = load_documents(args)
    parts = described["splits"].items()
    for side, documents, (name, part) in zip(sides, texts, parts, strict=True):
        rows = [row["text"] for row in documents]
        assert part["documents"] == len(rows) and part["bytes"] == len("".join(rows).encode())
        for length in (2, 16, 5000):
            packed = pack_documents(documents, tokenizer, context_length=length)
            expected = [row["input_ids"].tolist() for row in packed]
            assert _blocks(tokenizer, side, length) == expected
        assert part["shards"] == len(list((tmp_path / "tokens" / name).iterdir())) > 1


def test_training_from_a_folder_gives_the_same_losses(table, tmp_path):
    _tokenize(table, tmp_path / "tokens", validation_fraction=0.03)
    sources = {
        "text": {"data": str(table), "tokenizer": "char"},
        "folder": {"data": str(tmp_path / "tokens")},
    }
    for name, source in sources.items():
        train("quickstart", output_dir=str(tmp_path / name), max_steps=4, **source, **TINY)
    text, folder = (_history(tmp_path / name, 4) for name in sources)
    assert text == folder and len(text) == 4


def test_files_are_what_datasets_reads(table, tmp_path):
    folder = _tokenize(table, tmp_path / "tokens")
    tokenizer = load_tokens(DataArguments(data=str(folder)))[0]
    rows = Dataset.from_file(str(folder / "train" / "00000.arrow"))["input_ids"]
    documents = load_documents(DataArguments(data=str(table)))[0]
    assert [tokenizer.decode(row[1:]) for row in rows] == [row["text"] for row in documents]
    assert {row[0] for row in rows} == {tokenizer.eos_token_id}


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_the_table_of_characters_gives_the_ids_of_the_tokenizer(kind):
    tokenizer = train_tokenizer(["abc naïve 東京\n"], kind=kind)
    encode = DocumentEncoder(tokenizer)
    assert encode.by_character
    texts = ["", "abc", "naïve 京都 🦊🦊\r\n", "<|endoftext|>", "  \n\n x\x00\u0301\U0010ffff", "ß"]
    for text, ids in zip(texts, encode({"text": texts})["input_ids"], strict=True):
        expected = tokenizer(text, split_special_tokens=True)["input_ids"]
        assert ids.tolist() == [tokenizer.eos_token_id, *expected]
        assert tokenizer.decode(ids[1:]) == text


def test_a_tokenizer_that_joins_characters_is_not_looked_up():
    assert not DocumentEncoder(train_tokenizer(ROWS, vocab_size=290)).by_character
    tokenizer = train_tokenizer(ROWS, kind="char")
    tokenizer.add_tokens(["Document"])
    [ids] = DocumentEncoder(tokenizer)({"text": ROWS[:1]})["input_ids"]
    assert len(tokenizer) - 1 in ids


def test_blocks_can_be_sent_to_another_process(table, tmp_path):
    tokenizer, *sides = load_tokens(DataArguments(data=str(_tokenize(table, tmp_path / "tokens"))))
    blocks = cut_blocks(sides[0], context_length=16, eos_token_id=tokenizer.eos_token_id)
    sent = pickle.dumps(blocks)
    assert len(sent) < 1000  # opened again there, not copied
    again = pickle.loads(sent)
    assert [r["input_ids"].tolist() for r in again] == [r["input_ids"].tolist() for r in blocks]


# Interrupted and resumed


@pytest.mark.parametrize("settings", [{"num_proc": 2}, {"streaming": True}], ids=["two", "stream"])
def test_any_way_of_writing_gives_the_same_bytes(table, tmp_path, monkeypatch, settings):
    monkeypatch.setattr(stored, "_CHARACTERS", 500)
    plain = _content(_tokenize(table, tmp_path / "plain"))
    assert plain == _content(_tokenize(table, tmp_path / "other", **settings)) and len(plain) > 5


KILLED = """
import os, signal, sys
from hf_nanogpt import DataArguments, tokenize_corpus
from hf_nanogpt.data import stored
replace, files = os.replace, []
def die_before_file_21(staged, path):
    files.extend([path] * str(path).endswith(".arrow"))
    if len(files) == 21:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(staged, path)
stored.os.replace, stored._CHARACTERS = die_before_file_21, 100
tokenize_corpus(DataArguments(data=sys.argv[1], tokenizer="char"), sys.argv[2])
"""


@pytest.mark.slow
@forked
def test_a_killed_run_resumes_after_its_last_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "_CHARACTERS", 100)
    rows = _write_rows(tmp_path / "many.jsonl", [f"{i} {'word ' * 20}" for i in range(700)])
    folder, made = tmp_path / "tokens", tmp_path / "tokens" / "train"
    done = run_python(KILLED, rows, folder)
    assert done.returncode == -signal.SIGKILL
    before = {p.name: p.stat().st_mtime_ns for p in made.glob("*.arrow")}
    assert len(before) == 20 and list(made.glob("*.partial"))
    assert "splits" not in json.loads((folder / "tokenized.json").read_text())
    with pytest.raises(ValueError, match="is incomplete: run hf-nanogpt tokenize again"):
        load_tokens(DataArguments(data=str(folder)))
    _tokenize(rows, folder)
    after = {p.name: p.stat().st_mtime_ns for p in made.glob("*.arrow")}
    assert len(after) > len(before) and before.items() <= after.items()
    assert _content(folder) == _content(_tokenize(rows, tmp_path / "whole"))
    assert {p.suffix for p in folder.rglob("*") if p.is_file()} == {".arrow", ".json"}


def test_what_another_process_still_writes_is_not_cleared(table, tmp_path):
    folder = tmp_path / "tokens"
    (folder / ".staged-abcd_123").mkdir(parents=True)  # of a process that was killed
    with staged_folder(folder) as staged:
        _tokenize(table, folder)
        assert staged.is_dir()
    assert not list(folder.glob(".staged-*"))


def test_a_missing_file_is_written_again(table, tmp_path):
    whole = _content(_tokenize(table, tmp_path / "tokens"))
    (tmp_path / "tokens/train/00000.arrow").unlink()
    with pytest.raises(ValueError, match=r"00000.arrow is damaged or missing"):
        _blocks(*load_tokens(DataArguments(data=str(tmp_path / "tokens")))[:2], 16)
    assert _content(_tokenize(table, tmp_path / "tokens")) == whole


def test_another_setting_or_source_is_not_mixed_in(table, tmp_path):
    folder = _tokenize(table, tmp_path / "tokens")
    whole = _content(folder)
    with pytest.raises(ValueError, match=r"validation_fraction=0.2, but .* was begun with .*=0.1"):
        _tokenize(table, folder, validation_fraction=0.2)
    _write_rows(table, [*ROWS[::-1], "new"])
    with pytest.raises(ValueError, match="has changed since"):
        _tokenize(table, folder)
    assert _content(folder) == whole


def test_a_folder_with_something_else_in_it_is_left_alone(table, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty"):
        _tokenize(table, tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]


# Refused


@pytest.mark.parametrize("cut", [10, 400, 1000, -1])
def test_a_cut_file_is_refused_with_its_name(table, tmp_path, cut):
    folder = _tokenize(table, tmp_path / "tokens")
    path = folder / "train" / "00000.arrow"
    path.write_bytes(path.read_bytes()[:cut] if cut > 0 else b"")
    with pytest.raises(ValueError, match=r"00000.arrow is damaged or missing"):
        _blocks(*load_tokens(DataArguments(data=str(folder)))[:2], 16)


def test_a_folder_without_its_description_or_tokenizer_is_refused(table, tmp_path):
    folder = _tokenize(table, tmp_path / "tokens")
    shutil.move(folder / "tokenizer", tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"tokens is incomplete"):
        load_tokens(DataArguments(data=str(folder)))
    (folder / "tokenized.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenized.json is damaged"):
        load_tokens(DataArguments(data=str(folder)))


def test_settings_that_do_not_go_with_tokens_are_refused(table, tmp_path):
    folder = str(_tokenize(table, tmp_path / "tokens"))
    with pytest.raises(ValueError, match=r"tokenizer=.* is already tokenised"):
        load_tokens(DataArguments(data=folder, tokenizer=f"{folder}/tokenizer"))
    with pytest.raises(ValueError, match=r"validation_data=.* leave it out"):
        load_tokens(DataArguments(data=folder, validation_data=str(table)))
    with pytest.raises(ValueError, match="another tokenizer than the one of the checkpoint"):
        load_tokens(DataArguments(data=folder), train_tokenizer([], kind="byte"))
    with pytest.raises(ValueError, match="holds tokens, but this needs text"):
        load_documents(DataArguments(data=folder))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["{data}"], "hf-nanogpt tokenize DATA FOLDER"),
        (["{data}", "--tokenizer=char"], "hf-nanogpt tokenize DATA FOLDER"),
        (["{data}", "out", "--tokeniser=char"], "Did you mean --tokenizer"),
        (["{data}", "out", "--num_proc=0"], "num_proc=0 must be a whole number, at least 1"),
        (["missing.txt", "out"], "was not found"),
    ],
)
def test_wrong_arguments_on_the_command_line_are_refused(table, flags, message, capsys):
    assert main(["tokenize", *(flag.format(data=table) for flag in flags)]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_the_command_line_says_what_it_made(table, tmp_path, capsys):
    assert main(["tokenize", str(table), str(tmp_path / "out"), "--tokenizer", "byte"]) == 0
    output = capsys.readouterr().out
    assert f"hf-nanogpt train --data {tmp_path / 'out'}" in output
    assert "257 tokens in its vocabulary" in output


# nanoGPT's files


def _write_ids(path: Path, ids, header: bytes = b"") -> None:
    path.write_bytes(header + np.array(ids, dtype="<u2").tobytes())


@pytest.fixture
def char_files(tmp_path) -> Path:
    folder = tmp_path / "shakespeare_char"
    folder.mkdir()
    letters = "\n abcdefghij"
    meta = {"vocab_size": 12, "itos": dict(enumerate(letters)), "stoi": {}}
    meta["stoi"] = {letter: i for i, letter in meta["itos"].items()}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    (folder / "prepare.py").write_text("# nanoGPT leaves such files next to them")
    _write_ids(folder / "train.bin", np.arange(500) % 12)
    _write_ids(folder / "val.bin", [2, 3, 4, 1, 5, 6, 0] * 9)
    return folder


@pytest.fixture(scope="module")
def gpt2_tokenizer(tmp_path_factory) -> Path:
    """A tokenizer with the size and the end of text of GPT-2's, but other tokens."""
    words = {f"w{i}": i for i in range(50256)} | {"<|endoftext|>": 50256}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    folder = tmp_path_factory.mktemp("gpt2")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    ).save_pretrained(folder)
    return folder


def test_a_model_trains_on_nanogpts_characters(char_files, tmp_path):
    tokenizer, *sides = load_tokens(DataArguments(data=str(char_files)))
    [block] = _blocks(tokenizer, sides[1], 1000)
    assert block == [2, 3, 4, 1, 5, 6, 0] * 9 and tokenizer.decode(block) == "abc de\n" * 9
    result = train(data=str(char_files), output_dir=str(tmp_path / "run"), max_steps=2, **TINY)
    assert result.metrics["eval_tokens"] == result.metrics["eval_bytes"] == 62
    assert result.prompt == "abc"  # a quarter of the context has no room for more


def test_gpt2_tokens_are_cut_as_they_stand(tmp_path, gpt2_tokenizer):
    ids = [1, 2, 3, 50256, 4, 5, 50256]
    _write_ids(tmp_path / "train.bin", ids)
    _write_ids(tmp_path / "val.bin", ids[::-1])
    args = DataArguments(data=str(tmp_path), tokenizer=str(gpt2_tokenizer))
    tokenizer, *sides = load_tokens(args)
    assert [_blocks(tokenizer, side, 100) for side in sides] == [[ids], [ids[::-1]]]


def test_numbered_files_with_a_header_are_read_one_after_the_other(tmp_path, gpt2_tokenizer):
    header = np.array([20240520, 1, 3] + [0] * 253, dtype="<i4").tobytes()
    _write_ids(tmp_path / "part_val_000000.bin", [50256, 9], header)
    for i in (1, 2):
        _write_ids(tmp_path / f"part_train_{i:06}.bin", [50256, i, 10 + i], header)
    args = DataArguments(data=str(tmp_path), tokenizer=str(gpt2_tokenizer))
    tokenizer, *sides = load_tokens(args)
    assert _blocks(tokenizer, sides[0], 4) == [[50256, 1, 11, 50256], [50256, 2, 12]]


def test_bad_token_files_are_refused_with_their_name(char_files, tmp_path, gpt2_tokenizer):
    def refused(message: str, **settings) -> None:
        with pytest.raises(ValueError, match=message):
            load_tokens(DataArguments(data=str(char_files), **settings))

    _write_ids(char_files / "train.bin", [1, 2, 12])
    refused("train.bin has a token 12, but the largest id of the tokenizer is 11")
    (char_files / "train.bin").write_bytes(b"abc")
    refused("train.bin is damaged: it has 3 bytes, and each token id takes 2")
    (char_files / "train.bin").write_bytes(b"")
    refused("train.bin is damaged: it has 0 bytes")
    _write_ids(char_files / "train.bin", [1, 2])
    (char_files / "val.bin").unlink()
    refused("has no val.bin")
    train_tokenizer([], kind="byte").save_pretrained(tmp_path / "byte")
    refused("eos_token_id 0, but .* 50256 separates", tokenizer=str(tmp_path / "byte"))
    (char_files / "meta.pkl").write_bytes(pickle.dumps(os.getcwd))
    refused("meta.pkl was not loaded")
    (char_files / "meta.pkl").unlink()
    refused("tokenizer=bpe cannot be trained on .* token ids")


# datatrove's files


def _write_ds(path: Path, documents: list[list[int]], dtype: str = "<u2", name: str = "") -> None:
    path.write_bytes(np.concatenate(documents).astype(dtype).tobytes())
    ends = np.cumsum([len(ids) for ids in documents])
    Path(f"{path}.index").write_bytes(ends.astype("<u8").tobytes())
    if name:
        size = np.dtype(dtype).itemsize
        Path(f"{path}.metadata").write_text(f"{name}|{size}\n{ends[-1]}\n{ends[-1]} T")


@pytest.fixture
def ds_files(tmp_path) -> Path:
    """Documents of 2 to 8 bytes in two files, with the eos behind each."""
    train_tokenizer([], kind="byte").save_pretrained(tmp_path / "byte")
    folder = tmp_path / "ds"
    folder.mkdir()
    for rank in range(2):
        documents = [[*[1 + i] * (1 + i % 7), 0] for i in range(100 * rank, 100 * rank + 100)]
        _write_ds(folder / f"0000{rank}_shuffled.ds", documents, name=str(tmp_path / "byte"))
    return folder


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_datatroves_documents_are_read_whole_and_the_last_are_held_out(ds_files, dtype):
    for path in ds_files.glob("*.ds"):
        path.write_bytes(np.fromfile(path, "<u2").astype(dtype).tobytes())
    args = DataArguments(data=str(ds_files), validation_fraction=0.2)
    tokenizer, *sides = load_tokens(args)
    train, validation = (np.concatenate(side()).tolist() for side in sides)
    everything = [0, *(t for i in range(200) for t in (*[1 + i] * (1 + i % 7), 0))]
    assert train + validation[1:] == everything and validation[0] == train[-1] == 0
    assert 0.19 < len(validation) / len(everything) < 0.21
    [alone] = ([block] for block in _blocks(tokenizer, sides[1], 9000))
    assert alone == [validation]
    single = DataArguments(data=str(ds_files / "00001_shuffled.ds"))
    assert np.concatenate(load_tokens(single)[1]())[1] == 101


def test_a_model_trains_on_datatroves_files(ds_files, tmp_path):
    given = {"data": str(ds_files), "validation_fraction": 0.1}
    result = train(output_dir=str(tmp_path / "run"), max_steps=2, **given, **TINY)
    held_out = np.concatenate(load_tokens(DataArguments(**given))[2]())
    assert result.metrics["eval_tokens"] == len(held_out) - 1


def test_bad_datatrove_files_are_refused_with_their_name(ds_files, tmp_path):
    def refused(message: str, **settings) -> None:
        with pytest.raises(ValueError, match=message):
            load_tokens(DataArguments(data=str(ds_files), **settings))

    with pytest.raises(ValueError, match="holds tokens, but this needs text"):
        load_documents(DataArguments(data=str(ds_files)))
    for path in ds_files.glob("*.metadata"):
        path.write_text("gpt2|2\n900\n900 T")
    refused("metadata, gpt2, was not loaded: give the folder or Hub id")
    byte, first = str(tmp_path / "byte"), ds_files / "00000_shuffled.ds"
    load_tokens(DataArguments(data=str(ds_files), tokenizer=byte))
    _write_ds(first, [[5, 6], [7, 0]])
    refused("do not end with token 0, the eos", tokenizer=byte)
    _write_ds(first, [[5, 0], [999, 0]])
    refused("has a token 999, but the largest id of the tokenizer is 256", tokenizer=byte)
    first.write_bytes(b"abc")
    refused("00000_shuffled.ds is damaged: it has 3 bytes", tokenizer=byte)
    Path(f"{first}.index").write_bytes(b"")
    refused("00000_shuffled.ds is damaged", tokenizer=byte)
    Path(f"{first}.loss").write_bytes(b"")
    refused("a mask of tokens", tokenizer=byte)
    Path(f"{first}.index").unlink()
    refused("has no 00000_shuffled.ds.index", tokenizer=byte)


# Order


def test_a_stream_is_shuffled_each_time_and_never_ends(table):
    args = DataArguments(data=str(table), tokenizer="char", streaming=True)
    tokenizer, tokens, _ = load_tokens(args)
    [whole] = _blocks(tokenizer, tokens, 10**6)

    def read(seed: int) -> list[int]:
        length = 2 * len(whole)
        settings = {"context_length": length, "eos_token_id": tokenizer.eos_token_id}
        return next(iter(cut_blocks(tokens, seed=seed, **settings)))["input_ids"].tolist()

    def documents(ids: list[int]) -> list[str]:
        return tokenizer.decode(ids).split(tokenizer.eos_token)[1:]

    once, count = sorted(documents(whole)[:-1]), len(documents(whole)) - 1
    first, second = documents(read(1))[:count], documents(read(1))[count : 2 * count]
    assert sorted(first) == sorted(second) == once
    assert first != second and read(1) == read(1) != read(2)


def test_a_stream_resumes_with_the_losses_of_an_uninterrupted_run(table, tmp_path):
    folder, settings = tmp_path / "run", TINY | {"save_steps": 20, "eval_strategy": "no"}
    settings |= {"data": str(table), "tokenizer": "char", "streaming": True, "max_steps": 60}
    train(output_dir=str(folder), **settings)  # the stream is read more than once
    expected = _history(folder, 60)
    shutil.rmtree(folder / "checkpoint-60")  # as if it had been killed after step 40
    train(output_dir=str(folder), resume=True, **settings)
    assert _history(folder, 60) == expected and len(expected) == 60


def _read(data: str, folder: str, batch_size: int, count: int) -> tuple[int, list]:
    """Return the rank of this process and the batches that it reads, from tables and streams."""
    args = NanoGPTTrainingArguments(
        folder,
        per_device_train_batch_size=batch_size,
        use_cpu=True,
        max_steps=9,
        eval_strategy="no",
    )
    seen = []
    for streaming in (False, True):
        tokenizer, tokens, _ = load_tokens(
            DataArguments(data=data, tokenizer="char", streaming=streaming)
        )
        blocks = cut_blocks(tokens, context_length=16, eos_token_id=tokenizer.eos_token_id, seed=5)
        model = tiny_model(vocab_size=len(tokenizer))
        trainer = NanoGPTTrainer(model, args, train_dataset=blocks, processing_class=tokenizer)
        loader = trainer.get_train_dataloader()
        for epoch in range(1 if streaming else 2):
            loader.set_epoch(epoch)
            if not streaming:
                blocks.set_epoch(epoch)  # as training does
            seen += [batch["input_ids"].tolist() for _, batch in zip(range(count), loader)]  # noqa: B905
    return args.process_index, seen


def _write_what_is_read(data: str, folder: str) -> None:
    rank, seen = _read(data, folder, 2, 6)
    Path(folder, f"{rank}.json").write_text(json.dumps(seen))


@pytest.mark.slow
@forked
def test_two_processes_read_together_what_one_reads(table, tmp_path):
    for done in run_ranks(2, _write_what_is_read, str(table), str(tmp_path)):
        assert done.returncode == 0, done.stderr[-4000:]
    two = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    together = [first + second for first, second in zip(*two, strict=True)]
    _, alone = _read(str(table), str(tmp_path), 4, 6)
    assert together == alone and len(alone) == 18


def test_a_folder_of_tokens_below_the_home_folder_is_known_by_its_short_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "tokenized.json").write_text("{}")
    assert holds_tokens(Path("~/tokens")) and not holds_tokens(Path("~/other"))
