"""Trained tokenizers: every text comes back exactly, and every byte is counted."""

import json
import random
import unicodedata

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    GemmaTokenizer,
    GPT2Tokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hf_nanogpt import token_byte_counts, train_tokenizer
from hf_nanogpt.data.tokenization import END_OF_TEXT, PADDING, _cut_runs

KINDS = ("bpe", "char", "byte")
CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps; the fox doesn't.\n" * 40,
    "Der schöne Fuchs fraß süße Käfer: naïve café, 東京の犬, 🦊🦊.\n" * 20,
]
NASTY = {
    "empty": "",
    "spaces": "  two  spaces\t\ttabs \n\n\n lines \u00a0\u3000 wide ",
    "crlf": "one\r\ntwo\r\rthree\n\r four\r\n",
    "nul": "a\0b\0\0c",
    "controls": "".join(map(chr, range(32))) + "\x7f\x80\x9f\u2028\u2029\u200b\ufeff",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪🇯🇵 1️⃣",
    "combining": "e\u0301 = é, " + "Z\u0351\u036b\u0343\u036a algo, " + "\u0301 first",
    "scripts": "日本語 עברית العربية हिन्दी ไทย Ελληνικά",
    "private": "\ue000\uf8ff\U000f0000\U0010fffd",
    "noncharacters": "\ufffe\uffff\U0010ffff\ufdd0",
    "endoftext": f"before{END_OF_TEXT}after {END_OF_TEXT} <|endoftext <|endof|text|>",
    "space symbols": "Ġ Ċ ▁ <0x0A> </w> ##ing",
    "contractions": "I'll they've 'S don't",
}


def random_text(seed: int, length: int) -> str:
    """Return code points of all planes, without surrogates, which are not characters."""
    rng = random.Random(seed)
    ceilings = (0x80, 0x800, 0x10000, 0x110000)
    points = (rng.randrange(rng.choice(ceilings)) for _ in range(length))
    return "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)


