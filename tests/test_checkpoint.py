"""The checkpoint folder: loaded with clear errors, and never half written or wrongly deleted."""

import json
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import _HUB, ROOT, assert_same, tiny_model
from safetensors.torch import load_file, save_file

from hf_nanogpt import load_checkpoint, train, train_tokenizer
from hf_nanogpt.checkpoint.writing import (
    check_output_dir,
    clear_output_dir,
    clear_unfinished,
    staged_folder,
)
from hf_nanogpt.data.tokenization import load_tokenizer
from hf_nanogpt.training.locking import lock_output_dir

TOKENIZER = train_tokenizer([], kind="byte")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A whole checkpoint folder."""
    tiny_model("nano", vocab_size=len(TOKENIZER)).save_pretrained(tmp_path / "run")
    TOKENIZER.save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fill(folder: Path, *names: str) -> Path:
    """Write files, and folders with a file inside (names that end in a slash)."""
    for name in names:
        path = folder / name / "weights.bin" if name.endswith("/") else folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


# Loading


def test_a_folder_loads_ready_for_use(folder):
    for place in (folder, str(folder)):
        model, tokenizer = load_checkpoint(place)
        assert not model.training
        expected = tiny_model("nano", vocab_size=len(TOKENIZER)).state_dict()
        assert all(t.equal(expected[name]) for name, t in model.state_dict().items())
        assert tokenizer.get_vocab() == TOKENIZER.get_vocab()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nothing", "There is no checkpoint at nothing"),
        ("./nothing", "no checkpoint at nothing"),
        ("/nothing/here", "no checkpoint at /nothing/here"),
        ("too/many/parts", "no checkpoint at too/many/parts"),
        ("user/model", "'user/model' is not a checkpoint folder here.*HF_HUB_OFFLINE is set"),
    ],
)
def test_what_is_neither_a_folder_nor_on_the_hub_is_refused(name, reason):
    _HUB.reset()
    with pytest.raises(ValueError, match=reason):
        load_checkpoint(name)
    assert not _HUB.requests  # it is offline


def test_a_file_is_refused(folder):
    with pytest.raises(ValueError, match=r"config.json is a file: give the folder"):
        load_checkpoint(folder / "config.json")


def test_a_folder_without_a_config_is_refused_with_a_hint_at_its_steps(folder):
    (folder / "config.json").unlink()
    with pytest.raises(
        ValueError, match=rf"{folder} is not a checkpoint folder: .*no config.json\.$"
    ):
        load_checkpoint(folder)
    for step in ("checkpoint-9", "checkpoint-10"):
        fill(folder, f"{step}/")
        (folder / step / "trainer_state.json").write_text("{}")
    fill(folder, "checkpoint-11/")  # not whole
    with pytest.raises(ValueError, match=r"unfinished training: try .*checkpoint-10"):
        load_checkpoint(folder)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit_config(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def drop_a_weight(path: Path) -> None:
    weights = load_file(path)
    save_file(dict(list(weights.items())[1:]), path, metadata={"format": "pt"})


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "config cut": ("config.json", truncate),
    "config empty": ("config.json", lambda path: path.write_text("{}")),
    "config of another width": ("config.json", lambda path: edit_config(path, hidden_size=64)),
    "config with a wrong value": ("config.json", lambda path: edit_config(path, norm_type="x")),
    "weights cut": ("model.safetensors", truncate),
    "weights empty": ("model.safetensors", lambda path: path.write_bytes(b"")),
    "weights of prose": ("model.safetensors", lambda path: path.write_text("prose " * 99)),
    "weights gone": ("model.safetensors", Path.unlink),
    "one weight gone": ("model.safetensors", drop_a_weight),
    "tokenizer cut": ("tokenizer.json", truncate),
    "tokenizer gone": ("tokenizer.json", Path.unlink),
}


def test_what_describes_the_loading_of_a_tokenizer_is_not_saved_with_it(folder, tmp_path):
    for i, tokenizer in enumerate((load_checkpoint(folder)[1], load_tokenizer(folder))):
        tokenizer.save_pretrained(tmp_path / f"{i}")
        first, last = (
            json.loads((place / "tokenizer_config.json").read_text(encoding="utf-8"))
            for place in (folder, tmp_path / f"{i}")
        )
        assert last.keys() <= first.keys()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_by_name_in_one_line(folder, damage):
    file, do_damage = DAMAGES[damage]
    do_damage(folder / file)
    with pytest.raises(ValueError, match=str(folder)) as caught:
        load_checkpoint(folder)
    assert "\n" not in str(caught.value).strip()


# Writing


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}])
def test_a_missing_or_empty_folder_can_be_written_to_and_is_not_touched(tmp_path, flags):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing", "missing/deep/down"):
        check_output_dir(tmp_path / name, **flags)
    assert [p.name for p in tmp_path.rglob("*")] == ["empty"]


def test_a_folder_with_something_in_it_is_refused(folder):
    before = content(folder)
    with pytest.raises(ValueError, match=f"output_dir={folder} .*not empty.*--resume.*--overwrite"):
        check_output_dir(folder)
    assert content(folder) == before


def test_overwriting_deletes_a_training_and_nothing_else(folder):
    fill(folder, "README.md", "metrics.json", "loss.png", "training_args.bin")
    fill(folder, "model-00001-of-00002.safetensors", "model.safetensors.index.json")
    fill(folder, "checkpoint-20/", "checkpoint-100/", ".staged-x/")
    check_output_dir(folder, overwrite=True)
    fill(folder, "notes.txt", "thesis/")  # came since
    clear_output_dir(folder)
    assert set(content(folder)) == {"notes.txt", "thesis/weights.bin"}
    clear_output_dir(folder)  # nothing is left to delete


FOREIGN = ["notes.txt", ".env", "thesis/", "model.py", "tokenizer_corpus/", "checkpoint-notes.txt"]


@pytest.mark.parametrize("name", FOREIGN)
def test_overwriting_a_folder_with_foreign_files_is_refused(folder, name):
    before = content(fill(folder, "checkpoint-20/", name))
    with pytest.raises(ValueError, match=f"output_dir={folder} .*{name.rstrip('/')}.*--overwrite"):
        check_output_dir(folder, overwrite=True)
    assert content(folder) == before


@pytest.mark.parametrize("name", FOREIGN)
def test_clearing_leaves_foreign_files(folder, name):
    fill(folder, "checkpoint-20/", name)
    clear_output_dir(folder)
    assert [p.name for p in folder.iterdir()] == [name.rstrip("/")]


def test_clearing_takes_a_link_away_and_not_what_it_leads_to(folder, tmp_path):
    elsewhere = fill(tmp_path / "big disk", "weights.bin")
    (folder / "checkpoint-20").symlink_to(elsewhere, target_is_directory=True)
    clear_output_dir(folder)
    assert not list(folder.iterdir())
    assert (elsewhere / "weights.bin").is_file()


def test_clearing_what_is_unfinished_leaves_what_another_process_writes(tmp_path):
    (tmp_path / ".staged-abcd_123").mkdir()
    with staged_folder(tmp_path) as staged:
        clear_unfinished(tmp_path)
        assert staged.is_dir() and not (tmp_path / ".staged-abcd_123").exists()


def test_resuming_needs_a_whole_step_or_no_more_than_a_killed_training_leaves(folder):
    refused = rf"output_dir={folder} has no whole checkpoint-.*leave out --resume"
    with pytest.raises(ValueError, match=refused):  # but the checkpoint of a finished one
        check_output_dir(fill(folder, "checkpoint-20/"), resume=True)
    (folder / "checkpoint-20" / "trainer_state.json").write_text("{}")
    check_output_dir(folder, resume=True)
    killed = fill(folder / "killed", "checkpoint-5/", ".staged-x/")
    for place in (folder / "missing", killed):
        check_output_dir(place, resume=True)
    with pytest.raises(ValueError, match="has no whole checkpoint-"):
        check_output_dir(fill(killed, "checkpoint-notes.txt"), resume=True)


def test_a_place_that_is_a_broken_link_or_has_too_long_a_name_is_refused(tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for name, reason in (("dangling", "a link to nothing"), ("loop", "a link to nothing")):
        for place in (tmp_path / name, tmp_path / name / "run"):
            with pytest.raises(ValueError, match=f"output_dir=.*{reason}"):
                check_output_dir(place)
    with pytest.raises(ValueError, match=r"output_dir=.* over 255 bytes"):
        check_output_dir(tmp_path / ("x" * 300) / "run")


def test_a_place_under_a_file_is_refused(folder):
    for place in (folder / "config.json", folder / "config.json" / "deep" / "run"):
        with pytest.raises(ValueError, match=rf"output_dir={place}: cannot write to .*config.json"):
            check_output_dir(place)


@pytest.mark.parametrize(("mode", "name"), [(0o555, "run"), (0o555, ""), (0o000, "run")])
def test_a_folder_without_permission_is_refused(mode, name):
    def check() -> str:
        try:
            check_output_dir(Path(locked) / name)
        except ValueError as error:
            return str(error)
        return "accepted"

    with tempfile.TemporaryDirectory() as locked:
        os.chmod(locked, mode)
        try:
            assert f"output_dir={Path(locked) / name}: cannot write" in as_a_common_user(check)
        finally:
            os.chmod(locked, 0o700)


def as_a_common_user(function: Callable[[], str]) -> str:
    """Return what `function` returns in a child process without the rights of root."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            answer = function()
        except BaseException as error:
            answer = repr(error)
        os.write(writing, answer.encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        return pipe.read()


def test_staged_files_appear_only_when_the_block_ends(folder):
    before = content(folder)
    with staged_folder(folder) as staged:
        fill(staged, "config.json", "a.txt")
        assert staged.parent == folder  # on one file system, where renaming is atomic
        assert content(folder).items() >= before.items() and not (folder / "a.txt").exists()
    assert content(folder) == before | {"config.json": b"config.json", "a.txt": b"a.txt"}
    assert not list(folder.glob(".staged*"))


def test_a_folder_that_could_not_be_completed_has_no_config(tmp_path):
    names = [f"{letter}.txt" for letter in "abxyz"]
    fill(tmp_path, "x.txt/")  # a folder is in the way of a file
    with pytest.raises(OSError, match=r"x\.txt"), staged_folder(tmp_path) as staged:
        fill(staged, "config.json", *names)
    assert not (tmp_path / "config.json").exists()
    assert not list(tmp_path.glob(".staged*"))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_nothing_of_the_staged_files_is_left(folder, error):
    before = content(folder)
    with pytest.raises(error), staged_folder(folder) as staged:
        fill(staged, "config.json", "a.txt", "deep/")
        raise error
    assert content(folder) == before
    assert not list(folder.glob(".staged*"))


def test_a_staged_checkpoint_loads(tmp_path):
    model = tiny_model("gpt2", vocab_size=len(TOKENIZER))
    with staged_folder(tmp_path / "new" / "run") as staged:
        model.save_pretrained(staged)
        TOKENIZER.save_pretrained(staged)
        with pytest.raises(ValueError, match=r"no config.json"):
            load_checkpoint(tmp_path / "new" / "run")
    loaded, _ = load_checkpoint(tmp_path / "new" / "run")
    ids = torch.arange(20)[None]
    assert_same(loaded(ids).logits, model(ids).logits)


def test_a_file_staged_beside_a_checkpoint_leaves_the_checkpoint_whole(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with staged_folder(tmp_path) as folder:
        (folder / "model.gguf").write_text("weights")
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.gguf"}


# One training at a time


def _hold(folder: Path) -> tuple[int, int]:
    """Lock a folder in a child process; return its pid, and a pipe that ends it when closed."""
    ready, holding = os.pipe(), os.pipe()
    if (child := os.fork()) == 0:
        os.close(holding[1])
        with lock_output_dir(folder):
            os.write(ready[1], b"x")
            os.read(holding[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    return child, holding[1]


def test_a_folder_that_is_trained_into_is_refused_by_process_until_it_ends(tmp_path):
    folder = tmp_path / "runs" / "mine"
    child, pipe = _hold(folder)
    with (
        pytest.raises(ValueError, match=rf"output_dir={folder} is in use: process {child} on"),
        lock_output_dir(folder),
    ):
        pass
    os.close(pipe)
    os.waitpid(child, 0)
    assert not (tmp_path / "runs").exists()  # it had made it, and left nothing in it
    with lock_output_dir(folder):
        check_output_dir(folder)  # is as good as empty


def test_a_killed_training_locks_nobody_out(tmp_path):
    child, _ = _hold(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / ".lock").exists()
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with lock_output_dir(tmp_path):
            check_output_dir(tmp_path, **flags)
            clear_output_dir(tmp_path)
            assert (tmp_path / ".lock").exists()
    assert not list(tmp_path.iterdir())


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "mine.txt")
    with pytest.raises(ValueError, match="cannot be locked"), lock_output_dir(tmp_path / "run"):
        pass
    assert (tmp_path / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_no_second_training_touches_the_folder_of_one_that_runs(tmp_path, flags):
    settings = {"tokenizer": "byte", "n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 16}
    settings |= {
        "data": str(ROOT / "LICENSE"),
        "max_steps": 2,
        "disable_tqdm": True,
        "num_threads": 1,
    }
    fill(tmp_path, "samples.jsonl", "checkpoint-5/")
    child, pipe = _hold(tmp_path)
    before = content(tmp_path)
    with pytest.raises(ValueError, match=f"is in use: process {child} on"):
        train(output_dir=str(tmp_path), **settings, **flags)
    assert content(tmp_path) == before
    os.close(pipe)
    os.waitpid(child, 0)
    if flags:
        train(output_dir=str(tmp_path), **settings, **flags)
        assert (tmp_path / "config.json").exists() and not (tmp_path / ".lock").exists()
