"""Tokens of long texts: the ids of the pieces, joined, are those that the tokenizer gives."""

import json
import math
import random
from itertools import chain

import pytest
from conftest import tiny_model
from datasets import Dataset
from test_tokenization import CORPUS, NASTY, encode, sentencepiece_like
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from hf_nanogpt import (
    DataArguments,
    evaluate,
    load_text,
    pack_documents,
    token_byte_counts,
    tokenize_corpus,
    train,
    train_tokenizer,
)
from hf_nanogpt.data import documents as documents_module

VIETNAMESE = "Tiê\u0301ng Viê\u0323t co\u0301 da\u0302\u0301u, va\u0300 chu\u031b\u0303.\n"


def long_text() -> str:
    rng = random.Random(0)
    parts = [*chain.from_iterable(text.split(". ") for text in CORPUS), *NASTY.values()]
    parts += [VIETNAMESE, "def f(x):\n    return x\n\n\n", "a  b   c\n\n\nd\n", "\r\n\r\n", " \n x"]
    joined = " ".join(rng.choices(parts, k=200)) + "\n".join(rng.choices(parts, k=200))
    return joined.replace("\0", "")  # a file with these is not a text


def byte_level(tokenizer_class, **settings) -> PreTrainedTokenizerFast:
    bpe = train_tokenizer([*CORPUS, long_text()], vocab_size=600)
    merges = json.loads(bpe.backend_tokenizer.to_str())["model"]["merges"]
    return tokenizer_class(vocab=bpe.get_vocab(), merges=[tuple(m) for m in merges], **settings)


def collapsing() -> PreTrainedTokenizerFast:
    """Return a tokenizer that strips a text and joins its blanks, as T5's does."""
    tokenizer = sentencepiece_like("metaspace-unigram")
    blanks = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), blanks, normalizers.Strip()]
    )
    return tokenizer


TOKENIZERS = {
    "ours": lambda: train_tokenizer(CORPUS, vocab_size=350),
    "gpt2": lambda: byte_level(GPT2Tokenizer),
    "prefix space": lambda: byte_level(GPT2Tokenizer, add_prefix_space=True),
    "qwen": lambda: byte_level(Qwen2Tokenizer),
    "metaspace-bpe": lambda: sentencepiece_like("metaspace-bpe"),
    "metaspace-unigram": lambda: sentencepiece_like("metaspace-unigram"),
    "llama": lambda: sentencepiece_like("llama"),
    "collapsing": collapsing,
}


@pytest.mark.parametrize("size", [97, 1000])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_of_pieces_joined_are_those_of_the_whole(tmp_path, monkeypatch, name, size):
    tokenizer, text = TOKENIZERS[name](), long_text()
    (tmp_path / "a.txt").write_bytes(text.encode())
    monkeypatch.setattr(documents_module, "_PIECE", size)
    documents = load_text(str(tmp_path / "a.txt"))
    assert len(documents) > len(text) / size / 3
    blocks = pack_documents(documents, tokenizer, context_length=10**6)
    eos = tokenizer.eos_token_id
    assert blocks[0]["input_ids"].tolist() == [eos, *encode(tokenizer, text), eos]


@pytest.mark.parametrize("name", ["gpt2", "prefix space", "qwen", "llama"])
def test_a_text_without_blanks_is_cut_between_its_lines(tmp_path, monkeypatch, name):
    tokenizer, text = TOKENIZERS[name](), "東京の犬、\n京都の猫。\n猫" * 2000
    (tmp_path / "a.txt").write_bytes(text.encode())
    monkeypatch.setattr(documents_module, "_PIECE", 97)
    documents = load_text(str(tmp_path / "a.txt"))
    assert len(documents) > 100
    ids = pack_documents(documents, tokenizer, context_length=10**6)[0]["input_ids"].tolist()
    assert ids[1:-1] == encode(tokenizer, text)


def test_a_run_without_a_place_to_cut_stays_whole(tmp_path):
    for i, text in enumerate(
        ["A" * 300_000, " " * 300_000 + "end", "\n" * 200_000 + "end", "a1 " * 90_000]
    ):
        (tmp_path / f"{i}.txt").write_text(text)
        assert [row["text"] for row in load_text(str(tmp_path / f"{i}.txt"))] == [text]


@pytest.mark.parametrize("largest", [65_535, 65_536, 70_221])
def test_the_largest_id_is_kept_in_a_vocabulary_with_holes(largest):
    backend = Tokenizer(models.WordLevel({"a": 0, "b": largest, "</s>": 1}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    documents = Dataset.from_dict({"text": ["a b b"]})
    [block] = pack_documents(documents, tokenizer, context_length=8)
    assert block["input_ids"].tolist() == [1, 0, largest, largest, 1]
    counts = token_byte_counts(tokenizer)
    assert len(counts) == largest + 1 and counts[[0, 1, 2, largest]].tolist()[1:3] == [0, 0]


# Bytes are those of the text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_bytes_are_counted_from_the_text_with_every_tokenizer(name):
    tokenizer, texts = TOKENIZERS[name](), [*["hello"] * 5, *NASTY.values(), VIETNAMESE * 9]
    texts = [text for text in texts if text]
    model = tiny_model("nano", vocab_size=len(tokenizer))
    documents, size = Dataset.from_dict({"text": texts}), sum(len(t.encode()) for t in texts)
    for data in (documents, documents.to_iterable_dataset()):
        result = evaluate(model, data, tokenizer=tokenizer)
        assert result.num_bytes == size
        assert result.num_tokens == sum(len(encode(tokenizer, text)) + 1 for text in texts)
        bits = result.loss * result.num_tokens / math.log(2)
        assert result.bits_per_byte == pytest.approx(bits / size, rel=1e-12)


def test_without_an_eos_the_first_tokens_bytes_are_counted_too():
    tokenizer = train_tokenizer([], kind="byte")
    tokenizer.eos_token = None
    model, documents = tiny_model("nano", vocab_size=257), Dataset.from_dict({"text": ["abc", "d"]})
    result = evaluate(model, documents, tokenizer=tokenizer)
    assert (result.num_tokens, result.num_bytes) == (3, 4)


@pytest.mark.slow
@pytest.mark.parametrize("stored", [False, True])
def test_training_reports_the_bytes_of_the_text(tmp_path, stored):
    byte_level(Qwen2Tokenizer).save_pretrained(tmp_path / "tokenizer")
    source, data = tmp_path / "a.txt", str(tmp_path / "tokens")
    source.write_text(VIETNAMESE * 200)
    settings = {"data": str(source), "tokenizer": str(tmp_path / "tokenizer")}
    settings["validation_fraction"] = 0.1
    if stored:
        tokenize_corpus(DataArguments(**settings), data)
    tiny = {"n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 32, "num_threads": 1}
    tiny |= {"max_steps": 2, "disable_tqdm": True, "output_dir": str(tmp_path / "run")}
    result = train(**({"data": data} if stored else settings), **tiny)
    expected = evaluate(tmp_path / "run", str(source), held_out=settings["validation_fraction"])
    text = source.read_text()
    assert expected.num_bytes == len(text[math.floor(len(text) * 0.9) :].encode())
    assert result.metrics["eval_bytes"] == expected.num_bytes
    assert result.metrics["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-4)
