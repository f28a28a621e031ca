"""README is tested like code: snippets run, commands parse, figures stand in the results."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from hf_nanogpt import list_presets, load_preset, train
from hf_nanogpt.arguments import parse_settings
from hf_nanogpt.cli import VERBS, main
from hf_nanogpt.info import describe

README = (ROOT / "README.md").read_text(encoding="utf-8")
sys.path.insert(0, str(ROOT / "benchmarks"))
import report  # noqa: E402
from results_file import read_results  # noqa: E402


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder as README assumes it, with a tiny model in place of the trained one."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copy(ROOT / "README.md", folder)
    (folder / "my_recipe.yaml").write_text(blocks("yaml")[0], encoding="utf-8")
    train(
        data=str(ROOT / "README.md"),
        output_dir=str(folder / "runs/quickstart"),
        tokenizer="byte",
        max_steps=2,
        n_layer=1,
        n_embd=16,
        n_head=2,
        disable_tqdm=True,
    )
    return folder


def test_python_snippets_run(workplace):
    code = "\n".join(blocks("python"))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=workplace, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "parameters, 257 tokens" in done.stdout


def test_commands_work(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("hf-nanogpt ")]
    assert len(commands) >= 9
    for verb, *flags in commands:
        if verb == "convert":  # from the Hub, and from a file that is not here
            assert (ROOT / "hf_nanogpt/convert").is_dir() and len(flags) == 2
        elif verb in ("chat", "serve", "playground"):  # these wait for somebody
            assert verb in VERBS and not [flag for flag in flags if flag.startswith("-")]
        elif "onnx" in flags and not find_spec("onnx"):
            continue
        elif verb == "train":  # these train for minutes: read their settings only
            recipe = "quickstart" if flags[0].startswith("-") else flags.pop(0)
            if "--from" in flags:
                start = flags.index("--from")
                del flags[start : start + 2]
            parse_settings(recipe, flags)
        else:
            assert main([verb, *flags]) == 0, capsys.readouterr().err


def test_make_targets_and_paths_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in [*re.findall(r"make (\w+)", "\n".join(blocks("bash"))), "bench"]:
        assert f"\n{target}:" in makefile
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / path).is_file(), path


def test_recipe_shown_is_a_valid_recipe():
    shown = yaml.safe_load(blocks("yaml")[0])
    assert set(shown) == {"data", "model", "training"}


def test_figures_are_the_measured_ones():
    assert report.render() == (ROOT / "benchmarks/RESULTS.md").read_text(encoding="utf-8")
    plain, tuned, ours, longer = read_results("race")["runs"].values()
    for peer, own in ((plain, ours), (tuned, longer)):
        assert report.middle(own, "eval_loss") <= report.middle(peer, "eval_loss")
        fewer, less = (
            report.middle(peer, key) / report.middle(own, key)
            for key in ("train_tokens", "wall_seconds")
        )
        assert f"{fewer:.1f}x fewer tokens" in README and f"{less:.1f}x less time" in README
    card = json.loads((ROOT / "model_cards/quickstart/metrics.json").read_text())
    assert f"needs {card['bits_per_byte']:.2f} bits per byte" in README
    assert f"{card['train_tokens'] / 1e6:.1f} million\ntokens" in README
    assert f"{card['num_parameters']:,} parameters, 2,048 tokens" in README


def test_parameter_counts_of_the_presets_are_exact():
    for preset, count in re.findall(r"`([\w.-]+)` \| ([\d,]+) \|", README):
        assert describe(preset)["parameters"] == count
    for first, last, low, high in re.findall(
        r"`([\w.-]+)` to `([\w.-]+)` \| ([\d,]+) to ([\d,]+)", README
    ):
        assert (describe(first)["parameters"], describe(last)["parameters"]) == (low, high)
    assert f"knows {len(list_presets())} of" in README
    assert load_preset("nano").model_type == "nanogpt"


def test_compatibility_table_is_the_measured_one():
    from compatibility import render_table

    recorded = json.loads((ROOT / "benchmarks/results/compatibility.json").read_text())
    assert render_table(recorded["rows"]).strip() in README


def test_length_is_as_promised():
    loop = len((ROOT / "examples/plain_loop.py").read_text(encoding="utf-8").splitlines())
    assert f"{loop} lines of plain PyTorch" in README
    assert len(README.splitlines()) <= 240
