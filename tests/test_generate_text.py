"""Text in, text out: streamers, pipelines, stops, the loop by hand, and bad input at the prompt."""

import importlib.util
import json
import random
import re
import runpy
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import FAMILIES, ROOT, TWO_SOON, tiny_model
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import (
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    WatermarkingConfig,
    pipeline,
    set_seed,
)

from hf_nanogpt import generate_text, load_checkpoint, stream_text, train_tokenizer
from hf_nanogpt.cli import main
from hf_nanogpt.generation import find_temperature
from hf_nanogpt.streaming import TextDecoder

TOKENIZER = train_tokenizer([], kind="byte")
LETTERS = TOKENIZER("abcdefghijklmnopqrstuvwxyz ")["input_ids"]
PROMPTS = ["the cat sat on", "a", "dogs bark"]
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


def talker(family: str = "nano"):
    """Return a random tiny model that speaks in small letters and never ends by itself."""
    model = tiny_model(family, vocab_size=len(TOKENIZER))
    others = set(range(len(TOKENIZER))) - set(LETTERS)
    model.generation_config.suppress_tokens = sorted(others)
    return model


def continue_alone(model, prompt: str, *, new_tokens: int = 12, **given) -> str:
    inputs = TOKENIZER(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, **given)
    return TOKENIZER.decode(ids[0, inputs["input_ids"].shape[1] :])


def test_streamed_pieces_are_the_text_that_generate_returns(family):
    model = talker(family)
    streamer = TextIteratorStreamer(TOKENIZER, skip_prompt=True)
    expected = continue_alone(model, "the cat", streamer=streamer)
    assert len(expected) == 12 and "".join(streamer) == expected
    settings = {"max_new_tokens": 12, "temperature": 0}
    pieces = list(stream_text(model, TOKENIZER, "the cat", **settings))
    assert "".join(pieces) == expected
    assert generate_text(model, TOKENIZER, "the cat", **settings) == ["the cat" + expected]


def test_streamed_pieces_never_cut_a_character():
    model = talker()
    ids = TOKENIZER("é€😀")["input_ids"]
    assert len(set(ids)) == 9  # bytes
    follower = zip(ids, ids[1:] + ids[:1], strict=True)
    model.generation_config.sequence_bias = [[list(pair), 1e4] for pair in follower]
    model.generation_config.suppress_tokens = None
    pieces = list(stream_text(model, TOKENIZER, "é", max_new_tokens=25, temperature=0))
    assert "".join(pieces) == "€😀é" * 2 + "€😀"
    assert all("\ufffd" not in piece for piece in pieces)


# SentencePiece's way with spaces, as in Llama 2: each word has its own, and the first is dropped.
PIECES = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
PIECES += ["▁the", "▁cat", "▁far", "▁mat", "▁", "s", "\n", "<skip>"]


def make_sentencepiece() -> PreTrainedTokenizerFast:
    ids = {piece: i for i, piece in enumerate(PIECES)}
    tokenizer = Tokenizer(models.BPE(ids, [], byte_fallback=True, unk_token="<s>"))
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    last = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), *last])
    special = {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<skip>"]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.mark.parametrize(
    "pieces",
    [
        "▁cat ▁far ▁mat",
        "▁cat s \n ▁far",
        "▁cat ▁ ▁ ▁mat",
        "▁cat <skip> ▁far",
        "<skip> ▁cat",
        "▁cat <0xE2> <0x82> <0xAC> ▁mat",
        "▁cat <0xE2> <0x82>",  # a character cut off
        "<0x0A> <0xC3> ▁mat",
    ],
)
@pytest.mark.parametrize("prompt", ["<s> ▁the", "<s>", ""])
def test_streamed_text_is_what_the_tokens_add_to_the_text_of_the_prompt(prompt, pieces):
    tokenizer = make_sentencepiece()
    before, after = ([PIECES.index(p) for p in text.split(" ") if p] for text in (prompt, pieces))
    decoder = TextDecoder(tokenizer, before)
    streamed = "".join(map(decoder.add, after)) + decoder.finish()
    start, whole = (tokenizer.decode(i, skip_special_tokens=True) for i in (before, before + after))
    assert start + streamed == whole


