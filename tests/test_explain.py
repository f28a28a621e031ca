"""`hf-nanogpt explain` shows what the model computes, in the table and on the page."""

import base64
import json
import math
import os
import re
import sys
from collections import Counter

import pytest
import torch
from browser import MISSING, open_browser
from conftest import tiny_model
from transformers import LlamaTokenizer

from hf_nanogpt import explain_text, train_tokenizer
from hf_nanogpt.analysis.explain import MAX_WEIGHTS, render_page, render_table
from hf_nanogpt.analysis.likeliest import show_token, spell_tokens
from hf_nanogpt.cli import main
from hf_nanogpt.errors import UserError

TOKENIZER = train_tokenizer([], kind="byte")
TEXT = 'a "text"\twith\n</script><b>&amp; é'
ESCAPE = "\x1b["


def speaker(family: str = "nano", **overrides):
    return tiny_model(family, vocab_size=len(TOKENIZER), **overrides)


def encode(text: str) -> torch.Tensor:
    return torch.tensor([[TOKENIZER.bos_token_id, *TOKENIZER(text)["input_ids"]]])


# The numbers


def test_mean_surprise_is_the_models_loss_in_bits(family):
    model, ids = speaker(family), encode(TEXT)
    explanation = explain_text(model, TOKENIZER, TEXT)
    loss = model(ids, labels=ids, use_cache=False).loss.item()
    assert explanation.bits_per_token == pytest.approx(loss / math.log(2), rel=1e-5)
    assert explanation.bits == pytest.approx(loss * len(TEXT.encode()) / math.log(2), rel=1e-5)


def test_each_position_has_the_softmax_after_the_tokens_before_it(family):
    model, ids = speaker(family), encode("a text")
    positions = explain_text(model, TOKENIZER, "a text").positions
    assert [p.token for p in positions] == ["<|endoftext|>", *"a text", None]
    assert (positions[0].bits, positions[0].likeliest) == (None, [])
    for t in range(1, len(positions)):
        with torch.no_grad():
            chances = model(ids[:, :t], use_cache=False).logits[0, -1].softmax(-1)
        order = chances.argsort(descending=True).tolist()
        shares = [share for _, share in positions[t].likeliest]
        assert shares == pytest.approx(chances[order[:5]].tolist(), rel=1e-4)
        if t < ids.shape[1]:
            assert positions[t].rank == order.index(ids[0, t]) + 1
            assert positions[t].bits == pytest.approx(-math.log2(chances[ids[0, t]]), rel=1e-4)


def test_untrained_model_finds_all_tokens_equally_likely():
    model = speaker(initializer_range=None)  # its head is zero
    positions = explain_text(model, TOKENIZER, "a text").positions
    assert [p.bits for p in positions[1:-1]] == pytest.approx([math.log2(257)] * 6)
    assert "*" not in render_table(explain_text(model, TOKENIZER, "a text"))


def test_attention_rows_sum_to_one_and_nothing_above_the_diagonal_is_used(family):
    model = speaker(family)
    attention = explain_text(model, TOKENIZER, "a text", with_attention=True).attention
    config = model.config
    assert attention.shape == (config.num_hidden_layers, config.num_attention_heads, 7, 7)
    torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:3]))
    assert attention.triu(1).count_nonzero() == 0
    assert config._attn_implementation == "sdpa"  # as before
    assert explain_text(model, TOKENIZER, "a text").attention is None


def test_text_that_fills_the_context_is_read_and_one_token_more_is_refused():
    model = speaker()
    assert len(explain_text(model, TOKENIZER, "a" * 63).positions) == 65
    with pytest.raises(UserError, match=r"65 tokens.*context is 64"):
        explain_text(model, TOKENIZER, "a" * 64)
    [start, following] = explain_text(model, TOKENIZER, "").positions
    assert start.token == "<|endoftext|>" and len(following.likeliest) == 5


