"""push and pull over real HTTP, with an unchanged client: what arrives, and what goes wrong."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from hf_nanogpt import load_checkpoint, pull_checkpoint, push_to_hub, train_tokenizer
from hf_nanogpt.cli import main

ROOT = Path(__file__).parent.parent
TOKENIZER = train_tokenizer([], kind="byte")
IDS = {f"{kind}_token_id": getattr(TOKENIZER, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
INPUT = torch.tensor([[5, 9, 60, 3]])


def make_run(folder: Path, *, seed: int = 0, **options) -> Path:
    model = tiny_model("nano", seed=seed, vocab_size=len(TOKENIZER), **IDS)
    model.save_pretrained(folder, **options)
    TOKENIZER.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    """A checkpoint folder that also has private files."""
    folder = make_run(tmp_path / "run")
    torch.save({"secret": 1}, folder / "training_args.bin")
    torch.save({}, folder / "optimizer.pt")
    (folder / "notes.txt").write_text("private")
    (folder / "checkpoint-4").mkdir()
    (folder / "checkpoint-4" / "scheduler.pt").write_bytes(b"x")
    return folder


def logits(place: str) -> torch.Tensor:
    return load_checkpoint(place)[0](INPUT).logits


def refuse(capsys, *argv: str) -> str:
    assert main([str(arg) for arg in argv]) == 2
    [sentence] = capsys.readouterr().err.strip().splitlines()[-1:]
    assert sentence.startswith("hf-nanogpt: ") and "Traceback" not in sentence
    return sentence


def elsewhere(code: str, *args: str, home: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a fresh process where this package cannot be imported, as on another machine."""
    code = f"import sys; sys.modules['hf_nanogpt'] = None; torch = __import__('torch')\n{code}"
    environment = os.environ | {"HF_HOME": str(home), "PYTHONPATH": "", **environment}
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True)


# What arrives


