"""Several checkpoints in one table and one plot."""

from pathlib import Path

import pytest
from conftest import tiny_model
from test_quantization import needs_int8

from hf_nanogpt import evaluate, load_checkpoint, train_tokenizer
from hf_nanogpt.analysis.compare import format_table
from hf_nanogpt.cli import main
from hf_nanogpt.quantization import quantize_model


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """A folder with two checkpoints of different families and tokenizers, and a text."""
    monkeypatch.chdir(tmp_path)
    Path("my.txt").write_text("Ein Text, naïve 東京.\n" * 9, encoding="utf-8")
    for family, tokenizer_type in {"nano": "byte", "gpt2": "char"}.items():
        text = Path("my.txt").read_text(encoding="utf-8")
        tokenizer = train_tokenizer([text], kind=tokenizer_type)
        tiny_model(family, vocab_size=len(tokenizer)).save_pretrained(family)
        tokenizer.save_pretrained(family)
    return tmp_path


def test_table_has_a_row_for_each_checkpoint(workplace, capsys):
    flags = ["--data=my.txt", "--stride=9", "--context_length=32", "--plot=plot.svg"]
    assert main(["eval", "nano", "gpt2", *flags]) == 0
    printed, noise = capsys.readouterr()
    lines = printed.splitlines()
    assert not noise  # a bar is for a terminal
    drawn = Path("plot.svg").read_text(encoding="utf-8")
    assert lines[0].split("  ")[0] == "checkpoint"
    for name, line in zip(("nano", "gpt2"), lines[1:3], strict=True):
        result = evaluate(name, "my.txt", stride=9, context_length=32)
        losses = f"{result.loss:.4f}", f"{result.perplexity:.2f}", f"{result.bits_per_byte:.4f}"
        assert line.split() == [name, *losses, f"{result.num_tokens}", f"{result.num_bytes}"]
        assert f"<!-- {name} -->" in drawn and f"<!-- {result.bits_per_byte:.3f} -->" in drawn
    assert {path.name for path in workplace.iterdir()} == {"my.txt", "nano", "gpt2", "plot.svg"}


@needs_int8
def test_rounded_weights_and_the_held_out_part_are_measured(workplace, capsys):
    model, tokenizer = load_checkpoint("nano")
    quantize_model(model)
    for flags, settings in {(): {}, ("--held_out=0.3",): {"held_out": 0.3}}.items():
        assert main(["eval", "nano", "--data=my.txt", "--quantize=int8", *flags]) == 0
        result = evaluate(model, "my.txt", tokenizer=tokenizer, **settings)
        output = capsys.readouterr().out.split()
        assert f"{result.loss:.4f}" in output and f"{result.num_bytes}" in output
        whole = len(Path("my.txt").read_bytes())
        assert (result.num_bytes < whole) == bool(flags)


def test_columns_are_aligned():
    rows = [["a", "loss"], ["longer", "1.5"]]
    assert format_table(rows) == "a       loss\nlonger   1.5"


def test_bad_input_is_one_sentence_before_any_work(workplace, capsys):
    cases = {
        ("nano",): "--data --tasks",
        ("nano", "--data=my.txt", "--tasks=x"): "--tasks",
        ("nano", "--data=my.txt", "--limit=3"): "--limit is for --tasks only",
        ("nano", "--tasks=x", "--stride=3"): "--stride is for --data only",
        ("nano", "--tasks=x", "--held_out=0.1"): "--held_out is for --data only",
        ("nano", "--data=my.txt", "--held_out=1"): "held_out=1.0 must be between 0 and 1",
        ("nano", "none", "--data=my.txt"): "no checkpoint at none",
        ("nano", "--data=my.txt", "--stride=64"): "stride=64 is out of range",
        ("nano", "--data=my.txt", "--plot=plot.txt"): ".png, .svg, .pdf",
        ("nano", "--data=my.txt", "--plot=none/plot.png"): "no folder none",
    }
    Path("a.png").mkdir()
    cases["nano", "--data=my.txt", "--plot=a.png/"] = "is a folder"
    for argv, message in cases.items():
        assert main(["eval", *argv]) == 2, argv
        output = capsys.readouterr()
        assert message in output.err and not output.out