def encode(tokenizer, text: str) -> list[int]:
    """Return the ids of a text as `pack_documents` does: no special token, not even a spelt one."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request) -> PreTrainedTokenizerFast:
    return train_tokenizer(iter(CORPUS), kind=request.param, vocab_size=350)


@pytest.mark.parametrize("name", NASTY)
def test_nasty_text_comes_back_exactly(tokenizer, name):
    text = NASTY[name]
    ids = encode(tokenizer, text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text  # special tokens recognised


def test_random_code_points_come_back_exactly(tokenizer):
    for seed in range(20):
        text = random_text(seed, 500)
        assert tokenizer.decode(encode(tokenizer, text)) == text


def test_byte_counts_sum_to_the_length_in_utf8(tokenizer):
    counts = token_byte_counts(tokenizer)
    assert counts.shape == (len(tokenizer),)
    assert counts[tokenizer.eos_token_id] == 0
    for text in (*CORPUS, *NASTY.values(), random_text(7, 2000)):
        assert counts[encode(tokenizer, text)].sum() == len(text.encode())


def test_end_of_text_begins_and_ends_and_padding_is_on_the_left(tokenizer):
    assert tokenizer.bos_token == tokenizer.eos_token == END_OF_TEXT
    assert tokenizer.pad_token == PADDING
    special = tokenizer.convert_tokens_to_ids([END_OF_TEXT, PADDING])
    assert sorted(tokenizer.all_special_ids) == sorted(special)
    short, long = tokenizer(["a", "abc"], padding=True)["input_ids"]
    assert short[:-1] == [tokenizer.pad_token_id] * (len(long) - 1)
    assert tokenizer(END_OF_TEXT)["input_ids"] == [tokenizer.eos_token_id]


def test_padding_takes_the_id_of_a_byte_that_no_text_has(tokenizer):
    symbols = pre_tokenizers.ByteLevel.alphabet()
    [unused] = set(symbols) - set(tokenizer.get_vocab())
    assert unused == bytes_to_unicode()[0xFF]
    # 0xFF is the 256th of the sorted symbols but for those that follow it; `<|endoftext|>` is 0.
    assert tokenizer.pad_token_id == 1 + sorted(symbols).index(unused)
    ids = set(encode(tokenizer, "".join(map(chr, range(0x80, 0x800))) + PADDING))
    assert tokenizer.pad_token_id not in ids


def test_the_stock_collator_learns_where_texts_end(tokenizer):
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    labels = collate([{"input_ids": [eos, 5, 6, eos]}, {"input_ids": [eos, 5]}])["labels"]
    assert labels.tolist() == [[eos, 5, 6, eos], [-100, -100, eos, 5]] and pad != eos


def test_a_saved_tokenizer_loads_without_our_code(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    assert not list(tmp_path.glob("*.py"))
    loaded = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    assert "hf_nanogpt" not in type(loaded).__module__
    for text in (*NASTY.values(), random_text(3, 500)):
        assert encode(loaded, text) == encode(tokenizer, text)
        assert loaded.decode(encode(loaded, text)) == text
    assert (loaded.eos_token, loaded.pad_token, loaded.padding_side) == (
        END_OF_TEXT,
        PADDING,
        "left",
    )
    assert token_byte_counts(loaded).equal(token_byte_counts(tokenizer))


@pytest.mark.parametrize("kind", KINDS)
def test_training_twice_gives_the_same_tokenizer(kind):
    once, again = (train_tokenizer(CORPUS, kind=kind, vocab_size=350) for _ in range(2))
    assert once.backend_tokenizer.to_str() == again.backend_tokenizer.to_str()


@pytest.mark.parametrize("size", [257, 300, 351])
def test_bpe_has_exactly_the_vocab_size_asked_for(size):
    tokenizer = train_tokenizer(CORPUS, vocab_size=size)
    assert len(tokenizer) == tokenizer.vocab_size == size
    assert set(tokenizer.get_vocab().values()) == set(range(size))


@pytest.mark.parametrize("size", [-1, 0, 256])
def test_too_small_a_vocab_size_is_refused(size):
    with pytest.raises(ValueError, match=rf"vocab_size={size} .*at least 257.*tokenizer='byte'"):
        train_tokenizer(CORPUS, vocab_size=size)


def test_a_vocab_size_that_the_text_cannot_give_is_refused():
    # "ab" twice: the 256 bytes, <|endoftext|> and the one merge that occurs at least twice.
    with pytest.raises(ValueError, match="only 258 tokens, not vocab_size=300"):
        train_tokenizer(["ab", "ab"], vocab_size=300)
    assert len(train_tokenizer(["ab", "ab"], vocab_size=258)) == 258


def test_an_unknown_kind_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"kind='bep' must be .*Did you mean bpe"):
        train_tokenizer(CORPUS, kind="bep")


def test_every_character_seen_is_one_token():
    text = "".join(CORPUS) + "".join(NASTY.values()) + random_text(1, 3000)
    tokenizer = train_tokenizer(iter([text[:100], text[100:]]), kind="char")
    for character in set(text):
        assert len(encode(tokenizer, character)) == 1, ascii(character)
    # Also inside the words of a text, where the pre-tokenizer cuts first.
    assert len(encode(tokenizer, text)) == len(text)


def test_characters_never_seen_are_spelt_in_bytes():
    tokenizer = train_tokenizer(["aé東"], kind="char")
    for character in "zü京🦊\0":
        ids = encode(tokenizer, character)
        assert 1 <= len(ids) <= len(character.encode())
        assert tokenizer.decode(ids) == character


def test_the_byte_tokenizer_has_one_token_per_byte_and_needs_no_text():
    tokenizer = train_tokenizer([], kind="byte")
    assert len(tokenizer) == 257
    for text in NASTY.values():
        assert len(encode(tokenizer, text)) == len(text.encode())


def test_byte_counts_are_exact_for_gpt2_and_qwen_tokenizers():
    bpe = train_tokenizer(CORPUS, vocab_size=350)
    vocabulary = bpe.get_vocab()
    model = json.loads(bpe.backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    for tokenizer_class in (GPT2Tokenizer, Qwen2Tokenizer):
        tokenizer = tokenizer_class(vocab=vocabulary, merges=merges)
        counts = token_byte_counts(tokenizer)
        for text in (*CORPUS, *NASTY.values()):
            if tokenizer_class is Qwen2Tokenizer:
                text = unicodedata.normalize("NFC", text)  # it normalises what it reads
            assert counts[encode(tokenizer, text)].sum() == len(text.encode())


def test_added_tokens_count_their_own_bytes():
    tokenizer = train_tokenizer(CORPUS, kind="byte")
    tokenizer.add_tokens(["naïve", "東京", "<think>"])
    text = "a naïve <think> 東京 b"
    ids = encode(tokenizer, text)
    assert set(range(257, 260)) < set(ids)
    assert token_byte_counts(tokenizer)[ids].sum() == len(text.encode())


@pytest.mark.parametrize("kind", ["metaspace-bpe", "metaspace-unigram", "llama"])
def test_byte_counts_of_sentencepiece_are_right_up_to_the_space_put_in_front(kind):
    tokenizer = sentencepiece_like(kind)
    counts = token_byte_counts(tokenizer)
    assert counts[tokenizer.all_special_ids].tolist() == [0] * len(tokenizer.all_special_ids)
    for text in ("The quick brown fox jumps over the lazy dog.", "dog", "fox fox, sleeps the dog"):
        ids = encode(tokenizer, text)
        assert tokenizer.decode(ids) == text
        assert counts[ids].sum() == len(text.encode()) + 1


def sentencepiece_like(kind: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer that marks the start of words by "▁", as Llama 1, T5 and Gemma do."""
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)] if kind == "llama" else []
    if kind == "metaspace-unigram":
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=100, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=bool(bytes_)))
        trainer = trainers.BpeTrainer(
            vocab_size=450, special_tokens=special + bytes_, show_progress=False
        )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    if bytes_:
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


