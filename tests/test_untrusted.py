"""Hostile files: none runs code or fills the memory, and each error names the file."""

import ast
import json
import os
import pty
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from children import forked, run_python
from conftest import ROOT, tiny_model
from safetensors.torch import load_file, save_file

from hf_nanogpt import convert_checkpoint, load_checkpoint, train_tokenizer
from hf_nanogpt.checkpoint.steps import find_intact_checkpoint, find_last_checkpoint
from hf_nanogpt.cli import main
from hf_nanogpt.errors import explain_errors, without_secrets
from hf_nanogpt.training.arguments import parse_settings
from hf_nanogpt.untrusted import parse_json, parse_yaml, path_inside

TOKENIZER = train_tokenizer([], kind="byte")
DEEP = '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"
LOADING = {"from_pretrained", "from_config", "pipeline", "HFLM"}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A checkpoint of ours."""
    path = tmp_path_factory.mktemp("made") / "run"
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), TOKENIZER.eos_token_id)
    tiny_model(vocab_size=len(TOKENIZER), **ids).save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


@pytest.fixture
def folder(made, tmp_path) -> Path:
    copy = tmp_path / "run"
    copy.mkdir()
    for path in made.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


# Code


def test_every_call_that_loads_forbids_code_of_the_checkpoint():
    for path in (ROOT / "hf_nanogpt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            said = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if name in LOADING:
                assert said.get("trust_remote_code") == "False", f"{path.name}:{node.lineno}"
            if ast.unparse(node.func) == "torch.load":
                assert said.get("weights_only") == "True", f"{path.name}:{node.lineno}"


EVIL = """
import pathlib
pathlib.Path({mark!r}).write_text("ran")
from transformers import PreTrainedConfig, PreTrainedModel
class EvilConfig(PreTrainedConfig):
    model_type = "evil"
class EvilModel(PreTrainedModel):
    config_class = EvilConfig
EvilTokenizer = EvilModel
"""
ANSWER_YES = """
import json, sys
from hf_nanogpt.checkpoint.steps import find_intact_checkpoint, find_last_checkpoint
from hf_nanogpt.cli import main
assert sys.stdin.isatty()
for words in json.loads(sys.argv[1]):
    try:
        code = main(words)
    except BaseException as error:
        code = repr(error)
    print(json.dumps([words[0], code]), flush=True)
