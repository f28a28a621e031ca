"""The command line as a person uses it, and its one sentence for each bad input."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from children import forked, run_command, run_python
from conftest import CORPUS as TEXT
from safetensors.torch import load_file

from hf_nanogpt import NanoGPTConfig, NanoGPTForCausalLM
from hf_nanogpt.cli import main, measure, train_help
from hf_nanogpt.errors import UserError
from hf_nanogpt.training.arguments import parse_settings

pytestmark = forked
ROOT = Path(__file__).parent.parent
SIZE = ["--n_layer=1", "--n_embd=16", "--n_head=2", "--block_size=16", "--tokenizer=byte"]
QUICK = [*SIZE, "--max_steps=2", "--per_device_train_batch_size=2", "--num_threads=1"]


def run(*argv: str, cwd: Path | None = None, **kwargs) -> subprocess.CompletedProcess:
    command = [str(Path(sys.executable).parent / "hf-nanogpt"), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, **kwargs)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "my.txt").write_text(TEXT, encoding="utf-8")
    flags = ["--data=my.txt", "--output_dir=runs/mine", *QUICK]
    done = run_command("train", *flags, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "runs/mine is ready" in done.stdout and "bits per byte" in done.stdout
    assert "Samples, from " in done.stdout and "-gram model" in done.stdout
    assert len(re.findall(r"hf.nanogpt (generate|eval|info) runs/mine", done.stdout)) == 3
    # Each side has a token for each byte, an end in front and an end behind.
    plan, _, _ = done.stdout.partition("validation loss")
    sides = re.search(r"^data +([\d,]+) tokens to train on, ([\d,]+) tokens held out", plan)
    learnt, held_out = (int(side.replace(",", "")) for side in sides.groups())
    assert learnt + held_out == len(TEXT.encode()) + 4 and 0.1 < held_out / learnt < 0.12
    passes = 2 * 2 * 15 / (learnt - 1)  # 2 steps of 2 blocks, which predict 15 tokens each
    assert re.search(rf"^steps +2, {passes:.2f} passes over the data$", plan, re.MULTILINE)
    assert re.search(r"^tokenizer +byte, 257 tokens$", plan, re.MULTILINE)
    assert re.search(r"^recipe +chosen from the corpus, muon, peak rate 0.03$", plan, re.MULTILINE)
    assert "validation loss" in done.stdout and "\r" not in done.stdout + done.stderr
    return folder / "runs" / "mine"


def refuse(capsys, *argv: str) -> str:
    """Run the command in this process, expect exit code 2 and return its one sentence."""
    assert main([str(arg) for arg in argv]) == 2
    output = capsys.readouterr()
    [sentence] = [line for line in output.err.splitlines() if line.startswith("hf-nanogpt: ")]
    assert "Traceback" not in output.err
    return sentence


def _python(code: str, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, **kwargs)


def test_help_and_wrong_flags_are_answered_without_importing_torch():
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert entry == {"hf-nanogpt": "hf_nanogpt_command:main"}
    done = _python(
        "import sys\n"
        "from hf_nanogpt_command import main\n"
        "for argv in (['--help'], ['--version'], ['trian'], ['generate', '--topp', '1'],\n"
        "             ['train', '--help']):\n"
        "    main(argv)\n"
        "heavy = ('torch', 'transformers', 'huggingface_hub')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.slow
def test_the_command_registers_before_a_verb_computes():
    done = _python(
        "from hf_nanogpt_command import main\n"
        "main(['info', 'gpt2'])\n"
        "from transformers import AutoConfig\n"
        "print(AutoConfig.for_model('nanogpt').model_type)"
    )
    assert done.stdout.splitlines()[-1] == "nanogpt", done.stderr


@pytest.mark.slow
def test_a_script_with_the_name_of_the_command_registers(tmp_path):
    script = tmp_path / "hf-nanogpt.py"
    script.write_text(
        "import hf_nanogpt\n"
        "from transformers import AutoConfig\n"
        "print(AutoConfig.for_model('nanogpt').model_type)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout == "nanogpt\n", done.stderr


def test_variables_are_set_before_torch_and_tqdm_are_imported(tmp_path):
    # What imports torch or tqdm first would find the variables missing.
    (tmp_path / "tqdm.py").write_text(
        "import os, sys\n"
        "print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('TQDM_DELAY'))\n"
        "sys.stdout.flush(); os._exit(0)"
    )
    (tmp_path / "torch.py").write_text((tmp_path / "tqdm.py").read_text())
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "TQDM_DELAY")}
    environment["PYTHONPATH"] = f"{tmp_path}:{ROOT}"
    command = ["-c", "from hf_nanogpt_command import main; main(['info', 'gpt2'])"]
    module, library = ["-m", "hf_nanogpt", "info", "gpt2"], ["-c", "import hf_nanogpt"]
    # Only the command may delay progress bars: in a program of their own, people have their own.
    for argv, delay in ((command, "2"), (module, "None"), (library, "None")):
        done = subprocess.run(
            [sys.executable, *argv], capture_output=True, text=True, timeout=120, env=environment
        )
        assert done.stdout == f"10000 {delay}\n", (argv, done.stderr)


@pytest.mark.parametrize("error_type", [ValueError, TypeError, RuntimeError])
def test_a_bug_shows_its_traceback_and_a_mistake_of_the_user_does_not(error_type, monkeypatch):
    def fail(argv):
        raise error_type("a bug")

    monkeypatch.setattr("hf_nanogpt.cli.measure.run_info", fail)
    with pytest.raises(error_type, match="a bug"):
        main(["info", "gpt2"])
    error_type = UserError
    assert main(["info", "gpt2"]) == 2


def test_every_verb_has_help(capsys):
    for verb in ("generate", "eval", "info"):
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        assert stop.value.code == 0 and f"hf-nanogpt {verb}" in capsys.readouterr().out


def test_help_of_train_fits_on_a_screen_and_shows_the_defaults(capsys):
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.count("\n") <= 40
    for name in ("quickstart", "--resume", "--from", "--overwrite"):
        assert name in text
    data, architecture, training = parse_settings("quickstart")
    values = {**asdict(data), **architecture, **vars(training), "dropout": 0.0}
    for name, default, _ in (row for rows in train_help._SETTINGS.values() for row in rows):
        known = values.get(NanoGPTConfig.attribute_map.get(name, name))
        assert str(known if known is not None and known is not False else "") == default, name


def test_help_of_a_group_shows_its_settings_and_no_others(capsys):
    assert main(["train", "--help", "optim"]) == 0
    text = capsys.readouterr().out
    assert "--learning_rate" in text and "--adam_beta2" in text and "--hub_model_id" not in text
    assert main(["train", "--help", "all"]) == 0
    assert capsys.readouterr().out.count("\n  --") > 150
    for topic, flag in (("data", "--text_column"), ("model", "--rope_parameters")):
        assert main(["train", "--help", topic]) == 0
        assert flag in capsys.readouterr().out
    assert "Did you mean optim?" in refuse(capsys, "train", "--help", "optin")


def test_generate_streams_the_prompt_and_new_text(checkpoint):
    done = run_command("generate", checkpoint, "def", "--greedy", "--max_new_tokens", "5")
    assert done.returncode == 0 and done.stdout.startswith("def")
    again = run_command("generate", checkpoint, "def", "--temperature=0", "--max_new_tokens=5")
    assert again.stdout == done.stdout


@pytest.mark.slow
def test_the_installed_command_trains_and_generates(tmp_path):
    (tmp_path / "my.txt").write_text(TEXT, encoding="utf-8")
    flags = ["--data", "my.txt", "--output_dir", "runs/mine", *QUICK]
    done = run("train", *flags, cwd=tmp_path)
    assert done.returncode == 0 and "runs/mine is ready" in done.stdout, done.stderr
    assert done.stdout.count("hf-nanogpt ") == 3
    done = run("generate", "runs/mine", "def", "--greedy", "--max_new_tokens=5", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("def"), done.stderr


def test_generate_takes_every_sampling_flag(checkpoint, capsys):
    flags = ["--temperature=0.9", "--top_k=20", "--top_p=0.9", "--min_p=0.01", "--seed=3"]
    flags += ["--repetition_penalty=1.1", "--max_new_tokens=6", "--num_samples=2", "--ignore_eos"]
    texts = []
    for _ in range(2):
        assert main(["generate", str(checkpoint), "im", *flags]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].count("--- sample") == 2
    first, second = texts[0].split("--- sample 2 ---")
    assert first.strip() != second.strip()


def test_empty_prompt_starts_a_document(checkpoint, capsys):
    assert main(["generate", str(checkpoint), "--max_new_tokens=4", "--seed=1"]) == 0


def test_eval_and_info_print_their_figures(checkpoint, capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x\n")
    assert main(["eval", str(checkpoint), "--data", str(text)]) == 0
    output = capsys.readouterr().out
    assert "bits per byte" in output and f"bytes          {len(text.read_bytes())}" in output
    assert main(["info", str(checkpoint)]) == 0
    metrics = json.loads((checkpoint / "metrics.json").read_text())
    assert f"{metrics['num_parameters']:,}" in capsys.readouterr().out


def test_eval_warns_of_text_that_the_checkpoint_was_trained_on(checkpoint, capsys, monkeypatch):
    monkeypatch.chdir(checkpoint.parent.parent)
    Path("other.txt").write_text(TEXT, encoding="utf-8")
    own = "with 0.1 of it held out; "
    for flags, said in {
        "my.txt --held_out=0.2": f"{own}--held_out 0.2 measures also text that it was trained on",
        "my.txt": f"{own}without --held_out, this measures also text that it was trained on",
        "my.txt --held_out=0.01": f"{own}--held_out 0.01 measures only a part of that",
        "my.txt --held_out=0.1": "",
        "other.txt": "",
    }.items():
        assert main(["eval", "runs/mine", f"--data={flags.split()[0]}", *flags.split()[1:]]) == 0
        warned = re.findall("Warning: .*", capsys.readouterr().err)
        assert len(warned) == bool(said) and said in "".join(warned), flags


@pytest.mark.parametrize("command", ["7", '["--data"]', '["--data", "a", "--held_out", "x"]', "["])
def test_metrics_that_say_nothing_of_the_data_are_passed_over(command, tmp_path):
    (tmp_path / "metrics.json").write_text(f'{{"eval_command": {command}}}')
    assert measure._read_held_out(tmp_path) == (None, None)


def test_what_was_held_out_is_found_behind_a_flag_without_a_value(tmp_path):
    command = ["--no_document_mask", "--data", "my.txt", "--held_out", "0.1"]
    (tmp_path / "metrics.json").write_text(json.dumps({"eval_command": command}))
    assert measure._read_held_out(tmp_path) == ("my.txt", 0.1)


def test_export_and_convert_there_and_back(checkpoint, capsys, tmp_path):
    assert main(["export", str(checkpoint), str(tmp_path / "native")]) == 0
    assert "as qwen3" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "native"), str(tmp_path / "ours")]) == 0
    assert "from qwen3" in capsys.readouterr().out
    before, after = (load_file(p / "model.safetensors") for p in (checkpoint, tmp_path / "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert main(["export", str(checkpoint), str(tmp_path / "a.gguf"), "--to", "gguf"]) == 0
    assert main(["export", str(checkpoint), str(tmp_path / "b.gguf"), "--dtype", "f16"]) == 0
    assert (tmp_path / "b.gguf").is_file()  # the ending decides
    assert (tmp_path / "a.gguf").read_bytes().startswith(b"GGUF")
    assert "not empty" in refuse(capsys, "export", checkpoint, tmp_path / "native")
    assert "qk_norm" in refuse(capsys, "export", checkpoint, tmp_path / "b", "--to", "llama")
    assert "qwen3" in refuse(capsys, "export", checkpoint, tmp_path / "b", "--to", "qwen")
    assert "dtype=f16" in refuse(capsys, "export", checkpoint, tmp_path / "b", "--dtype", "f16")
    assert "already a checkpoint of ours" in refuse(capsys, "convert", checkpoint, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_info_of_the_largest_preset_makes_no_weights(capsys):
    assert main(["info", "gpt3-175b"]) == 0  # they would take 650 GiB
    assert "174,604,259,328" in capsys.readouterr().out


def test_recipe_file_sets_defaults_and_flags_win(tmp_path, capsys):
    (tmp_path / "my.txt").write_text(TEXT, encoding="utf-8")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"data:\n  data: {tmp_path}/my.txt\n  tokenizer: byte\n"
        "model: {n_layer: 3, n_embd: 16, n_head: 2, block_size: 16}\n"
        f"training: {{max_steps: 2, output_dir: {tmp_path}/out, learning_rate: 1e-2}}\n"
    )
    assert main(["train", str(recipe), "--n_layer", "1", "--disable_tqdm", "True"]) == 0
    assert "passes over" not in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"]) == (1, 16)
    state = json.loads((tmp_path / "out/checkpoint-2/trainer_state.json").read_text())
    settings = state["stateful_callbacks"]["InterruptibleTrainer"]["settings"]
    assert (settings["learning_rate"], settings["max_steps"]) == (1e-2, 2)


@pytest.mark.slow
def test_any_preset_and_size_by_flags(tmp_path, capsys):
    (tmp_path / "my.txt").write_text(TEXT, encoding="utf-8")
    for preset in ("gpt2", "llama-7b", "nanochat-d12"):
        out = tmp_path / preset
        flags = ["--data", tmp_path / "my.txt", "--output_dir", out, "--preset", preset, *QUICK]
        flags += ["--sample_prompt=def", "--disable_tqdm=True"]
        assert main(["train", *map(str, flags)]) == 0
        assert main(["info", str(out)]) == 0


def test_show_prints_the_settings_without_secrets_and_trains_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    secret = ["--data=https://me:hf_marked@host/a.txt?key=hf_marked", "--hub_token=hf_marked"]
    assert main(["train", "quickstart", "--show", "--preset=gpt2", *secret]) == 0
    text = capsys.readouterr().out
    assert re.search(r"hidden_size +768 +preset gpt2", text) and "https://host/a.txt" in text
    assert re.search(r"max_steps +700 +recipe quickstart", text)
    assert "hf_marked" not in text and not list(tmp_path.iterdir())
    assert "hf_marked" not in refuse(
        capsys, "train", "--show", *secret
    )  # without a recipe, it looks
    assert "Did you mean gpt2?" in refuse(capsys, "train", "--show", "--preset=gpt-2")


def test_overwrite_and_resume(checkpoint, capsys, monkeypatch):
    monkeypatch.chdir(checkpoint.parent.parent)
    base = ["train", "--data", "my.txt", "--output_dir", "runs/mine", *QUICK]
    assert "--overwrite" in refuse(capsys, *base)
    before = (checkpoint / "model.safetensors").read_bytes()
    assert "exclude each other" in refuse(capsys, *base, "--resume", "--overwrite")
    assert main([*base, "--overwrite"]) == 0
    assert (checkpoint / "model.safetensors").read_bytes() == before  # same seed, same model
    (checkpoint / "notes.md").write_text("mine")
    assert "notes.md" in refuse(capsys, *base, "--overwrite")
    (checkpoint / "notes.md").unlink()
    assert main([*base, "--resume", "--max_steps=4"]) == 0
    assert json.loads((checkpoint / "metrics.json").read_text())["train_steps"] == 4


TRAIN = f"train --data good.txt --output_dir out {shlex.join(QUICK)}"
# A command with a mistake in it, and what its one sentence has to say. `good` is a checkpoint, and
# the other names are those of `_write_wrong_files`.
MISTAKES = {
    # the command itself
    "trian": "Did you mean train?",
    "--frob": "not a command",
    "bench frob": "train, generate",
    "info": "required: model",
    "generate good x --topp=1": "Did you mean --top_p?",
    "generate good x --top_k=many": "--top_k: invalid int value: 'many'",
    "push good": "required: USER/NAME",
    "tokenize good.txt": "tokenize DATA FOLDER",
    "train good.txt": "To train on it: hf-nanogpt train --data good.txt",
    "train good": "To continue training it: hf-nanogpt train finetune --from good --data TEXT",
    # data
    "train --data none.txt": "none.txt|no such file",
    "train --data empty.txt": "empty.txt|empty",
    "train --data one.txt": "one.txt|too small",
    "train --data binary.bin": "binary.bin|UTF-8",
    "train --data blanks.txt": "blanks.txt|only blanks",
    "train --data nul.txt": "nul.txt|binary|NUL byte at offset 9003|To remove such bytes",
    "train --data late.txt": "late.txt|NUL|remove them",
    "train --data same.txt": "same.txt|one character|nothing to learn",
    f"train --data same.txt --tokenizer=bpe {shlex.join(SIZE[:4])}": "vocab_size=|only",
    "train --data equal": "equal|repeated",
    "train --data line.txt": "tokens|give more text",
    "train --data good.txt --validation_data blanks.txt": "validation_data=blanks.txt|only blanks",
    "train --data rows.jsonl": "text_column='text'|body",
    "train --data bad.jsonl": "bad.jsonl",
    "train --data user/corpus": "user/corpus|HF_HUB_OFFLINE",
    f"train --data short.txt {shlex.join(SIZE)} --block_size=64": "tokens|64",
    "tokenize none.txt out": "none.txt",
    "tokenize good.txt out --frob=1": "--frob",
    "tokenize good.txt out --tokenizer=bpee": "bpee|bpe, char, byte",
    "tokenize good.txt full": "full",
    # recipes
    "train quikstart": "quikstart|Did you mean|quickstart",
    "train none.yaml": "none.yaml",
    "train bad.yaml": "bad.yaml|YAML",
    "train flat.yaml": "flat.yaml|each with settings",
    "train typo.yaml": "--max_step|--max_steps",
    "train many.yaml": "max_steps|many",
    # the architecture
    f"{TRAIN} --preset=gpt-2": "gpt-2|Did you mean|gpt2",
    f"{TRAIN} --n_layer=0": "num_hidden_layers=0",
    f"{TRAIN} --n_embd=-16": "-16",
    f"{TRAIN} --n_embd=65 --n_head=4": "n_embd|65|n_head|4",
    f"{TRAIN} --n_embd=36 --n_head=4": "head_dim=9|even",
    f"{TRAIN} --hidden_act=frob": "hidden_act|frob",
    f"{TRAIN} --norm_type=frob": "norm_type|frob",
    f"{TRAIN} --dropout=2": "dropout=2",
    f"{TRAIN} --rope_parameters=frob": "rope_parameters|JSON",
    f'{TRAIN} --rope_parameters=\'{{"rope_type": "frob"}}\'': "rope_type must be one of",
    f'{TRAIN} --rope_parameters=\'{{"rope_type": "linear"}}\'': "factor",
    f'{TRAIN} --rope_parameters=\'{{"rope_theta": "x", "rope_type": "default"}}\'': "rope_theta",
    # the training
    f"{TRAIN} --max_step=3": "--max_step|--max_steps",
    f"{TRAIN} --max_steps=many": "max_steps|many",
    f"{TRAIN} --lr_scheduler_type=frob": "lr_scheduler_type|frob",
    f"{TRAIN} --warmup_steps=-5": "warmup_steps",
    f"{TRAIN} --eval_strategy=frob": "frob",
    f"{TRAIN} --logging_steps=0": "logging_steps",
    f"{TRAIN} --bf16 --fp16 --use_cpu": "At most one of fp16 and bf16",
    f"{TRAIN} --load_best_model_at_end --save_steps=3 --eval_steps=2": "load_best_model_at_end",
    f"{TRAIN} --optim_recipe=sgd": "optim_recipe|sgd|muon",
    f"{TRAIN} --report_to=tracio": "report_to=tracio",
    f"{TRAIN} --momentum_warmup_steps=-1": "momentum_warmup_steps=-1",
    f"{TRAIN} --num_threads=0": "num_threads=0",
    f"{TRAIN} --tokenizer=bpee": "bpee|bpe, char, byte",
    f"{TRAIN} --vocab_size=60000 --tokenizer=bpe": "vocab_size=60000|or less",
    f"{TRAIN} --vocab_size=100 --tokenizer=bpe": "vocab_size=100|257",
    f"{TRAIN} --context_length=32": "context_length=32|16",
    f"{TRAIN} --output_dir=good.txt/x": "output_dir",
    f"{TRAIN} --resume --output_dir=full": "checkpoint-*",
    f"{TRAIN} --resume --overwrite": "exclude each other",
    "train quickstart --recipe finetune": "keep one of them",
    f"{TRAIN} --lora": "--from CHECKPOINT",
    # checkpoints
    "generate none x": "none|this folder does not exist",
    "generate full x": "full|config.json",
    "generate good.txt x": "is a file",
    "generate user/model x": "HF_HUB_OFFLINE",
    "generate no-json x": "no-json|JSON",
    "generate no-type x": "no-type|frob",
    "generate no-number x": "no-number|hidden_size",
    "generate negative x": "negative|hidden_size",
    "generate no-rope x": "no-rope|rope_type",
    "generate no-dtype x": "no-dtype|float3",
    "generate no-weights x": "no-weights",
    "generate cut x": "cut|model.safetensors",
    "generate no-tokenizer x": "no-tokenizer|tokenizer.json",
    "info no-number": "no-number|hidden_size",
    "info gpt-2": "gpt2",
    "convert no-number out": "no-number",
    "convert good.txt out": "good.txt",
    "export cut out": "cut",
    "export good full": "full|not empty",
    "push no-rope user/x --dry_run": "no-rope|rope_type",
    "pull user/model": "HF_HUB_OFFLINE",
    "bench generate no-type": "frob",
    "doctor none": "none",
    # their use
    "generate good x --temperature=-1": "temperature=-1.0",
    "generate good x --top_p=1.5": "top_p=1.5",
    "generate good x --max_new_tokens=0": "max_new_tokens=0",
    "generate good x --max_new_tokens=500": "context of 16",
    "generate good x --num_samples=0": "num_samples=0",
    "generate good x --quantize=int4": "--quantize|int8",
    "chat good": "chat template",
    "serve good --port=-1": "port",
    "explain good x --html=good.txt/x.html": "good.txt",
    "export good out --to=frob": "to='frob'",
    "export good out --dtype=f16": "--to gguf only",
    "export good out --to=llama": "qk_norm",
    "eval good": "--data --tasks",
    "eval good --data none.txt": "none.txt",
    "eval good --data good.txt --context_length=99": "99",
    "eval good --data good.txt --batch_size=0": "batch_size=0",
    "eval good --data good.txt --limit=3": "--limit is for --tasks only",
    "eval good --tasks x --stride=3": "--stride is for --data only",
    "bench train --rounds=0": "rounds=0",
}


@pytest.fixture(scope="module")
def wrong(checkpoint, tmp_path_factory) -> Path:
    """A folder with a good text and checkpoint, and with what nobody can use."""
    folder = tmp_path_factory.mktemp("wrong")
    _write_wrong_files(folder)
    files = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
    good = folder / "good"
    good.mkdir()
    for name in (*files, "tokenizer_config.json"):
        shutil.copy(checkpoint / name, good)
    config = json.loads((good / "config.json").read_text())
    for name, field in {
        "no-type": {"model_type": "frob"},
        "no-number": {"hidden_size": "many"},
        "negative": {"hidden_size": -16},
        "no-rope": {"rope_parameters": {"rope_type": "frob"}},
        "no-dtype": {"dtype": "float3"},
    }.items():
        shutil.copytree(good, folder / name)
        (folder / name / "config.json").write_text(json.dumps(config | field))
    for name, file, content in (
        ("no-json", "config.json", b"{"),
        ("cut", "model.safetensors", (good / "model.safetensors").read_bytes()[:200]),
        ("no-weights", "model.safetensors", None),
        ("no-tokenizer", "tokenizer.json", b"{"),
    ):
        shutil.copytree(good, folder / name)
        (folder / name / file).unlink()
        if content:
            (folder / name / file).write_bytes(content)
    return folder


def _write_wrong_files(folder: Path) -> None:
    (folder / "good.txt").write_text(TEXT, encoding="utf-8")
    (folder / "empty.txt").touch()
    (folder / "one.txt").write_text("x")
    (folder / "binary.bin").write_bytes(bytes(range(256)) * 8)
    (folder / "blanks.txt").write_text(" \n" * 10_000)
    (folder / "nul.txt").write_text("\n" * 9000 + "abc\0" + TEXT, encoding="utf-8")
    (folder / "late.txt").write_text(TEXT + "\0" + TEXT, encoding="utf-8")
    (folder / "same.txt").write_text("a" * 20_000)
    (folder / "line.txt").write_text("Only one line, which is not long.\n")
    (folder / "equal").mkdir()
    for number in range(30):
        (folder / "equal" / f"{number}.txt").write_text("The same text in each file.\n")
    (folder / "short.txt").write_text("A text of some words, no more.")
    (folder / "rows.jsonl").write_text('{"body": "a text"}\n' * 30)
    (folder / "bad.jsonl").write_text('{"text": \n')
    (folder / "bad.yaml").write_text("data: [")
    (folder / "flat.yaml").write_text("data: my.txt")
    (folder / "typo.yaml").write_text("training:\n  max_step: 3\n")
    (folder / "many.yaml").write_text("training:\n  max_steps: many\n")
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").write_text("mine")


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(command, wrong, capsys, monkeypatch):
    if "--lora" in command:
        pytest.importorskip("peft")
    monkeypatch.chdir(wrong)
    before = sorted(wrong.rglob("*"))
    sentence = refuse(capsys, *shlex.split(command))
    missing = [words for words in MISTAKES[command].split("|") if words not in sentence]
    assert not missing, sentence
    assert sorted(wrong.rglob("*")) == before


HUGE = ["--n_layer=1", "--n_head=1000000", "--n_embd=2000000000", "--block_size=16"]


def test_too_little_memory_is_a_sentence_that_says_what_to_lower(tmp_path, capsys):
    (tmp_path / "my.txt").write_text(TEXT, encoding="utf-8")
    cases = {
        (
            "train",
            "--data",
            tmp_path / "my.txt",
            "--output_dir",
            tmp_path / "run",
            "--tokenizer=byte",
            *HUGE,
        ): "train: lower per_device_train_batch_size=",
        ("bench", "train", *HUGE): "bench: lower --batch_size",
        ("bench", "generate", *HUGE): "bench: lower --batch_size",
    }
    for argv, words in cases.items():
        assert f"for {words}" in refuse(capsys, *argv)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the limit does not hold")
def test_a_limit_of_memory_is_told_by_generate_and_eval(checkpoint, tmp_path):
    model = tmp_path / "model"
    size = {"n_embd": 64, "n_head": 2, "n_layer": 1, "block_size": 16384, "vocab_size": 257}
    NanoGPTForCausalLM(NanoGPTConfig(**size, attn_implementation="eager")).save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, model)
    edit = json.loads((model / "config.json").read_text()) | {"attn_implementation": "eager"}
    (model / "config.json").write_text(json.dumps(edit))
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 8, encoding="utf-8")
    code = """if True:
        import resource, sys
        import hf_nanogpt.training.run
        from hf_nanogpt.cli import main
        pages = int(open("/proc/self/statm").read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, -1))
        model, text = sys.argv[1:]
        prompt = open(text, encoding="utf-8").read()[:16000]
        codes = [main(["generate", model, prompt, "--max_new_tokens=2"]),
                 main(["eval", model, "--data", text, "--batch_size=4"])]
        print(codes)"""
    done = run_python(code, model, text)
    assert "[2, 2]" in done.stdout, done.stderr[-1500:]
    assert "not enough memory for generate: lower --max_new_tokens" in done.stderr
    assert "not enough memory for eval: lower --batch_size" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_plot_that_cannot_be_written_is_refused_before_evaluating(checkpoint, tmp_path, capsys):
    places = ["/proc/plot.png", tmp_path / f"{'x' * 300}.png", tmp_path / "none" / "plot.png"]
    (tmp_path / "plot.png.part").mkdir()
    for place in (*places, tmp_path / "plot.png"):
        argv = ["eval", checkpoint, "--data", "no-such-data.txt", "--plot", place]
        assert f"plot={place} cannot be written" in refuse(capsys, *argv)
