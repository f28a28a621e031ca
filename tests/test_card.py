"""The model card: said from what happened, and a person's words in it stay."""

import json
import re
from pathlib import Path

import pytest
import yaml
from conftest import tiny_config
from huggingface_hub import ModelCard, constants
from transformers import AutoConfig

from hf_nanogpt import render_model_card
from hf_nanogpt.hub.card_edits import merge_card, split_card, split_sections

CARDS = Path(__file__).parent.parent / "model_cards"
CONFIG = tiny_config("nano")
METRICS = {
    "num_parameters": 1000,
    "train_steps": 5,
    "train_tokens": 4000,
    "train_seconds": 2.0,
    "tokens_per_second": 2000.0,
    "eval_loss": 1.23456,
    "perplexity": 3.4369,
    "bits_per_byte": 1.5,
    "eval_tokens": 70,
    "eval_bytes": 300,
    "data": "user/corpus",
    "datasets": ["user/corpus"],
    "recipe": "quickstart",
    "command": ["hf-nanogpt", "train", "quickstart"],
    "eval_command": ["--data", "user/corpus", "--held_out", "0.1"],
    "settings": {"Seed": 42},
    "hardware": "1 x Thing",
    "versions": {"hf_nanogpt": "0.1.0"},
    "prompt": "def ",
    "sample": "def f():\n    # not a heading\n# nor this\n    pass",
}


def render(**changes) -> str:
    return render_model_card(CONFIG, METRICS | changes, name="user/gpt", revision="v1")


def edit(card: str, old: str, new: str) -> str:
    assert old in card
    return card.replace(old, new)


def test_the_front_matter_is_what_the_hub_reads():
    data = ModelCard(render()).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.datasets == ["user/corpus"] and "custom_code" in data.tags
    results = {result.metric_type: result for result in data.eval_results}
    assert results["loss"].metric_value == 1.2346 and results["bits_per_byte"].metric_value == 1.5
    assert results["loss"].source_url.endswith("/user/gpt/blob/v1/metrics.json")
    [widget] = data.to_dict()["widget"]
    assert widget["text"] == "def " and widget["output"]["text"].startswith("f():")


def test_the_card_says_only_what_is_known():
    known = render()
    for fact in ("4,000 in 5 steps", "1 x Thing", "1.2346", 'revision="v1"', "--held_out 0.1"):
        assert fact in known
    bare = render_model_card(CONFIG, {"num_parameters": 7}, name="user/gpt")
    names = list(split_sections(split_card(bare)[1]))
    assert names == ["title", "Use", "Architecture", "Limitations", "Citation"]
    assert "None" not in bare and "model-index" not in bare and "[]" not in bare


def test_every_python_snippet_is_python():
    for snippet in re.findall(r"```python\n(.*?)```", render(), re.DOTALL):
        compile(snippet, "card", "exec")


def test_an_untouched_card_is_wholly_written_anew():
    again = render(eval_loss=0.5, hardware="2 x Thing")
    assert merge_card(again, render()) == again
    assert merge_card(again, again) == again


def test_whatever_a_person_changes_survives_and_the_rest_is_new():
    card = render()
    card = edit(card, "## Limitations\n", "## Mine\n\nMy words.\n\n## Limitations\n\nBeware!\n")
    card = edit(card, "license: unknown", "license: mit\nextra: kept")
    card = edit(card, "- nanogpt\n", "- nanogpt\n- my-tag\n")
    card = edit(card, "\n# gpt\n", "\nBefore all.\n\n# gpt\n")
    card = card + "\nAt the end.\n"
    merged = merge_card(render(eval_loss=0.5), card)
    for words in ("My words.", "Beware!", "extra: kept", "- my-tag", "Before all.", "At the end."):
        assert merged.count(words) == 1
    assert "license: mit" in merged and "license: unknown" not in merged
    assert "0.5000" in merged and "1.2346" not in merged
    assert merged.count("## Limitations") == 1
    assert merge_card(render(eval_loss=0.5), merged) == merged


def test_a_section_that_a_person_took_out_stays_out_and_a_new_one_comes_in_its_place():
    bare = render_model_card(CONFIG, {"num_parameters": 7}, name="user/gpt", revision="v1")
    start, end = bare.index("## Limitations"), bare.index("## Citation")
    merged = merge_card(render(), bare[:start] + bare[end:])
    names = list(split_sections(split_card(merged)[1]))
    assert "Limitations" not in names
    assert names.index("Training") == names.index("Architecture") + 1
    assert "Limitations" not in merge_card(render(), merged).replace("; Limitations", "")


def test_what_a_poorer_card_left_out_comes_back():
    bare = render_model_card(CONFIG, {"num_parameters": 7}, name="user/gpt")
    assert merge_card(render(), merge_card(bare, render())) == render()


def test_a_card_that_is_all_a_person_s_keeps_every_line():
    theirs = (
        "---\nlicense: mit\n---\n\n# My model\n\nHello.\n\n```bash\n# a comment\n## more\n```\n"
    )
    merged = merge_card(render(), theirs)
    assert "# My model\n\nHello.\n\n```bash\n# a comment\n## more\n```" in merged
    assert "\n# gpt\n" not in merged and "## Evaluation" in merged


def test_edits_here_and_on_the_hub_are_both_kept_and_contradictions_refused():
    here = edit(render(), "## Citation", "## Here\n\nA.\n\n## Citation")
    there = edit(render(), "## Citation", "## There\n\nB.\n\n## Citation")
    merged = merge_card(merge_card(render(), here), there)
    assert "## Here\n\nA." in merged and "## There\n\nB." in merged
    with pytest.raises(ValueError, match="section 'Here' was edited here and in README of x"):
        merge_card(merge_card(render(), here), edit(here, "A.", "C."), where="README of x")


@pytest.mark.parametrize(
    ("front", "line"), [("a: [\n", 3), ("a: 1\nb: {c\n", 4), ("a: 1\n\tb: 2\n", 3)]
)
def test_invalid_yaml_is_refused_with_its_line(front, line):
    with pytest.raises(ValueError, match=f"in line [{line - 1}{line}]: "):
        merge_card(render(), f"---\n{front}---\n\ntext\n")
    with pytest.raises(ValueError, match="no list of"):
        merge_card(render(), "---\njust words\n---\n")


@pytest.mark.parametrize("recipe", [path.name for path in CARDS.iterdir()])
def test_the_cards_of_our_recipes_are_what_is_rendered_today(recipe, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "https://huggingface.co")
    folder = CARDS / recipe
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    config = AutoConfig.from_pretrained(folder)
    card = render_model_card(config, metrics, name=f"user/{recipe}", revision="v1")
    assert card == (folder / "README.md").read_text(encoding="utf-8"), "write it anew"
    assert yaml.safe_load(card.split("---")[1])["model-index"]