RUNS = {
    "letters": "".join(random.Random(0).choices("ACGT", k=300_000)),
    "chinese": "".join(chr(0x4E00 + random.Random(1).randrange(900)) for _ in range(9)) * 9999,
    "one letter": "a" * 1_000_000,
    "blanks": " " * 1_000_000 + "end",
    "signs": "=-" * 300_000,
}


@pytest.mark.parametrize("name", RUNS)
def test_a_long_run_without_breaks_is_given_to_the_trainer_in_parts(name):
    text = RUNS[name]
    parts = list(_cut_runs([text]))
    assert "".join(parts) == text and max(map(len, parts)) <= 300
    tokenizer = train_tokenizer([text], vocab_size=262)
    part = text[:2000]
    assert tokenizer.decode(encode(tokenizer, part)) == part
    assert tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a" * 2000)[1:] == []


@pytest.mark.parametrize("text", [*CORPUS, "def f(x):\n    return x  # " + "-" * 70])
def test_ordinary_text_is_given_to_the_trainer_as_it_is(text):
    assert list(_cut_runs([text])) == [text]


def test_the_trainer_shows_progress_on_a_terminal_only(capfd):
    train_tokenizer(CORPUS, vocab_size=300)
    assert capfd.readouterr() == ("", "")


def test_runs_of_blanks_that_gemma_adds_count_as_blanks():
    vocabulary = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "<mask>",
        "▁",
        "▁▁",
        "a",
        *map("<0x{:02X}>".format, range(256)),
    ]
    tokenizer = GemmaTokenizer({token: i for i, token in enumerate(vocabulary)}, [("▁", "▁")])
    tokenizer.add_tokens(AddedToken("▁▁", normalized=False))
    text = "a   aé  "
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(6) == 2 and tokenizer.decode(ids) == text
    assert token_byte_counts(tokenizer)[ids].sum() == len(text.encode())