@pytest.mark.parametrize(
    ("prompt", "pieces", "expected"),
    [
        ("▁the <0xE2> <0x82>", "<0xAC> ▁mat", "€ mat"),  # the rest of a character
        ("▁the <0xE2>", "<0x82> <0xAC>", "€"),
        ("<0xE2> <0x82>", "<0xAC> ▁mat", "€ mat"),
        ("▁the <0xE2>", "▁mat", " mat"),  # its rest does not come
        (
            "▁the <0xE2> <0x82> <0xAC>",
            "<0x82> ▁mat",
            "\ufffd mat",
        ),  # an invalid byte after a whole one
        ("▁the <0xE2> <0x82> <0xAC>", "<0xC3> <0xA9> <0xFF>", "\ufffd" * 3),
        ("▁the <0xE2> <0x82> <0xAC>", "<0xC3> <0xA9> ▁mat", "é mat"),
        ("▁the <0xE2> <0x82> <0xAC>", "▁mat", " mat"),
        ("<s> <0xE2> <0x82> <0xAC>", "▁mat", " mat"),
    ],
)
def test_bytes_after_a_prompt_of_bytes_spoil_no_character_and_complete_one(
    prompt, pieces, expected
):
    tokenizer = make_sentencepiece()
    before, after = ([PIECES.index(p) for p in text.split(" ")] for text in (prompt, pieces))
    decoder = TextDecoder(tokenizer, before)
    streamed = "".join(map(decoder.add, after)) + decoder.finish()
    assert streamed == expected
    whole = tokenizer.decode(before + after, skip_special_tokens=True)
    # One byte that is invalid makes the decoder of the tokenizer spoil all that stand beside it.
    assert whole.endswith(streamed)


def test_text_goes_on_after_the_prompt_with_the_space_of_its_first_word():
    tokenizer = make_sentencepiece()
    model = tiny_model("nano", vocab_size=len(PIECES))
    cat = PIECES.index("▁cat")
    model.generation_config.suppress_tokens = [i for i in range(len(PIECES)) if i != cat]
    settings = {"max_new_tokens": 2, "temperature": 0}
    assert generate_text(model, tokenizer, "the", **settings) == ["the cat cat"]
    ids = torch.tensor([tokenizer("the").input_ids])
    assert "".join(stream_text(model, tokenizer, ids, **settings)) == "cat cat"


def test_autocast_of_the_caller_holds_while_text_is_generated():
    model, seen = talker(), []
    model.lm_head.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    for enabled, expected in ((True, torch.bfloat16), (False, torch.float32)):
        seen.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            generate_text(model, TOKENIZER, "the", max_new_tokens=2, temperature=0)
        assert set(seen) == {expected}


@pytest.mark.parametrize("family", TWO_SOON)
def test_pipeline_gives_each_prompt_of_a_batch_the_text_it_gets_alone(family):
    model = talker(family)
    speak = pipeline("text-generation", model=model, tokenizer=TOKENIZER, device="cpu")
    answers = speak(PROMPTS, batch_size=3, max_new_tokens=12, do_sample=False)
    for prompt, [answer] in zip(PROMPTS, answers, strict=True):
        assert answer["generated_text"] == prompt + continue_alone(model, prompt)


def test_pipeline_answers_chat_messages():
    tokenizer = train_tokenizer([], kind="byte")
    tokenizer.chat_template = TEMPLATE
    model = talker()
    speak = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    answers = speak(chats, batch_size=3, max_new_tokens=12, do_sample=False)
    for chat, [answer] in zip(chats, answers, strict=True):
        reply = continue_alone(model, f"[user]{chat[0]['content']}[assistant]")
        expected = [*chat, {"role": "assistant", "content": reply}]
        assert answer["generated_text"] == expected


