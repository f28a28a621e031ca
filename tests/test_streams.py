"""Output that cannot be written never stops a training and never shows a traceback."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from children import forked, run_child, run_command
from conftest import tiny_model

from hf_nanogpt import train_tokenizer
from hf_nanogpt.cli import main

pytestmark = forked
SIZE = ["--n_layer=1", "--n_embd=16", "--n_head=2", "--block_size=16", "--tokenizer=char"]
QUICK = [*SIZE, "--max_steps=4", "--per_device_train_batch_size=2", "--num_threads=1"]
FULL = "standard output cannot be written: No space left on device"


def _close_pipe(number: int) -> None:
    reading, writing = os.pipe()
    os.close(reading)  # as `| head` does
    os.dup2(writing, number)


def _fill_disk(number: int) -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), number)


def _know_ascii_only(number: int) -> None:
    name = {1: "stdout", 2: "stderr"}[number]
    raw = io.FileIO(number, "w", closefd=False)
    stream = io.TextIOWrapper(io.BufferedWriter(raw), encoding="ascii")
    setattr(sys, name, stream)
    setattr(sys, f"__{name}__", stream)


def _run(argv: list[str], changes: tuple[tuple[Callable, int], ...]) -> None:
    for change, number in changes:
        change(number)
    sys.exit(main(argv))


def run(argv: list, *changes: tuple[Callable, int]) -> tuple[int, str, str]:
    """Run a command in a process with other streams; return its code and what came out."""
    done = run_child(_run, [str(word) for word in argv], changes)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("Größe 東京 🦊 und so fort.\n" * 60, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("model"), train_tokenizer([], kind="byte")
    tiny_model("nano", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "numbers"),
    [
        (_close_pipe, (1, 2)),
        pytest.param(_close_pipe, (1,), marks=pytest.mark.slow),
        pytest.param(_fill_disk, (1,), marks=pytest.mark.slow),
        pytest.param(_know_ascii_only, (1, 2), marks=pytest.mark.slow),
    ],
)
def test_training_continues_without_its_output_and_saves(text, tmp_path, change, numbers):
    argv = ["train", "--data", text, "--output_dir", tmp_path / "run", *QUICK]
    argv.append("--sample_prompt=Größe 東京")
    code, out, err = run(argv, *((change, number) for number in numbers))
    assert code == 0 and "Traceback" not in out + err
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["train_steps"] == 4
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert "Größe 東京" in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    if change is _know_ascii_only:
        assert r"Gr\xf6\xdfe" in out
    if numbers == (1,):
        told = f"hf-nanogpt: {FULL}; the work continues."
        assert err.count(told) == (change is _fill_disk)


def test_what_is_not_text_is_refused_before_training_and_not_at_its_end(text, tmp_path):
    argv = ["train", "--data", text, "--output_dir", tmp_path / "run", *QUICK]
    for word in ("--sample_prompt=\udcff", "--from=\udcff"):
        code, _, err = run([*argv, word])
        assert code == 2 and r"\udcff" in err and "is not UTF-8 text" in err
    assert not (tmp_path / "run").exists()


def test_what_only_prints_ends_quietly_without_a_reader_and_tells_a_full_disk(checkpoint):
    for argv in (["generate", checkpoint, "abc", "--max_new_tokens=4"], ["--help"]):
        assert run(argv, (_close_pipe, 1)) == (0, "", "")
        assert run(argv, (_fill_disk, 1)) == (2, "", f"hf-nanogpt: {FULL}\n")


@pytest.mark.slow
def test_closed_streams_are_a_sentence_or_quiet_success(checkpoint, tmp_path):
    code = """if True:
        import os, sys
        from hf_nanogpt.cli import main
        folder, file = sys.argv[1:]
        for argv in (["generate", folder, "-", "--max_new_tokens=2"], ["explain", folder, "abc"],
                     ["explain", folder, "-"], ["chat", folder], ["info", folder], ["--version"]):
            assert main(argv) in (0, 2), argv
        assert os.open(file, os.O_RDONLY) > 2  # else messages would go into files
        open(file, "w").write("done")"""
    path = tmp_path / "result"
    path.touch()
    shell = 'exec "$0" -c "$@" <&- >&- 2>&-'
    command = ["bash", "-c", shell, sys.executable, code, str(checkpoint), str(path)]
    assert subprocess.run(command, timeout=120).returncode == 0
    assert path.read_text() == "done"


def test_a_sample_in_training_is_no_command_to_the_terminal(tmp_path):
    (tmp_path / "text.txt").write_text("abc \x1b[2J def \x9b " * 300, encoding="utf-8")
    flags = ["--use_cpu", "--eval_steps=1", "--sample_prompt=abc \x1b[2J", "--max_steps=2"]
    flags += [f"--data={tmp_path}/text.txt", f"--output_dir={tmp_path}/run"]
    done = run_command("train", *QUICK, *flags)
    assert done.returncode == 0, done.stderr
    printed = done.stdout + done.stderr
    assert "\\x1b[2J" in printed and "\x1b[2J" not in printed and "\x9b" not in printed