"""


@pytest.mark.slow
@forked
def test_no_command_runs_code_of_a_checkpoint_even_if_a_terminal_answers_yes(folder, tmp_path):
    mark = tmp_path / "mark"
    (folder / "evil.py").write_text(EVIL.format(mark=str(mark)))
    classes = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    edit(folder / "config.json", model_type="evil", auto_map=classes)
    own = {"auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}}
    edit(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer", **own)
    (tmp_path / "text.txt").write_text("Some text. " * 500)
    text, run, out = str(tmp_path / "text.txt"), str(folder), str(tmp_path / "out")
    resumed = tmp_path / "resumed" / "checkpoint-1"
    resumed.parent.mkdir()
    folder_copy = [(resumed / p.name, p.read_bytes()) for p in folder.iterdir()]
    resumed.mkdir()
    for path, content in folder_copy:
        path.write_bytes(content)
    (resumed / "trainer_state.json").write_text("{}")
    common = ["--data", text, "--output_dir"]
    verbs = [
        ["info", run],
        ["bench", "train", run],
        ["bench", "generate", run],
        ["generate", run, "x"],
        ["explain", run, "x"],
        ["chat", run],
        ["serve", run],
        ["eval", run, "--data", text],
        ["convert", run, out],
        ["export", run, out],
        ["push", run, "user/x", "--dry_run"],
        ["tokenize", text, out, "--tokenizer", run],
        ["train", *common, out, "--tokenizer", run],
        ["train", "finetune", "--from", run, *common, out],
        ["train", *common, str(resumed.parent), "--resume"],
    ]
    leader, follower = pty.openpty()  # a terminal on which somebody always says yes
    os.write(leader, b"y\n" * 100)
    done = run_python(ANSWER_YES, json.dumps(verbs), terminal=follower)
    os.close(leader)
    os.close(follower)
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert not mark.exists()
    assert [json.loads(line) for line in lines] == [[words[0], 2] for words in verbs], done.stderr
    assert "trust_remote_code=True" not in done.stderr and "[y/N]" not in done.stdout


# Files of a checkpoint


def edit(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def put(path: Path, value: float) -> None:
    weights = load_file(path)
    next(reversed(weights.values())).view(-1)[-1] = value
    save_file(weights, path, metadata={"format": "pt"})


def change(rename: Callable, more: dict[str, int] | None = None) -> Callable[[Path], None]:
    """Return what stores each tensor by another name or type, and zeros of some sizes."""

    def write_weights(path: Path) -> None:
        weights = dict(rename(name, tensor) for name, tensor in load_file(path).items())
        weights |= {name: torch.zeros(size) for name, size in (more or {}).items()}
        save_file(weights, path, metadata={"format": "pt"})

    return write_weights


def shard(path: Path, content: str) -> None:
    path.with_name("model.safetensors").unlink()
    path.write_text(content)


def write(content: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(content)


def twice(field: str) -> Callable[[Path], None]:
    """Return what adds a field to a file that has it already."""
    return lambda path: path.write_text(path.read_text().replace("{", "{" + field + ",", 1))


def fields(**given) -> Callable[[Path], None]:
    return lambda path: edit(path, **given)


CONFIG, GENERATION = "config.json", "generation_config.json"
INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
HOSTILE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "config deep": (CONFIG, write(DEEP)),
    "config a list": (CONFIG, write("[1]")),
    "config not text": (CONFIG, lambda path: path.write_bytes(b"\xff\xfe{}")),
    "config with a long number": (CONFIG, write('{"hidden_size": ' + "9" * 5000 + "}")),
    "ten million layers": (CONFIG, fields(num_hidden_layers=10**7, layer_types=None)),
    "10 ** 12 layers": (CONFIG, fields(num_hidden_layers=10**12, layer_types=None)),
    "many heads": (CONFIG, fields(num_attention_heads=2**40, num_key_value_heads=2**40)),
    "wide heads": (CONFIG, fields(head_dim=2**40)),
    "wide": (CONFIG, fields(hidden_size=2**62)),
    "wide, as a width may be": (CONFIG, fields(hidden_size=2**30, intermediate_size=2**30)),
    "many tokens": (CONFIG, fields(vocab_size=2**30)),
    "long table": (CONFIG, fields(position_embedding_type="learned", block_size=2**31 - 1)),
    "width a text": (CONFIG, fields(hidden_size="32")),
    "width a list": (CONFIG, fields(hidden_size=[32])),
    "rotation a number": (CONFIG, fields(rope_parameters=5)),
    "rotation a text": (CONFIG, fields(rope_parameters={"rope_type": "default", "rope_theta": ""})),
    "layers a number": (CONFIG, fields(layer_types=7)),
    "norm not a number": (CONFIG, fields(norm_eps=float("nan"))),
    "type a list": (CONFIG, fields(model_type=["nanogpt"])),
    "type unknown": (CONFIG, fields(model_type="gpt" * 1000)),
    "kernel": (CONFIG, fields(attn_implementation="evil/kernel")),
    "kernel, nested": (CONFIG, fields(attn_implementation={"": "evil/kernel"})),
    "settings deep": (GENERATION, write(DEEP)),
    "settings a list": (GENERATION, write("[]")),
    "temperature a text": (GENERATION, fields(temperature="hot")),
    "temperature not a number": (GENERATION, fields(temperature=float("inf"))),
    "top_k a list": (GENERATION, fields(top_k=[1])),
    "many beams": (GENERATION, fields(num_beams=20_000)),
    "many answers": (GENERATION, fields(num_return_sequences=10**9)),
    "eos a text": (GENERATION, fields(eos_token_id="0")),
    "eos texts": (GENERATION, fields(eos_token_id=["0"])),
    "a name with two values": (CONFIG, twice('"vocab_size": 5')),
    "settings with two values": (GENERATION, twice('"eos_token_id": 5')),
    "words with two values": ("tokenizer_config.json", twice('"eos_token": "a"')),
    "tokenizer deep": ("tokenizer.json", write(DEEP)),
    "tokenizer a list": ("tokenizer.json", write("[]")),
    "tokenizer without a model": ("tokenizer.json", fields(model=5)),
    "words deep": ("tokenizer_config.json", write(DEEP)),
    "words a text": ("tokenizer_config.json", write('"x"')),
    "map deep": ("special_tokens_map.json", write(DEEP)),
    "added a list": ("added_tokens.json", write("[1]")),
    "index deep": (INDEX, lambda path: shard(path, DEEP)),
    "index a list": (INDEX, lambda path: shard(path, "[]")),
    "index with a list": (INDEX, lambda path: shard(path, '{"weight_map": [1]}')),
    "index to elsewhere": (INDEX, lambda path: shard(path, '{"weight_map": {"a": "../b"}}')),
    "index of numbers": (INDEX, lambda path: shard(path, '{"weight_map": {"a": 5}}')),
    "NaN": (WEIGHTS, lambda path: put(path, float("nan"))),
    "infinity": (WEIGHTS, lambda path: put(path, float("inf"))),
    "whole numbers": (WEIGHTS, change(lambda name, tensor: (name, tensor.to(torch.int8)))),
    "a bias": (WEIGHTS, change(lambda name, tensor: (name, tensor), {"lm_head.bias": 257})),
    "compiled": (WEIGHTS, change(lambda name, tensor: (f"_orig_mod.{name}", tensor))),
    "adapter": ("adapter_config.json", write('{"base_model_name_or_path": "evil/base"}')),
}


ONLY_TOO_LARGE = ("wide, as a width may be", "many tokens", "long table")


@pytest.mark.parametrize("case", HOSTILE)
def test_every_command_refuses_a_hostile_file_in_one_sentence_that_names_it(
    case, folder, tmp_path, capsys, monkeypatch
):
    file, harm = HOSTILE[case]
    harm(folder / file)
    (tmp_path / "text.txt").write_text("Some text. " * 500)
    monkeypatch.chdir(tmp_path)
    verbs = [
        ["generate", "run", "x"],
        ["eval", "run", "--data", "text.txt"],
        ["explain", "run", "x"],
        ["chat", "run"],
        ["push", "run", "user/x", "--dry_run"],
        ["train", "finetune", "--from", "run", "--data", "text.txt", "--output_dir", "new"],
    ]
    if case not in ("adapter", "long table"):  # not read; cannot be expressed
        verbs.append(["export", "run", "out", "--to", "qwen3"])
    if file == CONFIG and case not in ONLY_TOO_LARGE:  # which info may describe
        verbs.append(["info", "run"])
    for words in verbs:
        code = main(words)
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert code == 2, words
        assert file in said or (file in (WEIGHTS, "added_tokens.json") and "run" in said), words
        assert len(said) < 1000, words
    assert not (tmp_path / "out").exists() and not (tmp_path / "new" / CONFIG).exists()


@pytest.mark.parametrize(
    "state",
    [
        {"global_step": "1"},
        {"global_step": 1.5},
        {"log_history": 5},
        {"log_history": [5]},
        {"log_history": [{"step": "x", "eval_loss": 1.0}]},
        {"is_world_process_zero": "yes"},
        {"save_steps": []},
        {"unknown": 1},
    ],
)
def test_a_hostile_state_is_refused_by_name(state, folder):
    step = folder / "checkpoint-1"
    step.mkdir()
    (step / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"checkpoint-1/trainer_state\.json is damaged"):
        find_intact_checkpoint(folder)


@pytest.mark.parametrize(
    "text",
    [
        DEEP,
        "[]",
        '{"stateful_callbacks": []}',
        '{"stateful_callbacks": {"InterruptibleTrainer": 5}}',
        '{"stateful_callbacks": {"InterruptibleTrainer": {"sizes": [1]}}}',
        '{"stateful_callbacks": {"InterruptibleTrainer": {"sizes": {"config.json": "x"}}}}',
        '{"stateful_callbacks": {"InterruptibleTrainer": {"sizes": {"../x": 1}}}}',
        '{"stateful_callbacks": {"InterruptibleTrainer": {"checksums": 7}}}',
    ],
)
def test_a_checkpoint_with_a_hostile_record_does_not_count(text, folder):
    step = folder / "checkpoint-1"
    step.mkdir()
    (step / "trainer_state.json").write_text(text)
    assert find_last_checkpoint(folder) is None


@pytest.mark.parametrize(
    "name",
    [
        *("generation_config.json", "chat_template.jinja", "model.safetensors", "tokenizer.json"),
        "additional_chat_templates/a.jinja",
    ],
)
def test_a_link_that_leads_out_of_the_folder_is_not_loaded(
    name, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    path, secret = folder / name, tmp_path / "secret"
    path.parent.mkdir(exist_ok=True)
    if path.is_file():
        path.rename(secret)
    else:
        secret.write_text("{{ messages }}")
    path.symlink_to(secret)
    (tmp_path / "text.txt").write_text("Some text. " * 500)
    verbs = [
        ["generate", "run", "x"],
        ["export", "run", "out", "--to", "qwen3"],
        ["train", "finetune", "--from", "run", "--data", "text.txt", "--output_dir", "new"],
    ]
    for words in verbs:
        assert main(words) == 2
        assert "outside its folder: it was not followed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "new").exists()


def test_a_link_to_a_whole_folder_is_loaded(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    (folder / "inner.json").symlink_to("config.json")
    load_checkpoint(tmp_path / "link")


def test_unusual_but_valid_settings_are_accepted(folder):
    edit(folder / "generation_config.json", early_stopping="never")
    rope = {"rope_type": "default", "rope_theta": 3_580_165_449}
    edit(folder / CONFIG, rope_parameters=rope)
    load_checkpoint(folder)


def test_a_conversion_refuses_weights_that_are_not_finite(tmp_path):
    from references import make_reference

    make_reference("gpt2").save_pretrained(tmp_path / "source")
    put(tmp_path / "source" / WEIGHTS, float("nan"))
    with pytest.raises(ValueError, match=r"source cannot be used: .* has NaN or infinity"):
        convert_checkpoint(tmp_path / "source", tmp_path / "out")
    for name, value in {"n_layer": 10**9, "n_head": 2**40, "vocab_size": 2**40}.items():
        edit(tmp_path / "source" / CONFIG, **{name: value})
        with pytest.raises(ValueError, match=rf"config\.json has {name}=.* at most"):
            convert_checkpoint(tmp_path / "source", tmp_path / "out")
        edit(tmp_path / "source" / CONFIG, **{name: 2})


def test_half_precision_weights_of_any_size_are_finite(folder):
    weights = {n: t.bfloat16() for n, t in load_file(folder / WEIGHTS).items()}
    next(iter(weights.values())).fill_(1e30)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    assert load_checkpoint(folder)[0].lm_head.weight.isfinite().all()


def test_no_pickle_of_a_checkpoint_is_opened(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor"):
        load_checkpoint(folder)


# Text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", r"\*a is not read: write its value"),
        ("data: &d {x: 1}\nmodel: {<<: *d}\n", r"\*d is not read"),
        ("[" * 100_000, "nested too deeply"),
        ("a: !!python/object/apply:os.system [true]\n", "could not determine a constructor"),
        ("a: 2026-99-99\n", "month must be"),
        ("training: {seed: 1, seed: 1}\n", "'seed' is there twice: leave one out"),
        ("data: {data: a}\nmodel: {}\ndata: {data: b}\n", "'data' is there twice.* line 3"),
        ("data: [1\n", "not valid YAML"),
        ("# " + "x" * 2**20, "more than 1,048,576 characters"),
    ],
)
def test_a_hostile_recipe_is_refused_by_name(text, reason, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"recipe\.yaml.*{reason}"):
        parse_settings(path)


def test_a_hostile_setting_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^rope_parameters=.* is nested too deeply"):
        parse_settings("quickstart", ["--rope_parameters", DEEP])


def test_plain_yaml_and_json_are_read():
    assert parse_yaml("a: [1, yes, x]\n", where="here") == {"a": [1, True, "x"]}
    assert parse_json('{"a": [1]}', where="here") == {"a": [1]}
    assert parse_json('{"a": 1, "b": {"a": 2}, "a": 1}', where="here") == {"a": 1, "b": {"a": 2}}


def test_a_token_outside_the_vocabulary_is_warned_of(folder, caplog):
    for ends, count in ((5, 0), ([0, 5], 0), (len(TOKENIZER), 1), ([0, 9999], 1)):
        caplog.clear()
        edit(folder / GENERATION, eos_token_id=ends)
        load_checkpoint(folder)
        warning = f"eos_token_id={ends}, but the model has 257 tokens"
        assert caplog.text.count(warning) == caplog.text.count("such a token never") == count


def test_a_tokenizer_whose_expression_never_ends_is_stopped_by_its_library(folder):
    """Oniguruma gives up after so many steps, and tokenizers panics: no `Exception` in Python."""
    content = json.loads((folder / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
    content["pre_tokenizer"] = split | {"invert": False}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_checkpoint(folder)[1]
    with (
        pytest.raises(ValueError, match=r"^Here: .*retry-limit-in-match over"),
        explain_errors("Here"),
    ):
        tokenizer("a" * 40 + "!")
    assert main(["generate", str(folder), "a" * 40 + "!"]) == 2


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://user:PW@host:8/a/b.txt?X-Signature=PW#PW", "https://host:8/a/b.txt"),
        ("HTTP://PW@host", "http://host"),
        ("http://user:PW@[::1/a", "http://..."),
        ("user/corpus", "user/corpus"),
        ("a folder/x?y", "a folder/x?y"),
    ],
)
def test_an_address_is_shown_without_secrets(address, shown):
    assert without_secrets(address) == shown


def test_a_link_to_itself_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match="loop"):
        path_inside(tmp_path, "loop")
