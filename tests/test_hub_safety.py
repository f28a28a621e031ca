"""Attacks on push and pull: paths that lead out of a folder, secrets, races, and damage."""

import json
import os
import signal
import subprocess
import threading
from dataclasses import fields
from functools import cache
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle
from pathlib import Path

import pytest
from children import forked, run_python
from conftest import CORPUS
from huggingface_hub import snapshot_download
from minihub import Repo
from test_hub import make_run, refuse
from test_hub_training import PUSH, SMALL

from hf_nanogpt import DataArguments, NanoGPTTrainingArguments, pull_checkpoint, push_to_hub, train
from hf_nanogpt.checkpoint.writing import clear_abandoned, staged_folder
from hf_nanogpt.cli import main
from hf_nanogpt.hub.publishable import publish_command
from hf_nanogpt.training.arguments import ModelArguments, parse_settings
from hf_nanogpt.training.publishing import PushQueue

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(tmp_path) -> Path:
    return make_run(tmp_path / "run")


def everything(folder: Path) -> dict[str, bytes | None]:
    paths = sorted(folder.rglob("*"))
    return {str(p): p.read_bytes() if p.is_file() else None for p in paths}


# Nothing from outside becomes a path


@pytest.mark.parametrize("step", ["/../../../site-packages", "/etc", "4", -1, True, None, 1.5])
def test_pull_refuses_an_invalid_number_of_steps(hub, run, tmp_path, capsys, step):
    push_to_hub(run, "user/gpt")
    files = hub.repos["user/gpt"].files()
    files["trainer_state.json"] = json.dumps({"global_step": step}).encode()
    files["usercustomize.py"] = b"raise SystemExit('foreign code ran')"
    before = everything(tmp_path)
    said = refuse(capsys, "pull", "user/gpt", tmp_path / "a" / "b" / "back")
    assert "trainer_state.json has global_step=" in said
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["../../evil.py", "a/../../../evil.py", "/tmp/evil.py"])
def test_pull_refuses_a_file_name_that_leads_out_of_the_folder(hub, run, tmp_path, capsys, name):
    push_to_hub(run, "user/gpt")
    hub.repos["user/gpt"].files()[name] = b"raise SystemExit('foreign code ran')"
    try:
        assert main(["pull", "user/gpt", str(tmp_path / "back")]) == 2
    except FileNotFoundError:
        pytest.fail("a traceback instead of a sentence")
    assert not (tmp_path / "back").exists() and not list(tmp_path.rglob("evil.py"))
    assert not Path("/tmp/evil.py").exists()


@pytest.mark.parametrize("options", [[], ["--native"], ["--branch", "b"], ["--dry_run"]])
@pytest.mark.parametrize("name", ["samples.jsonl", "README.md", "metrics.json", "LICENSE"])
def test_push_refuses_a_link_that_leads_out_of_the_folder(
    hub, run, tmp_path, capsys, name, options
):
    secret = tmp_path / "shadow"
    secret.write_text('{"prompt": "root:secret"}')
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(secret)
    assert f"{name} is a link to " in refuse(capsys, "push", run, "user/gpt", *options)
    assert not hub.repos and not hub.objects


def test_training_refuses_to_push_a_link_that_leads_out_of_its_checkpoint(hub, tmp_path):
    (tmp_path / "shadow").write_text("root:secret")
    folder = make_run(tmp_path / "checkpoint-2")
    (folder / "trainer_state.json").symlink_to(tmp_path / "shadow")
    queue = PushQueue()
    options = {"num_parameters": 1, "message": "x", "skip_waiting": False}
    queue.add(folder, "user/gpt", branches=["last-checkpoint"], **options)
    [error] = queue.finish()
    assert "is a link to" in str(error) and not hub.repos


def test_a_folder_of_the_cache_which_is_made_of_links_can_be_pushed(hub, run):
    push_to_hub(run, "user/gpt")
    push_to_hub(snapshot_download("user/gpt"), "user/again")
    same = hub.repos["user/gpt"].files()["model.safetensors"]
    assert hub.repos["user/again"].files()["model.safetensors"] == same