def test_text_ends_after_the_first_stop_string():
    model = talker()
    text = continue_alone(model, "the cat", new_tokens=30)
    stops = [text[14:16], text[8:11]]
    expected = text[: min(text.index(stop) + len(stop) for stop in stops)]
    given = {"max_new_tokens": 30, "temperature": 0, "stop_strings": stops}
    assert "".join(stream_text(model, TOKENIZER, "the cat", **given)) == expected
    native = continue_alone(
        model, "the cat", new_tokens=30, stop_strings=stops, tokenizer=TOKENIZER
    )
    assert native == expected


def test_text_ends_at_each_eos_of_the_checkpoint_unless_told_otherwise():
    model = talker()
    text = continue_alone(model, "the cat", new_tokens=20)
    ends = TOKENIZER.convert_tokens_to_ids([text[9], text[15]])
    model.generation_config.eos_token_id = ends
    first = min(text.index(text[9]), text.index(text[15]))

    def speak(**given):
        pieces = stream_text(model, TOKENIZER, "the cat", max_new_tokens=20, temperature=0, **given)
        return "".join(pieces)

    assert speak() == text[: first + 1]
    assert speak(stop_at_eos=False) == text


def test_settings_left_out_are_the_checkpoints_own():
    model = talker()
    free = generate_text(model, TOKENIZER, "a", seed=1, max_new_tokens=20)
    model.generation_config.top_k = 1
    [careful] = generate_text(model, TOKENIZER, "a", seed=1, max_new_tokens=20)
    assert careful == "a" + continue_alone(model, "a", new_tokens=20)
    assert generate_text(model, TOKENIZER, "a", seed=1, max_new_tokens=20, top_k=0) == free


def test_same_seed_gives_the_same_text():
    model = talker()
    first, second = generate_text(model, TOKENIZER, "a", seed=3, num_samples=2)
    assert len(first) == len("a") + 63  # to the end of the context, which is less than 100
    assert generate_text(model, TOKENIZER, "a", seed=3) == [first]
    assert generate_text(model, TOKENIZER, "a", seed=4) == [second]
    assert first != second


@pytest.mark.parametrize(
    ("own", "given"),
    [
        ({}, {}),
        ({}, {"top_k": 3, "top_p": 0.9}),
        ({"top_k": 5, "typical_p": 0.9, "eta_cutoff": 1e-3}, {}),
        ({"top_k": 5, "typical_p": 0.9, "eta_cutoff": 1e-3}, {"top_k": 3, "min_p": 0.1}),
        ({"watermarking_config": WatermarkingConfig(bias=2.5)}, {"min_p": 0.1}),
    ],
)
def test_sampled_text_is_that_of_transformers_after_the_same_seed(own, given):
    model = talker()
    model.generation_config.update(do_sample=True, repetition_penalty=1.2, **own)
    inputs = TOKENIZER("the cat", return_tensors="pt")
    settings = {"top_k": own.get("top_k", 0), "temperature": 0.7} | given
    set_seed(3)
    ids = model.generate(**inputs, do_sample=True, max_new_tokens=15, **settings)
    expected = [TOKENIZER.decode(ids[0])]
    given = {"max_new_tokens": 15, "temperature": 0.7, "stop_at_eos": False} | given
    assert generate_text(model, TOKENIZER, "the cat", seed=3, **given) == expected
    set_seed(3)
    assert generate_text(model, TOKENIZER, "the cat", **given) == expected


