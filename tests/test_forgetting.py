"""Fine-tuning says what it cost on the text of the training before, if that is still here."""

import json
from pathlib import Path

import pytest
from conftest import CORPUS
from datasets import Dataset

from hf_nanogpt import evaluate, load_checkpoint, train
from hf_nanogpt.training import forgetting
from hf_nanogpt.training.forgetting import (
    OldText,
    find_old_text,
    measure_forgetting,
    tell_forgetting,
)

FAST = {"disable_tqdm": True, "num_threads": 1, "use_cpu": True, "sample_steps": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a text, and a checkpoint that was trained on it."""
    place = tmp_path_factory.mktemp("place")
    (place / "old.txt").write_text(CORPUS, encoding="utf-8")
    shape = {"tokenizer": "char", "n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 32}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        data = str(place / "old.txt")
        train("quickstart", data=data, output_dir="base", max_steps=4, **shape, **FAST)
    return place


def test_the_cost_is_what_eval_measures_on_the_old_text(place, monkeypatch):
    monkeypatch.chdir(place)
    Path("new.txt").write_text("abc " * 400, encoding="utf-8")
    settings = FAST | {"data": "new.txt", "max_steps": 4, "learning_rate": 1e-2}
    result = train("finetune", start_from="base", output_dir="tuned", **settings)
    cost = result.metrics["old_text"]
    tail = Dataset.from_dict({"text": [CORPUS[int(len(CORPUS) * 0.97) :]]})  # quickstart's share
    assert cost["data"] == "old.txt" and cost["eval_bytes"] == len(tail["text"][0].encode())
    for folder, name in (("base", "before"), ("tuned", "after")):
        assert cost[name] == pytest.approx(
            evaluate(folder, "old.txt", held_out=0.03).bits_per_byte, rel=1e-6
        )
    assert cost["after"] != cost["before"]
    assert "training before (old.txt)" in Path("tuned/README.md").read_text(encoding="utf-8")


def test_of_a_path_on_this_machine_only_the_last_part_is_told(place):
    model, tokenizer = load_checkpoint(place / "base")
    path = str(place / "old.txt")  # as an earlier version may have stored it
    old = OldText(path, path, Dataset.from_dict({"text": ["the old text"]}), {})
    assert measure_forgetting(old, place / "base", model, tokenizer)["data"] == "old.txt"


def test_a_text_is_found_from_elsewhere_and_the_folder_does_not_say_where(
    place, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    old = find_old_text(place / "base")
    assert (old.name, old.place) == ("old.txt", str(place.resolve() / "old.txt"))
    files = [path for path in (place / "base").rglob("*") if path.is_file()]
    assert files and not any(str(place).encode() in path.read_bytes() for path in files)
    # Without the memory of this machine, the name alone is looked for.
    monkeypatch.setattr(forgetting, "_PLACES", tmp_path / "texts.json")
    assert find_old_text(place / "base") is None
    (tmp_path / "texts.json").write_text("damaged")
    monkeypatch.chdir(place)
    assert find_old_text("base").place == old.place


def test_a_place_that_cannot_be_read_or_written_only_warns(tmp_path, monkeypatch):
    (text := tmp_path / "book.txt").write_text(CORPUS, encoding="utf-8")
    # A name that no file system takes fails in every step, as a forbidden folder does.
    monkeypatch.setattr(forgetting, "_PLACES", tmp_path / ("a" * 300) / "texts.json")
    forgetting.remember_place(str(text), {"eval_bytes": 3})
    assert forgetting.find_place(str(tmp_path / ("a" * 300))) is None


def test_the_text_that_is_trained_on_is_not_the_old_one_under_any_spelling(place, monkeypatch):
    monkeypatch.chdir(place)
    for data in ("old.txt", str(place / "old.txt"), "./old.txt"):
        assert tell_forgetting(None, "base", data) == {}


def test_a_text_that_is_gone_changed_or_elsewhere_is_not_measured(place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    assert find_old_text("base").name == "old.txt"
    metrics = json.loads(Path("base/metrics.json").read_text())

    def find(**changes):
        (tmp_path / "metrics.json").write_text(json.dumps(metrics | changes))
        return find_old_text(tmp_path)

    assert find() is not None
    for data in ("gone.txt", "https://example.com/old.txt", "user/dataset", "/dev/zero"):
        assert find(eval_command=["--data", data, "--held_out", "0.03"]) is None
    assert find(eval_command=None) is None and find(eval_command=["--data"]) is None
    assert find(eval_command=["--data", "old.txt", "--held_out", "x"]) is None
    assert find(eval_bytes=metrics["eval_bytes"] + 1) is None  # another text of this name
    assert find_old_text(tmp_path / "no folder") is None