@pytest.mark.parametrize("shard", ["../secret.safetensors", "{}/secret.safetensors"])
def test_export_refuses_a_shard_that_lies_outside_the_folder(run, tmp_path, capsys, shard):
    shard = shard.format(tmp_path)
    (run / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": shard}}
    (run / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "not a plain path inside" in refuse(capsys, "export", run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# No secret is published

# What is meant to be public, or whose value cannot be free text in a training that works.
PUBLIC = {
    *("text_column", "dataset_config", "dataset_split", "preset", "hidden_act", "layer_types"),
    *("sample_prompt", "hub_model_id", "hub_revision", "tokenizer"),
    *("lr_scheduler_kwargs", "torch_compile_backend", "torch_compile_mode", "fsdp_config"),
    *("metric_for_best_model", "label_names", "optim_target_modules"),
}
VARIABLES = ("WANDB_API_KEY", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "COMET_API_KEY")


@cache
def takes_text(name: str) -> bool:
    """Say whether a setting takes any text, as far as parsing goes."""
    try:
        parse_settings("quickstart", [f"--{name}=hf_marked"])
    except Exception:  # a choice, a number, JSON, a file, or a package that is not there
        return False
    return True


def list_text_settings() -> list[str]:
    classes = (DataArguments, ModelArguments, NanoGPTTrainingArguments)
    names = [field.name for cls in classes for field in fields(cls) if "str" in str(field.type)]
    return [name for name in names if takes_text(name)]


@pytest.fixture
def text_server(tmp_path):
    """The address of a text, behind a user, a password and a signature that are ignored."""
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "text.txt").write_text(CORPUS, encoding="utf-8")

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path / "web")

        def log_message(self, *args) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://hf_marked_user:hf_marked_pw@127.0.0.1:{server.server_port}/text.txt"
        server.shutdown()


def test_no_secret_in_any_flag_or_variable_is_written_or_sent(
    hub, tmp_path, monkeypatch, text_server
):
    for name in VARIABLES:
        monkeypatch.setenv(name, f"hf_marked_{name}")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)  # for the text of the web
    values = {name: f"hf_marked_{name}" for name in list_text_settings() if name not in PUBLIC}
    run = tmp_path / "hf_marked_home" / "run"
    values |= {
        "data": f"{text_server}?X-Signature=hf_marked_data#hf_marked_part",
        "validation_data": f"{text_server}?X-Signature=hf_marked_validation",
        "output_dir": str(run),
        "hub_token": "hf_owner",
    }
    spellings = cycle(["--{}={}", "--{} {}"])
    flags = [f"--{name}={value}" for name, value in (SMALL | PUSH).items()]
    flags += ["--hub_strategy=checkpoint"]
    for number, (name, value) in enumerate(values.items()):
        dashed = name.replace("_", "-") if number % 3 else name
        flags += next(spellings).format(dashed, value).split(" ")
    assert main(["train", *flags]) == 0

    written = {path: content for path, content in everything(run).items() if content is not None}
    sent = hub.repos["user/gpt"].commits
    written |= {f"{oid}/{name}": c for oid, files in sent.items() for name, c in files.items()}
    written |= hub.objects
    written |= {path: path.encode() for _, path, _, _ in hub.requests}
    found = [path for path, content in written.items() if b"hf_marked" in content]
    assert not found
    assert not [path for path, content in written.items() if b"hf_owner" in content]
    metrics = json.loads((run / "metrics.json").read_text())
    plain = text_server.replace("hf_marked_user:hf_marked_pw@", "")
    assert metrics["data"] == plain and metrics["eval_command"] == ["--data", plain]
    assert "--max_steps=6" in metrics["command"]


@pytest.mark.parametrize("form", ["--{}={}", "--{} {}"])
def test_no_spelling_of_a_flag_that_is_not_listed_is_published(form):
    names = [field.name for field in fields(NanoGPTTrainingArguments)]
    for name in (*names, "hub_token", "push_to_hub_token", "anything_new"):
        for spelled in (name, name.replace("_", "-")):
            shown = publish_command(form.format(spelled, "hf_marked").split(" "))
            assert not shown or not takes_text(name)


def test_what_an_earlier_version_wrote_is_cleaned_before_it_is_pushed(hub, run, text_server):
    command = ["hf-nanogpt", "train", "quickstart", "--from", "/srv/hf_marked/model"]
    command += ["--hub-token", "hf_marked", "--max_steps", "7", "--run_name=hf_marked"]
    address = f"{text_server}?X-Signature=hf_marked"
    facts = {"command": command, "data": address, "eval_command": ["--data", address]}
    (run / "metrics.json").write_text(json.dumps(facts | {"settings": {"Tokenizer": address}}))
    push_to_hub(run, "user/gpt")
    files = hub.repos["user/gpt"].files()
    assert not [name for name, content in files.items() if b"hf_marked" in content]
    cleaned = "hf-nanogpt train quickstart --from model --max_steps 7"
    assert cleaned in files["README.md"].decode()
    assert json.loads(files["metrics.json"])["command"] == cleaned.split()