@pytest.mark.slow
def test_threads_with_seeds_of_their_own_get_the_texts_they_get_alone():
    model = talker()

    def speak(seed: int) -> list[str]:
        return generate_text(model, TOKENIZER, "a", seed=seed, max_new_tokens=40)

    alone = [speak(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(speak, range(4))) == alone and len(set(map(tuple, alone))) == 4


def test_a_seed_moves_no_source_of_chance_of_the_process():
    model = talker()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    generate_text(model, TOKENIZER, "a", seed=0, max_new_tokens=12)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert after == before


@pytest.mark.parametrize("where", ["prompt", "text"])
def test_nothing_that_a_terminal_obeys_is_printed(where, checkpoint, tmp_path, capsys):
    evil = "\x1b]0;title\x07\x1b[2J\x9b2J\x7f"
    if where == "prompt":
        assert main(["generate", str(checkpoint), f"{evil}\r\n\té", "--max_new_tokens=3"]) == 0
    else:  # a model that writes escapes
        model = talker()
        model.generation_config.suppress_tokens = [
            i for i in range(len(TOKENIZER)) if i not in TOKENIZER("\x1b[2J")["input_ids"]
        ]
        model.save_pretrained(tmp_path)
        TOKENIZER.save_pretrained(tmp_path)
        assert main(["generate", str(tmp_path), "a", "--max_new_tokens=40", "--seed=1"]) == 0
    out = capsys.readouterr().out
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", out) and "\\x1b" in out
    assert where == "text" or out.startswith("\\x1b]0;title\\x07\\x1b[2J\\x9b2J\\x7f\n\té")


def test_messages_hold_no_control_characters(capsys):
    assert main(["info", "no\x1b[2Jsuch\x9bmodel"]) == 2
    assert main(["\x1b[2J"]) == 2
    error = capsys.readouterr().err
    assert "\\x1b[2J" in error and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", error)


def test_empty_prompt_starts_from_the_bos_token():
    model = talker()
    bos = torch.tensor([[TOKENIZER.bos_token_id]])
    ids = model.generate(
        bos, attention_mask=torch.ones_like(bos), max_new_tokens=8, do_sample=False
    )
    expected = TOKENIZER.decode(ids[0, 1:])
    assert generate_text(model, TOKENIZER, "", max_new_tokens=8, temperature=0) == [expected]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talker")
    talker().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


# the loop by hand


def load_example(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"examples/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("eos", [None, 0, 17, [17, 23]], ids=str)
def test_loop_by_hand_ends_where_generate_does(eos, tokens):
    model = tiny_model("nano", eos_token_id=eos)
    model.generation_config.eos_token_id = eos
    given = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    for ids in tokens.repeat_interleave(1, dim=0).split(1):
        expected = model.generate(ids, **given)
        by_hand = load_example("generate_by_hand").generate_by_hand
        assert torch.equal(by_hand(model, ids, torch.ones_like(ids), new_tokens=40), expected)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, 0.8),
        ({"temperature": 0.35, "do_sample": True}, 0.35),
        ({"do_sample": True}, 1.0),  # as transformers' own generate() does
    ],
)
def test_generate_takes_the_temperature_of_the_checkpoint_and_a_flag_wins(
    own, expected, tmp_path, capsys
):
    model = tiny_model(vocab_size=len(TOKENIZER))
    model.generation_config.update(**own)
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    assert find_temperature(load_checkpoint(tmp_path)[0]) == expected

    def write(*flags):
        command = ["generate", str(tmp_path), "the", "--seed=1", "--max_new_tokens=20", *flags]
        assert main(command) == 0
        return capsys.readouterr().out

    assert write() == write(f"--temperature={expected}") != write("--temperature=3")
    assert write("--greedy") == write("--temperature=0") != write()


@pytest.mark.parametrize(
    ("family", "use_cache", "temperature"),
    [
        *((name, True, 0) for name in FAMILIES),
        ("gpt2", True, 0.7),
        ("nano", True, 0.7),
        ("nano", False, 0),
        ("gpt3", False, 0.7),
    ],
)
def test_loop_by_hand_gives_the_tokens_of_generate(family, use_cache, temperature, tokens):
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    model, sampling = tiny_model(family), {"temperature": 0.7, "top_k": 0, "do_sample": True}
    model.generation_config.eos_token_id = 17  # which some rows come to, and some do not
    inputs = {"input_ids": (tokens * mask).repeat(4, 1), "attention_mask": mask.repeat(4, 1)}
    set_seed(0)
    given = sampling if temperature else {"do_sample": False}
    expected = model.generate(**inputs, max_new_tokens=20, **given)
    set_seed(0)
    by_hand = load_example("generate_by_hand").generate_by_hand
    found = by_hand(
        model, *inputs.values(), new_tokens=20, temperature=temperature, use_cache=use_cache
    )
    assert torch.equal(found, expected)