def test_every_token_is_visible():
    texts = [p.token for p in explain_text(speaker(), TOKENIZER, "é \n").positions]
    assert texts[1:-1] == ["<C3>", "<A9>", " ", "\n"]
    assert [show_token(text) for text in (" a", "\n", "\t", "\x1b[2J\u202e")] == [
        "·a",
        "↵",
        "⇥",
        "\\x1b[2J\\u202e",
    ]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "▁a": 5}
    sentencepiece = LlamaTokenizer(vocab=vocabulary, merges=[("▁", "a")])
    found = explain_text(tiny_model(), sentencepiece, "a a").positions
    assert [p.token for p in found] == ["<s>", " a", " a", None]
    names = {name for position in found for name, _ in position.likeliest}
    assert any(re.fullmatch(r"<[1-6]?\d>", name) for name in names)  # ids without a token


def test_byte_tokens_of_llama_and_added_tokens_are_readable():
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0xE9>": 3, "<0x41>": 4, "a": 5}
    llama = LlamaTokenizer(vocab=vocabulary, merges=[])
    assert spell_tokens(llama, [3, 4, 5]) == ["<E9>", "A", "a"]
    tokenizer = train_tokenizer([], kind="byte")
    tokenizer.add_tokens(["é", "<thought>"])
    ids = tokenizer("é<thought>").input_ids
    assert spell_tokens(tokenizer, ids) == ["é", "<thought>"]


# The table


def test_table_has_a_line_for_each_position_and_marks_what_came():
    explanation = explain_text(speaker(), TOKENIZER, TEXT)
    *lines, empty, total = render_table(explanation).splitlines()
    positions = explanation.positions
    assert len(lines) == len(positions) + 1 and empty == ""
    for position, line in zip(positions, lines[1:], strict=True):
        assert line.count("%") == len(position.likeliest)
        assert position.bits is None or f" {position.bits:.1f} " in line
        assert re.search(r" \*\S", line) is not None or (position.rank or 6) > 5
    assert total.startswith(f"{explanation.bits:.1f} bits in total")


@pytest.mark.parametrize("width", [80, 200])
def test_table_fits_the_width_and_has_no_control_character(width):
    table = render_table(explain_text(speaker(), TOKENIZER, TEXT + "\x07日本"), width=width)
    assert max(map(len, table.splitlines())) <= width
    assert all(c.isprintable() for c in table.replace("\n", ""))


def test_color_changes_nothing_but_the_color():
    explanation = explain_text(speaker(), TOKENIZER, TEXT)
    colored = render_table(explanation, color=True)
    assert ESCAPE in colored
    plain = re.sub(r"\x1b\[[\d;]*m", "", colored)
    assert plain.split() == render_table(explanation).split()


# The page


def data_of(page: str) -> dict:
    [data] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(data)