@pytest.mark.parametrize(
    "content",
    ['{"train_tokens": "many"}', '{"eval_loss": []}', '{"settings": 3, "train_tokens": 1}', "[1]"],
)
def test_metrics_of_the_wrong_type_are_one_sentence_that_names_the_file(hub, run, capsys, content):
    (run / "metrics.json").write_text(content)
    assert "metrics.json" in refuse(capsys, "push", run, "user/gpt")
    assert not hub.repos


# A private repository stays private


@pytest.mark.parametrize("by_flag", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_private_repository_that_is_deleted_comes_back_private(hub, tmp_path, by_flag):
    (tmp_path / "text.txt").write_text(CORPUS, encoding="utf-8")
    if not by_flag:
        hub.repos["user/gpt"] = Repo(private=True)
        hub.repos["user/gpt"].commit("main", {})
    hub.fail("POST", "/preupload/", "hold")

    def delete() -> None:
        while not any("/preupload/" in path for _, path, _, _ in list(hub.requests)):
            threading.Event().wait(0.01)
        del hub.repos["user/gpt"]
        hub.gate.set()

    (deleter := threading.Thread(target=delete)).start()
    options = PUSH | {"hub_strategy": "every_save", "hub_private_repo": by_flag or None}
    train(data=str(tmp_path / "text.txt"), output_dir=str(tmp_path / "run"), **SMALL, **options)
    deleter.join()
    assert hub.repos["user/gpt"].private
    assert "model.safetensors" in hub.repos["user/gpt"].files()


def test_a_public_repository_is_refused_before_a_training_that_should_push_in_private(
    hub, run, tmp_path, capsys
):
    push_to_hub(run, "user/gpt")
    flags = [f"--{k}={v}" for k, v in (SMALL | PUSH).items()]
    words = ["--data", str(ROOT / "LICENSE"), "--hub_private_repo=True", *flags]
    assert "exists and is public" in refuse(capsys, "train", *words, "--output_dir", tmp_path / "x")
    assert not (tmp_path / "x").exists()


# Tags and branches


def test_of_two_contents_pushed_at_once_under_one_tag_one_is_refused(hub, run, tmp_path):
    push_to_hub(run, "user/gpt")
    hub.requests.clear()
    hub.fail("POST", "/tag/", "hold")
    first, second = (make_run(tmp_path / str(seed), seed=seed) for seed in (1, 2))
    errors: list[Exception] = []

    def push_slowly() -> None:
        try:
            push_to_hub(first, "user/gpt", tag="v1")
        except ValueError as error:
            errors.append(error)

    (slow := threading.Thread(target=push_slowly)).start()
    while not any("/tag/" in path for _, path, _, _ in list(hub.requests)):
        threading.Event().wait(0.01)
    release = push_to_hub(second, "user/gpt", tag="v1")
    hub.gate.set()
    slow.join()
    assert hub.repos["user/gpt"].tags["v1"] == release.commit
    [error] = errors
    assert "tag=v1 exists in user/gpt with another content" in str(error)


NAMES = [
    *("a..b", "a//b", "/a", "a/", ".a", "a/.b", "a.lock", "a.lock/b", "a.", "a b", "a~b", "a^b"),
    *("a:b", "a?b", "a*b", "a[b", "a\\b", "a@{b", "@", "-a", "a\tb", "a\nb", "a\x7fb"),
]


@pytest.mark.parametrize("option", ["--tag", "--branch"])
def test_a_name_that_git_forbids_is_refused_before_anything_is_sent(hub, run, capsys, option):
    for name in NAMES:
        said = refuse(capsys, "push", run, "user/gpt", f"{option}={name}")
        assert f"{option[2:]}={name!r} is not a possible name" in said or repr(name)[1:-1] in said
    for name in ("main", "HEAD", "refs/heads/x", "0" * 40):
        if (option, name) != ("--branch", "main"):
            refuse(capsys, "push", run, "user/gpt", f"{option}={name}")
    refuse(capsys, "push", run, "user/gpt", "--tag=x", "--branch=x")
    assert not hub.requests
    for name in NAMES:  # the names above are those that git refuses
        command = ["git", "check-ref-format", f"refs/tags/{name}"]
        assert name == "-a" or name == "@" or subprocess.run(command).returncode


def test_a_tag_cannot_have_the_name_of_a_branch(hub, run, capsys):
    push_to_hub(run, "user/gpt", branch="dev")
    commits = len(hub.repos["user/gpt"].commits)
    assert "user/gpt has a branch of that name" in refuse(
        capsys, "push", run, "user/gpt", "--tag", "dev"
    )
    assert len(hub.repos["user/gpt"].commits) == commits


@pytest.mark.parametrize("path", ["/refs", "/tree/", "/api/models/user/gpt$"])
def test_every_request_of_a_push_is_repeated_if_the_hub_is_busy(hub, run, path):
    push_to_hub(run, "user/gpt", tag="v1", private=True)
    hub.fail("GET", path, "503")
    push_to_hub(run, "user/gpt", tag="v2", private=True)
    assert not hub.faults and set(hub.repos["user/gpt"].tags) == {"v1", "v2"}


# Killed and repeated

BROKEN_OFF = """
import os, signal, sys
replace = os.replace
def stop(source, target):
    if ".staged-" in str(source):
        os.kill(os.getpid(), signal.Signals[sys.argv[1]])
    replace(source, target)
os.replace = stop
from huggingface_hub import constants
from hf_nanogpt.cli import main
constants.HF_HUB_OFFLINE = False
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "name"), [("export", "SIGKILL"), ("pull", "SIGTERM")])
@forked
def test_a_command_that_was_stopped_while_writing_can_be_repeated(hub, run, tmp_path, verb, name):
    source = str(run)
    if verb == "pull":
        push_to_hub(run, source := "user/gpt")
        hub.repos["user/gpt"].files()["trainer_state.json"] = b'{"global_step": 4}'
    command = [verb, source, str(tmp_path / "out")]
    done = run_python(BROKEN_OFF, name, *command)
    if name == "SIGTERM":
        assert done.returncode == 143 and done.stderr.strip().endswith("Interrupted.")
        assert not (tmp_path / "out").exists()
    else:
        assert done.returncode == -signal.SIGKILL
        assert [p.name[:8] for p in (tmp_path / "out").iterdir()] == [".staged-"]
    assert main(command) == 0
    assert not list((tmp_path / "out").glob(".staged-*"))
    assert list((tmp_path / "out").rglob("model.safetensors"))


def test_a_folder_that_another_process_is_writing_is_left_alone(run, tmp_path, capsys):
    out = tmp_path / "out"
    with staged_folder(out) as staged:
        (staged / "half").write_text("half")
        clear_abandoned(out)
        assert "is being written by another process" in refuse(capsys, "export", run, out)
        assert (staged / "half").is_file()
    assert [path.name for path in out.iterdir()] == ["half"]


def test_only_abandoned_staged_folders_are_deleted(tmp_path):
    (tmp_path / ".staged-abcd_123").mkdir()
    for name in (".staged-my-photos", ".staged-ABCDEFGH", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / ".staged-12345678").symlink_to(tmp_path / "other")
    clear_abandoned(tmp_path)
    kept = {".staged-my-photos", ".staged-ABCDEFGH", "other", ".staged-12345678"}
    assert set(os.listdir(tmp_path)) == kept


# What is pulled is what was sent


@pytest.mark.parametrize("path", ["/objects/", "/resolve/.*config.json"])
def test_pull_compares_checksums_by_default_and_keeps_no_damaged_file(
    hub, run, tmp_path, capsys, path
):
    push_to_hub(run, "user/gpt")
    hub.fail("GET", path, "flip")
    said = refuse(capsys, "pull", "user/gpt", tmp_path / "back")
    assert "arrived damaged" in said and not (tmp_path / "back").exists()
    assert main(["pull", "user/gpt", str(tmp_path / "back")]) == 0
    hub.fail("GET", "/tree/", "403")
    said = refuse(capsys, "pull", "user/gpt", tmp_path / "unseen")
    assert "could not be compared" in said and "--no-verify" in said
    pull_checkpoint("user/gpt", tmp_path / "unverified", verify=False)
