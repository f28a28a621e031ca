"""The command line as a person uses it, and its one sentence for each bad input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CORPUS as TEXT
from safetensors.torch import load_file

from hf_nanogpt import NanoGPTConfig, NanoGPTForCausalLM
from hf_nanogpt.cli import main

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
    done = run("train", "--data", "my.txt", "--output_dir", "runs/mine", *QUICK, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "runs/mine is ready" in done.stdout and "bits per byte" in done.stdout
    assert "A sample:" in done.stdout and done.stdout.count("hf-nanogpt ") == 3
    assert "Training: 100%" in done.stderr and "validation loss" in done.stdout + done.stderr
    return folder / "runs" / "mine"


def refuse(capsys, *argv: str) -> str:
    """Run the command in this process, expect exit code 2 and return its one sentence."""
    assert main([str(arg) for arg in argv]) == 2
    output = capsys.readouterr()
    [sentence] = [line for line in output.err.splitlines() if line.startswith("hf-nanogpt: ")]
    assert "Traceback" not in output.err
    return sentence


def test_help_does_not_import_torch():
    code = (
        "import sys; sys.argv[0] = 'hf-nanogpt'\n"
        "from hf_nanogpt.cli import main\n"
        "for argv in (['--help'], ['--version'], ['trian'], ['generate', '--topp', '1']):\n"
        "    main(argv)\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "False False", done.stderr


def test_every_verb_has_help(capsys):
    for verb in ("generate", "eval", "info"):
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        assert stop.value.code == 0 and f"hf-nanogpt {verb}" in capsys.readouterr().out
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for flag in ("--n_layer", "--max_steps", "--data", "--resume", "--optim_recipe", "quickstart"):
        assert flag in text


def test_generate_streams_the_prompt_and_new_text(checkpoint):
    done = run("generate", checkpoint, "def", "--greedy", "--max_new_tokens", "5")
    assert done.returncode == 0 and done.stdout.startswith("def")
    assert (
        done.stdout
        == run("generate", checkpoint, "def", "--temperature=0", "--max_new_tokens=5").stdout
    )


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


def test_export_and_convert_there_and_back(checkpoint, capsys, tmp_path):
    assert main(["export", str(checkpoint), str(tmp_path / "native")]) == 0
    assert "as qwen3" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "native"), str(tmp_path / "ours")]) == 0
    assert "from qwen3" in capsys.readouterr().out
    before, after = (load_file(p / "model.safetensors") for p in (checkpoint, tmp_path / "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert main(["export", str(checkpoint), str(tmp_path / "a.gguf"), "--to", "gguf"]) == 0
    assert (tmp_path / "a.gguf").read_bytes().startswith(b"GGUF")
    assert "not empty" in refuse(capsys, "export", checkpoint, tmp_path / "native")
    assert "qk_norm" in refuse(capsys, "export", checkpoint, tmp_path / "b", "--to", "llama")
    assert "qwen3" in refuse(capsys, "export", checkpoint, tmp_path / "b", "--to", "qwen")
    assert "dtype=f16" in refuse(capsys, "export", checkpoint, tmp_path / "b", "--dtype", "f16")
    assert "ours already" in refuse(capsys, "convert", checkpoint, tmp_path / "b")
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
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"]) == (1, 16)
    state = json.loads((tmp_path / "out/checkpoint-2/trainer_state.json").read_text())
    settings = state["stateful_callbacks"]["InterruptibleTrainer"]["settings"]
    assert (settings["learning_rate"], settings["max_steps"]) == (1e-2, 2)


def test_any_preset_and_size_by_flags(tmp_path, capsys):
    (tmp_path / "my.txt").write_text(TEXT, encoding="utf-8")
    for preset in ("gpt2", "llama-7b", "nanochat-d12"):
        out = tmp_path / preset
        flags = ["--data", tmp_path / "my.txt", "--output_dir", out, "--preset", preset, *QUICK]
        flags += ["--sample_prompt=def", "--disable_tqdm=True"]
        assert main(["train", *map(str, flags)]) == 0
        assert main(["info", str(out)]) == 0


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


def _bad_inputs(tmp: Path) -> dict[str, tuple[list, list[str]]]:
    """Map a name to the arguments after `train` and the words that the sentence must have."""
    (tmp / "good.txt").write_text(TEXT, encoding="utf-8")
    (tmp / "empty.txt").touch()
    (tmp / "one.txt").write_text("x")
    (tmp / "binary.bin").write_bytes(bytes(range(256)) * 8)
    (tmp / "short.txt").write_text("A text of some words, no more.")
    (tmp / "rows.jsonl").write_text('{"body": "a text"}\n' * 30)
    (tmp / "bad.yaml").write_text("data: [")
    (tmp / "flat.yaml").write_text("data: my.txt")
    (tmp / "typo.yaml").write_text("training:\n  max_step: 3\n")
    good = ["--data", tmp / "good.txt"]
    return {
        "missing file": (["--data", tmp / "none.txt"], ["none.txt", "no such file"]),
        "empty file": (["--data", tmp / "empty.txt"], ["empty.txt", "empty"]),
        "one byte": (["--data", tmp / "one.txt"], ["one.txt", "too small"]),
        "binary": (["--data", tmp / "binary.bin"], ["binary.bin", "UTF-8"]),
        "wrong column": (["--data", tmp / "rows.jsonl"], ["text_column='text'", "body"]),
        "short text": (["--data", tmp / "short.txt", *SIZE, "--block_size=64"], ["tokens", "64"]),
        "unknown recipe": (["quikstart"], ["quikstart", "Did you mean 'quickstart'"]),
        "unknown preset": ([*good, "--preset=gpt-2"], ["gpt-2", "Did you mean 'gpt2'"]),
        "unknown flag": ([*good, "--max_step=3"], ["--max_step", "--max_steps"]),
        "key in recipe": ([tmp / "typo.yaml"], ["--max_step", "--max_steps"]),
        "no section": ([tmp / "flat.yaml"], ["flat.yaml", "each with settings"]),
        "bad YAML": ([tmp / "bad.yaml"], ["bad.yaml", "YAML"]),
        "no number": ([*good, "--max_steps=many"], ["max_steps", "many"]),
        "bad choice": ([*good, "--optim_recipe=sgd"], ["optim_recipe", "sgd", "muon"]),
        "indivisible": ([*good, "--n_embd=65", "--n_head=4"], ["n_embd", "65", "n_head", "4"]),
        "odd head": ([*good, "--n_embd=36", "--n_head=4"], ["head_dim=9", "even"]),
        "huge vocabulary": ([*good, "--vocab_size=60000"], ["vocab_size=60000", "lower"]),
        "tiny vocabulary": ([*good, "--vocab_size=100"], ["vocab_size=100", "257"]),
        "long context": ([*good, *SIZE, "--context_length=32"], ["context_length=32", "16"]),
        "folder under a file": ([*good, "--output_dir", tmp / "good.txt" / "x"], ["output_dir"]),
        "no folder to resume": ([*good, "--resume", "--output_dir", tmp], ["checkpoint-*"]),
        "offline Hub id": (["--data", "user/corpus"], ["user/corpus", "HF_HUB_OFFLINE"]),
        "tokenizer": ([*good, "--tokenizer=bpee"], ["bpee", "bpe, char, byte"]),
        "momentum": ([*good, "--momentum_warmup_steps=-1"], ["momentum_warmup_steps=-1"]),
        "threads": ([*good, "--num_threads=0"], ["num_threads=0"]),
        "zero layers": ([*good, "--n_layer=0"], ["num_hidden_layers=0"]),
    }


def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, (argv, words) in _bad_inputs(tmp_path).items():
        before = {path.name for path in tmp_path.iterdir()}
        sentence = refuse(capsys, "train", *argv)
        missing = [word for word in words if word not in sentence]
        assert not missing, f"{name}: {sentence} lacks {missing}"
        assert {path.name for path in tmp_path.iterdir()} == before, name


def test_bad_input_of_the_other_verbs_is_one_sentence(checkpoint, capsys, tmp_path):
    (tmp_path / "weights.txt").write_text("no checkpoint")
    cases = {
        ("generate", checkpoint, "x", "--temperature=-1"): "temperature=-1.0",
        ("generate", checkpoint, "x", "--top_p=1.5"): "top_p=1.5",
        ("generate", checkpoint, "x", "--max_new_tokens=0"): "max_new_tokens=0",
        ("generate", checkpoint, "x", "--max_new_tokens=500"): "context of 16",
        ("generate", checkpoint, "x", "--num_samples=0"): "num_samples=0",
        ("generate", checkpoint, "x", "--topp=1"): "--top_p",
        ("generate", tmp_path, "x"): "not a checkpoint folder",
        ("generate", tmp_path / "none", "x"): "no checkpoint",
        ("generate", tmp_path / "weights.txt", "x"): "is a file",
        ("generate", "user/model", "x"): "HF_HUB_OFFLINE",
        ("eval", checkpoint, "--data", tmp_path / "none.txt"): "none.txt",
        ("eval", checkpoint, "--data", tmp_path / "weights.txt", "--context_length=99"): "99",
        ("eval", checkpoint, "--data", tmp_path / "weights.txt", "--batch_size=0"): "batch_size=0",
        ("eval", checkpoint): "--data",
        ("info", "gpt-2"): "gpt2",
        ("trian",): "train",
    }
    for argv, word in cases.items():
        assert word in refuse(capsys, *argv), argv


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
        ): "train: lower --per_device_train_batch_size",
        ("bench", "train", *HUGE): "bench: lower --batch_size",
        ("bench", "generate", *HUGE): "bench: lower --batch_size",
    }
    for argv, words in cases.items():
        assert f"not enough memory for {words}" in refuse(capsys, *argv)
    assert not (tmp_path / "run").exists()


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
    command = [sys.executable, "-c", code, str(model), str(text)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
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
