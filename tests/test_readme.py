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
from conftest import ROOT, tiny_model

from hf_nanogpt import list_presets, load_preset, train
from hf_nanogpt.analysis.info import describe
from hf_nanogpt.benchmark.decoding import OURS
from hf_nanogpt.cli import VERBS, main
from hf_nanogpt.training.arguments import parse_settings

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROSE = " ".join(README.split())  # wherever its lines are broken
sys.path.insert(0, str(ROOT / "benchmarks"))
import report  # noqa: E402
from generation import RUNS as GENERATION  # noqa: E402
from results_file import read_results  # noqa: E402


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def read_card(name: str) -> dict:
    return json.loads((ROOT / f"model_cards/{name}/metrics.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder as README assumes it, with a tiny model in place of the trained one."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copy(ROOT / "README.md", folder)
    (folder / "my_recipe.yaml").write_text(blocks("yaml")[0], encoding="utf-8")
    train(
        data=str(ROOT / "LICENSE"),
        output_dir=str(folder / "runs/quickstart"),
        tokenizer="byte",
        max_steps=2,
        n_layer=1,
        n_embd=16,
        n_head=2,
        disable_tqdm=True,
    )
    return folder


@pytest.mark.slow
def test_python_snippets_run(workplace):
    code = "\n".join(blocks("python"))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=workplace, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "parameters, 257 tokens" in done.stdout


@pytest.mark.slow
def test_loading_lines_ask_no_question_where_the_package_is_missing(workplace):
    [code] = [block for block in blocks("python") if "PreTrainedTokenizerFast" in block]
    others = """
from transformers import AutoTokenizer, pipeline
write = pipeline("text-generation", "runs/quickstart", trust_remote_code=True)  # as on the card
assert write("def", max_new_tokens=2)[0]["generated_text"].startswith("def")
other = AutoTokenizer.from_pretrained("runs/quickstart", trust_remote_code=True)
assert tokenizer("def é").input_ids == other("def é").input_ids
logits = model(**tokenizer("def", return_tensors="pt", return_token_type_ids=True)).logits
assert logits.shape == (1, 3, len(tokenizer)), logits.shape
"""
    code = "import sys; sys.modules['hf_nanogpt'] = None\n" + code + others
    command = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(code)} <&-"
    done = subprocess.run(command, shell=True, cwd=workplace, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "y/N" not in done.stdout + done.stderr


@pytest.mark.slow
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


def test_peft_adapts_every_matrix_but_the_head_as_shown():
    peft = pytest.importorskip("peft")
    [shown] = re.findall(r"`(LoraConfig\(.*?\))`", README)
    config = eval(shown, {"LoraConfig": peft.LoraConfig})
    model = peft.get_peft_model(tiny_model("nano"), config)
    names = {name.rsplit(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    linear = {n for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert names == linear and len(names) == 7 * model.config.num_hidden_layers


def test_make_targets_and_paths_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in [*re.findall(r"make (\w+)", "\n".join(blocks("bash"))), "bench"]:
        assert f"\n{target}:" in makefile
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / path).is_file(), path


def test_recipe_shown_is_a_valid_recipe():
    shown = yaml.safe_load(blocks("yaml")[0])
    assert set(shown) == {"data", "model", "training"}


def test_results_page_is_what_was_recorded():
    assert report.render() == (ROOT / "benchmarks/RESULTS.md").read_text(encoding="utf-8")


def test_headline_compares_with_the_tuned_peer_and_holds_for_each_seed():
    race = read_results("race")
    plain, tuned, ours, longer = (
        [run["eval_loss"] for run in runs] for runs in race["runs"].values()
    )
    assert max(longer) < min(tuned)
    tokens, seconds = report.savings(race)
    assert f"**{tokens:.1f} times fewer tokens** and {seconds:.1f} times less time" in README
    assert (
        f"seeds 1 to {len(tuned)}, on {race['machine']['threads']} cores of one Intel Xeon"
        in README
    )
    # With a tenth of the untuned recipe's tokens it is lower for two of four seeds: no headline.
    card, peer = (read_card(name)["eval_loss"] for name in ("shakespeare_char", "nanogpt_char"))
    wins = [own < other for own, other in zip([*ours, card], [*plain, peer], strict=True)]
    assert wins == [False, True, True, False]
    recipe = (ROOT / "hf_nanogpt/recipes/shakespeare_char.yaml").read_text(encoding="utf-8")
    spread = [*ours, card]
    assert f"{min(spread):.2f} to {max(spread):.2f} for four seeds" in recipe


def test_speed_and_size_claims_are_the_measured_ones():
    slowest, fastest = [], []
    for name in GENERATION:
        rows = {row["name"]: row for row in read_results(name)["rows"]}
        ours, peer = rows[OURS]["tokens_per_second"], rows["GPT2LMHeadModel"]
        slowest += [ours[n] / speed for n, speed in peer["tokens_per_second"].items()]
        fastest.append(1 / peer["speed_to_ours"][1])
    by_hand = (ROOT / "benchmarks/results/by_hand.md").read_text(encoding="utf-8")
    # The least of any length of text, and the largest of the medians over all lengths.
    assert f"was {min(slowest):.1f} to {max(fastest):.1f} times as fast" in PROSE
    assert "0.9 to 1.0 times on an AMD EPYC" in PROSE and "0.89 to 0.90 times" in by_hand
    assert "changes the most likely token at 14 % of the positions" in PROSE
    assert "the same most likely token at 86 % of the positions" in " ".join(by_hand.split())
    assert "q8_0 at 3 %" in PROSE and "q8_0 has 0.0013 and 97 %" in by_hand
    faster = [
        m["rows"][3]["speed_to_ours"][1] for m in read_results("llama_cpp")["models"].values()
    ]
    assert f"{min(faster):.1f} to {max(faster):.1f} times as fast as our int8 without" in PROSE


def test_quickstart_figures_are_those_of_its_card_and_xz_had_its_text():
    card = read_card("quickstart")
    assert f"needs {card['bits_per_byte']:.2f} bits per byte of unseen code" in PROSE
    assert f"{card['train_tokens'] / 1e6:.1f} million tokens" in PROSE
    assert f"{card['num_parameters']:,} parameters, 2,048 tokens" in README
    minutes = f"about {card['train_seconds'] / 60:.0f} minutes on 2 "
    recipe = (ROOT / "hf_nanogpt/recipes/quickstart.yaml").read_text(encoding="utf-8")
    for text in (README, recipe, (ROOT / "Makefile").read_text(encoding="utf-8")):
        assert minutes in text
    nothing, as_much, everything = (
        f"{row['bits_per_byte']:.2f}" for row in read_results("xz")["rows"]
    )
    assert f"`xz -9` needs {nothing}, but {as_much} if it first reads as much" in PROSE
    assert f"{everything} if it reads all" in PROSE


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