def test_a_push_is_one_commit_of_all_that_loading_needs_and_nothing_else(hub, run):
    release = push_to_hub(run, "user/gpt", tag="v1")
    repo = hub.repos["user/gpt"]
    assert len(repo.branches["main"]) == 2 and repo.tags == {"v1": release.commit}
    assert set(repo.files()) == {
        ".gitattributes",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "configuration_nanogpt.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_nanogpt.py",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_a_release_has_no_pickle_and_a_branch_has_the_state_for_resuming(hub, run):
    push_to_hub(run, "user/gpt")
    push_to_hub(run, "user/gpt", branch="step-4")
    push_to_hub(run, "user/gpt", branch="old", tag="v0")
    repo = hub.repos["user/gpt"]
    for revision in ("main", "old", *repo.tags):
        assert not [p for p in repo.files(revision) if p.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert "optimizer.pt" in repo.files("step-4")
    assert "training_args.bin" not in repo.files("step-4")


def test_the_same_push_again_makes_no_commit_and_changed_weights_make_one(hub, run, tmp_path):
    first = push_to_hub(run, "user/gpt", private=True)
    second = push_to_hub(run, "user/gpt")
    assert (first.is_new, second.is_new) == (True, False)
    assert first.commit == second.commit and hub.repos["user/gpt"].private
    third = push_to_hub(make_run(tmp_path / "other", seed=1), "user/gpt")
    assert third.is_new and len(hub.repos["user/gpt"].branches["main"]) == 3
    before = logits(f"user/gpt@{first.revision}")
    assert torch.equal(before, logits(str(run)))
    assert torch.equal(before, logits(f"user/gpt@{first.commit}"))
    assert not torch.equal(before, logits("user/gpt"))


def test_a_sharded_checkpoint_replaces_an_unsharded_one_and_loads(hub, run, tmp_path):
    push_to_hub(run, "user/gpt")
    push_to_hub(make_run(tmp_path / "shards", max_shard_size="60KB"), "user/gpt")
    files = hub.repos["user/gpt"].files()
    assert "model.safetensors" not in files
    assert len([path for path in files if path.endswith(".safetensors")]) > 1
    assert torch.equal(logits("user/gpt"), logits(str(run)))


@pytest.mark.slow
def test_where_the_package_is_missing_every_auto_class_loads_the_same_logits(hub, run, tmp_path):
    release = push_to_hub(run, "user/gpt", tag="v1")
    push_to_hub(make_run(tmp_path / "later", seed=1), "user/gpt")
    push_to_hub(run, "user/native", native=True)
    code = f"""
import transformers
options = dict(trust_remote_code=True, revision=sys.argv[1])
model = transformers.AutoModelForCausalLM.from_pretrained("user/gpt", **options)
torch.save(model(torch.tensor({INPUT.tolist()})).logits, "logits")
native = transformers.AutoModelForCausalLM.from_pretrained("user/native")
torch.save(native(torch.tensor({INPUT.tolist()})).logits, "native")
transformers.AutoConfig.from_pretrained("user/gpt", **options)
for head in ("", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"):
    loaded = getattr(transformers, "AutoModel" + head).from_pretrained("user/gpt", **options)
    assert type(loaded).__name__.startswith("NanoGPT"), loaded
write = transformers.pipeline("text-generation", "user/gpt", **options)
print(write("def", max_new_tokens=3)[0]["generated_text"][:3])
tokenizer = transformers.AutoTokenizer.from_pretrained("user/gpt", **options)
print(tokenizer.apply_chat_template([dict(role="user", content="hello")], tokenize=False))
"""
    done = elsewhere(code, release.commit, home=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-2:] == ["def", "hello"]
    assert torch.allclose(torch.load(tmp_path / "logits"), logits(str(run)), atol=1e-6)
    assert torch.allclose(torch.load(tmp_path / "native"), logits(str(run)), atol=1e-5)
    # What is cached needs no Hub, and without consent no code runs.
    code = """
import transformers
auto = transformers.AutoModelForCausalLM
auto.from_pretrained("user/gpt", trust_remote_code=True, revision=sys.argv[1])
auto.from_pretrained("user/gpt", trust_remote_code=False, revision=sys.argv[1])
"""
    asked = len(hub.requests)
    done = elsewhere(code, release.commit, home=tmp_path, HF_HUB_OFFLINE="1")
    assert "ValueError" in done.stderr and "trust_remote_code=True" in done.stderr
    assert len(hub.requests) == asked


def test_a_native_export_loads_without_custom_code(hub, run, tmp_path):
    push_to_hub(run, "user/native", native=True)
    assert not [path for path in hub.repos["user/native"].files() if path.endswith(".py")]
    assert b"trust_remote_code=" not in hub.repos["user/native"].files()["README.md"]
    native = AutoModelForCausalLM.from_pretrained("user/native")
    assert "NanoGPT" not in type(native).__name__
    assert torch.allclose(native(INPUT).logits, logits(str(run)), atol=1e-5)


def test_with_the_package_no_consent_is_needed_and_the_installed_code_runs(hub, run):
    push_to_hub(run, "user/gpt")
    files = hub.repos["user/gpt"].files()
    files["modeling_nanogpt.py"] = b"raise SystemExit('the code of the repository ran')"
    model = AutoModelForCausalLM.from_pretrained("user/gpt")
    assert type(model).__module__ == "hf_nanogpt.modeling_nanogpt"


def test_every_command_takes_an_id_with_a_revision(hub, run, tmp_path, capsys):
    push_to_hub(run, "user/gpt", tag="v1")
    (tmp_path / "text.txt").write_text("some text to measure on. " * 20)
    for verb in (
        ["generate", "user/gpt@v1", "x", "--max_new_tokens", "2"],
        ["info", "user/gpt@v1"],
        ["eval", "user/gpt@v1", "--data", str(tmp_path / "text.txt")],
        ["export", "user/gpt@v1", str(tmp_path / "native")],
        ["convert", "user/gpt@v1", str(tmp_path / "ours")],
    ):
        code = main(verb)
        error = capsys.readouterr().err
        assert code == 0 or "already a checkpoint of ours" in error, error
    assert "no such revision" in refuse(capsys, "info", "user/gpt@v2")


def test_a_dry_run_writes_and_shows_everything_and_sends_nothing(hub, run, capsys):
    assert main(["push", str(run), "user/gpt", "--dry_run", "--license", "mit"]) == 0
    shown = capsys.readouterr().out
    assert "model.safetensors" in shown and "license: mit" in shown and "nothing was sent" in shown
    folder = Path(shown.strip().splitlines()[-1].split()[0])
    assert torch.equal(logits(str(folder)), logits(str(run)))
    assert not hub.requests
    shutil.rmtree(folder)


def test_pull_gives_the_folder_back(hub, run, tmp_path, capsys):
    push_to_hub(run, "user/gpt", tag="v1")
    assert main(["pull", "user/gpt@v1", str(tmp_path / "back")]) == 0
    assert "every checksum matches" in capsys.readouterr().out
    assert torch.equal(logits(str(tmp_path / "back")), logits(str(run)))
    for path in (tmp_path / "back").iterdir():
        assert path.name == "README.md" or path.read_bytes() == (run / path.name).read_bytes()


# What goes wrong on the way


def test_an_answer_lost_after_the_commit_does_not_commit_twice(hub, run):
    hub.fail("POST", "/commit/", "lose")
    release = push_to_hub(run, "user/gpt")
    assert len(hub.repos["user/gpt"].branches["main"]) == 2
    assert release.commit == hub.repos["user/gpt"].find("main")


def test_a_hub_that_is_busy_for_a_moment_is_asked_again(hub, run):
    hub.fail("POST", "/commit/", "503")
    hub.fail("POST", "/tag/", "lose")
    release = push_to_hub(run, "user/gpt", tag="v1")
    assert hub.repos["user/gpt"].tags["v1"] == release.commit


def test_a_failed_push_leaves_nothing_and_can_be_repeated(hub, run, capsys):
    hub.fail("PUT", "/objects/", "400")
    assert "can be repeated" in refuse(capsys, "push", run, "user/gpt")
    assert len(hub.repos["user/gpt"].branches["main"]) == 1
    assert main(["push", str(run), "user/gpt"]) == 0
    assert torch.equal(logits("user/gpt"), logits(str(run)))


def test_two_pushers_at_once_leave_one_whole_model_after_the_other(hub, run, tmp_path):
    push_to_hub(run, "user/gpt")
    runs = [make_run(tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        releases = list(pool.map(lambda path: push_to_hub(path, "user/gpt"), runs))
    assert len(hub.repos["user/gpt"].branches["main"]) == 4
    for folder, release in zip(runs, releases, strict=True):
        assert torch.equal(logits(f"user/gpt@{release.commit}"), logits(str(folder)))


def test_what_arrived_damaged_is_reported_after_the_push(hub, run, capsys):
    push_to_hub(run, "user/gpt")
    weights = hub.repos["user/gpt"].files()["model.safetensors"]
    hub.objects.clear()
    make_run(run, seed=3)

    class Damaged(dict):
        def __setitem__(self, oid, content):
            super().__setitem__(oid, weights)

    hub.objects = Damaged()
    assert "arrived damaged (model.safetensors)" in refuse(capsys, "push", run, "user/gpt")


def test_a_damaged_download_is_found_not_kept_and_repaired_by_repeating(hub, run, tmp_path, capsys):
    push_to_hub(run, "user/gpt")
    hub.fail("GET", "/objects/", "flip")
    pull = ["pull", "user/gpt", tmp_path / "back", "--verify"]
    assert "arrived damaged (model.safetensors)" in refuse(capsys, *pull)
    assert not (tmp_path / "back").exists()
    assert main([str(word) for word in pull]) == 0
    assert torch.equal(logits(str(tmp_path / "back")), logits(str(run)))


def test_an_interrupted_download_continues_and_a_truncated_one_is_refused(
    hub, run, tmp_path, capsys
):
    push_to_hub(run, "user/gpt")
    hub.fail("GET", "/objects/", "drop")
    pull_checkpoint("user/gpt", tmp_path / "back")
    push_to_hub(make_run(run, seed=1), "user/gpt")
    hub.fail("GET", "/objects/", "truncate")
    refuse(capsys, "pull", "user/gpt", tmp_path / "short")
    assert not (tmp_path / "short").exists()


def test_no_token_is_sent_to_the_second_host(hub, run, tmp_path):
    push_to_hub(run, "user/gpt", private=True)
    pull_checkpoint("user/gpt", tmp_path / "back")
    second = [token for _, _, host, token in hub.requests if host.startswith("localhost")]
    assert len(second) >= 2 and not any(second)


# Permissions and bad input


@pytest.mark.parametrize(
    ("token", "name", "reason"),
    [
        ("", "user/gpt", "you are not logged in"),
        ("hf_wrong", "user/gpt", "does not accept your token"),
        ("hf_reader", "user/gpt", "your token may not write there"),
        ("hf_second", "user/gpt", "your token may not write there"),
        ("hf_owner", "a b/c", "repo_id='a b/c' must be USER/NAME of letters"),
        ("hf_owner", "gpt", "must be USER/NAME"),
    ],
)
def test_a_refused_push_says_why_and_creates_nothing(
    hub, run, capsys, monkeypatch, token, name, reason
):
    monkeypatch.setenv("HF_TOKEN", token)
    assert reason in refuse(capsys, "push", run, name)
    assert not hub.repos


def test_a_refused_pull_says_why(hub, run, capsys, monkeypatch, tmp_path):
    push_to_hub(run, "user/private", private=True)
    push_to_hub(run, "user/gated")
    hub.repos["user/gated"].gated = True
    for token, name, reason in (
        ("hf_second", "user/private", "has no such id, or your token may not see it"),
        ("hf_second", "user/gated", "its owner must let you in"),
        ("hf_second", "user/nothing", "has no such id"),
        ("hf_wrong", "user/gated", "does not accept your token"),
        ("hf_owner", "user/gated@v9", "no such revision"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        assert reason in refuse(capsys, "pull", name, tmp_path / "back")
        assert reason in refuse(capsys, "generate", name, "x")
        assert not (tmp_path / "back").exists()


def test_bad_input_is_refused_in_one_sentence_before_anything_is_sent(hub, run, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "is not a checkpoint folder" in refuse(capsys, "push", empty, "user/gpt")
    assert "pull it first" in refuse(capsys, "push", "user/other", "user/gpt")
    assert "tag='a b'" in refuse(capsys, "push", run, "user/gpt", "--tag", "a b")
    assert "Did you mean --tag" in refuse(capsys, "push", run, "user/gpt", "--tags=v1")
    native = tmp_path / "native"
    assert main(["export", str(run), str(native)]) == 0
    assert "with --native" in refuse(capsys, "push", native, "user/gpt")
    (run / "README.md").write_text("---\nlicense: mit\ntags: [a\n---\n\nMine.\n")
    assert ", line 3, " in refuse(capsys, "push", run, "user/gpt")
    (run / "README.md").unlink()
    (run / "model.safetensors").write_bytes(b"damaged")
    assert "cannot be read" in refuse(capsys, "push", run, "user/gpt")
    assert not hub.repos
    assert "exists and is not empty" in refuse(capsys, "pull", "user/gpt", run)


def test_a_tag_is_not_moved_to_another_content(hub, run, tmp_path, capsys):
    first = push_to_hub(run, "user/gpt", tag="v1")
    other = make_run(tmp_path / "other", seed=1)
    assert "choose another tag" in refuse(capsys, "push", other, "user/gpt", "--tag", "v1")
    assert hub.repos["user/gpt"].find("main") == first.commit
    push_to_hub(other, "user/gpt", tag="v2")


def test_private_is_refused_for_what_is_public(hub, run, capsys):
    first = push_to_hub(run, "user/gpt")
    assert "is public" in refuse(capsys, "push", make_run(run, seed=1), "user/gpt", "--private")
    assert hub.repos["user/gpt"].find("main") == first.commit


def test_a_license_that_was_set_stays_until_another_is_set(hub, run):
    for license, expected in ((None, "unknown"), ("mit", "mit"), (None, "mit"), ("gpl", "gpl")):
        push_to_hub(run, "user/gpt", license=license, language=license and ["en"])
        card = hub.repos["user/gpt"].files()["README.md"].decode()
        assert f"license: {expected}\n" in card
        assert card.count("- en\n") == (expected != "unknown")


def test_offline_a_push_says_so(hub, run, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refuse(capsys, "push", run, "user/gpt")


def test_invalid_yaml_on_the_hub_is_named_there(hub, run, capsys):
    push_to_hub(run, "user/gpt")
    hub.repos["user/gpt"].files()["README.md"] = b"---\na: [\n---\n"
    said = refuse(capsys, "push", run, "user/gpt")
    assert "front matter of README.md of user/gpt is not valid YAML" in said


def test_the_config_that_is_pushed_names_every_auto_class(hub, run):
    push_to_hub(run, "user/gpt")
    config = json.loads(hub.repos["user/gpt"].files()["config.json"])
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} < set(config["auto_map"])