def test_loop_by_hand_prints_the_texts_and_what_the_cache_saves(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generate_by_hand.py", str(checkpoint), "ab", "c"])
    runpy.run_path(str(ROOT / "examples/generate_by_hand.py"), run_name="__main__")
    first, mark, second, _, last = capsys.readouterr().out.splitlines()
    assert first.startswith("ab") and mark == "---" and second.startswith("c")
    assert re.fullmatch(r"With a cache .* s, without .* s: it saves .*% of the time\.", last)


# bad input


@pytest.fixture
def damage(checkpoint, tmp_path):
    """A function from the name of a fault to a checkpoint with it."""

    def edit(name: str, **fields):
        path = tmp_path / "copy" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    def add_word():
        tokenizer = train_tokenizer([], kind="byte")
        tokenizer.add_tokens(["<new>"])
        tokenizer.save_pretrained(tmp_path / "copy")

    faults = {
        "none": lambda: None,
        "no tokenizer": lambda: [path.unlink() for path in (tmp_path / "copy").glob("token*")],
        "no bos": lambda: edit("tokenizer_config.json", bos_token=None),
        "larger tokenizer": add_word,
    }

    def copy(fault: str):
        shutil.copytree(checkpoint, tmp_path / "copy")
        faults[fault]()
        return tmp_path / "copy"

    return copy


BAD = {
    "empty prompt without bos": ("no bos", "", [], "this tokenizer has none: give a text"),
    "prompt longer than the context": ("none", "a" * 64, [], "64 tokens.*context is 64"),
    "no room": ("none", "a" * 60, ["--max_new_tokens=5"], "at most 4 tokens"),
    "negative length": ("none", "a", ["--max_new_tokens=-3"], "max_new_tokens=-3"),
    "more than the context": ("none", "a", ["--max_new_tokens=64"], "at most 63 tokens"),
    "zero length": ("none", "a", ["--max_new_tokens=0"], "max_new_tokens=0"),
    "negative samples": ("none", "a", ["--num_samples=-1"], "num_samples=-1"),
    "negative temperature": ("none", "a", ["--temperature=-0.1"], "temperature=-0.1"),
    "temperature too low": ("none", "a", ["--temperature=1e-40"], "temperature=1e-40.*0.001"),
    "infinite temperature": ("none", "a", ["--temperature=inf"], "temperature=inf"),
    "temperature no number": ("none", "a", ["--temperature=nan"], "temperature=nan"),
    "top_p of zero": ("none", "a", ["--top_p=0"], "top_p=0.0.*above 0 and at most 1"),
    "top_p above one": ("none", "a", ["--top_p=1.01"], "top_p=1.01"),
    "negative top_k": ("none", "a", ["--top_k=-2"], "top_k=-2"),
    "min_p above one": ("none", "a", ["--min_p=2"], "min_p=2"),
    "penalty of zero": ("none", "a", ["--repetition_penalty=0"], "repetition_penalty=0"),
    "negative seed": ("none", "a", ["--seed=-1"], "seed=-1"),
    "empty stop": ("none", "a", ["--stop="], "stop_strings .*at least one character"),
    "no tokenizer": ("no tokenizer", "a", [], "has no tokenizer"),
    "larger tokenizer": ("larger tokenizer", "a", [], "258 tokens.*vocab_size=257"),
    "text that is not Unicode": ("none", "\udcff", [], "cannot encode.*surrogates"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_to_generate_is_one_sentence_and_exit_code_2(name, damage, capsys):
    fault, prompt, flags, words = BAD[name]
    assert main(["generate", str(damage(fault)), prompt, *flags]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    [sentence] = [line for line in output.err.splitlines() if line.startswith("hf-nanogpt: ")]
    assert re.search(words, sentence), sentence


def test_token_id_beyond_the_vocabulary_is_refused():
    words = Tokenizer(models.WordLevel({"a": 3, "b": 900}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert len(tokenizer) == 2
    with pytest.raises(ValueError, match=r"token id 900.*vocab_size=257"):
        generate_text(talker(), tokenizer, "b", max_new_tokens=2)


def test_a_model_whose_logits_are_nan_writes_nothing():
    model = talker()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="probabilities are NaN"):
        generate_text(model, TOKENIZER, "the cat", max_new_tokens=3, seed=0)