def test_page_fetches_nothing_and_holds_the_figures():
    explanation = explain_text(speaker(), TOKENIZER, TEXT, with_attention=True)
    page = render_page(explanation, title="</script><b>mine</b>")
    assert data_of(page)["title"] == "</script><b>mine</b>"
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|\bsrc=|url\(|@import|<link|innerHTML|fetch\(", page)
    data = data_of(page)
    assert Counter(p["token"] for p in data["positions"]) == Counter(
        p.token and show_token(p.token) for p in explanation.positions
    )
    weights = torch.frombuffer(bytearray(base64.b64decode(data["weights"])), dtype=torch.uint8)
    rows = torch.ones(explanation.attention.shape[-2:]).tril().bool()
    expected = explanation.attention[:, :, rows].flatten()
    torch.testing.assert_close(weights / 255, expected, rtol=0, atol=0.5 / 255 + 1e-6)
    assert data["future"] == 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speaker")
    speaker("gpt3").save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.mark.skipif(bool(MISSING), reason=f"needs the Debian packages of {', '.join(MISSING)}")
def test_page_works_in_a_browser_without_a_network(checkpoint, tmp_path, capsys):
    assert main(["explain", str(checkpoint), TEXT, "--html", str(tmp_path / "page.html")]) == 0
    explanation = data_of((tmp_path / "page.html").read_text(encoding="utf-8"))
    length, heads = len(explanation["positions"]) - 1, explanation["layers"] * explanation["heads"]
    with open_browser("--host-resolver-rules=MAP * ~NOTFOUND") as browser:
        browser.open((tmp_path / "page.html").as_uri())

        def text(selector: str) -> str:
            return browser.run(f"return document.querySelector({selector!r}).textContent")

        def count(selector: str) -> int:
            return browser.run(f"return document.querySelectorAll({selector!r}).length")

        assert count("#text button") == length and count("#heads canvas") == heads
        assert count("script") == 2 and count("b") == 0  # markup in the text stays text
        browser.point("#map", 0.5 / length, 0.5 / length)
        assert "(0) looks at" in text("#readout") and "weight 100 %" in text("#readout")
        browser.point("#map", 10.5 / length, 2.5 / length)
        assert "(2) cannot see" in text("#readout") and "future" in text("#readout")
        assert "(2) the model expects" in text("#place") and count("#likeliest tr") == 5
        assert count("#text button.future") == length - 3
        browser.run("document.querySelectorAll('#text button')[2].focus()")
        browser.press("\ue014")  # the right arrow
        assert "(3) the model expects" in text("#place")
        browser.point("#heads .map:last-child", 0.1, 0.9)
        assert "layer 3, head 4" in text("#readout")
        browser.point("#heads .map:last-child", 0.1, 0.9, click=True)
        assert text("#h-map").endswith("layer 3, head 4")
        # A canvas is transparent exactly above the diagonal, where no weight is used.
        drawn = "e.getContext('2d').getImageData(0, 0, e.width, e.height).data"
        for rows in browser.run(
            f"return [...document.querySelectorAll('canvas')].map(e => [...{drawn}]"
            ".filter((_, i) => i % 4 === 3).map(alpha => alpha > 0))"
        ):
            assert (
                torch.tensor(rows)
                .view(length, length)
                .equal(torch.ones(length, length).tril().bool())
            )
        assert browser.log() == []


# The command


def test_command_prints_the_table_without_color_into_a_pipe(checkpoint, capsys, monkeypatch):
    assert main(["explain", str(checkpoint), "a text"]) == 0
    output = capsys.readouterr().out
    assert "bits per token" in output and ESCAPE not in output


@pytest.mark.parametrize(("no_color", "colored"), [(None, True), ("", True), ("1", False)])
def test_command_colors_a_terminal_unless_no_color_is_set(
    no_color, colored, checkpoint, monkeypatch
):
    os.environ.pop("NO_COLOR", None)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    reader, writer = os.openpty()
    with open(writer, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert main(["explain", str(checkpoint), "a"]) == 0
    assert (ESCAPE in os.read(reader, 65536).decode()) is colored
    os.close(reader)


def test_bad_input_to_explain_is_one_sentence_and_leaves_nothing(checkpoint, capsys, tmp_path):
    (tmp_path / "old.html").write_text("mine")
    cases = {
        ("a" * 64,): "65 tokens",
        ("a", "--html", tmp_path / "page.txt"): "must end in .html",
        ("a", "--html", tmp_path / "old.html"): "already exists",
        ("a", "--html", tmp_path / "old.html" / "page.html"): "cannot write",
        ("\udcff",): "cannot encode",
        (): "text",
        ("a", "--htm", "x"): "--html",
    }
    for argv, message in cases.items():
        assert main(["explain", str(checkpoint), *map(str, argv)]) == 2, argv
        [sentence] = capsys.readouterr().err.splitlines()[-1:]
        assert sentence.startswith("hf-nanogpt: ") and message in sentence, sentence
    assert [path.name for path in tmp_path.iterdir()] == ["old.html"]
    assert (tmp_path / "old.html").read_text() == "mine"


def test_page_too_large_for_a_browser_is_refused_before_it_is_made():
    model = speaker(block_size=4096)
    heads = model.config.num_hidden_layers * model.config.num_attention_heads
    room = math.isqrt(2 * MAX_WEIGHTS // heads)
    with pytest.raises(UserError, match=f"has room for {room}"):
        explain_text(model, TOKENIZER, "a" * room, with_attention=True)
