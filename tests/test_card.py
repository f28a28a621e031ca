"""The model card: written from metrics, and a person's edits in it are kept."""

import json
import re
from hashlib import sha256
from pathlib import Path

import pytest
import yaml
from conftest import tiny_config
from huggingface_hub import ModelCard, constants
from transformers import AutoConfig
from transformers.utils import logging

from hf_nanogpt import render_model_card
from hf_nanogpt.hub.card_edits import merge_card, read_card, split_card

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


def test_the_card_leaves_out_what_is_missing_in_the_metrics():
    known = render()
    for fact in ("4,000 in 5 steps", "1 x Thing", "1.2346", 'revision="v1"', "--held_out 0.1"):
        assert fact in known
    bare = render_model_card(CONFIG, {"num_parameters": 7}, name="user/gpt")
    names = re.findall(r"^##? (.*)$", bare, re.MULTILINE)
    assert names == ["gpt", "Use", "Architecture", "Limitations", "Citation"]
    assert "None" not in bare and "model-index" not in bare and "[]" not in bare


def test_the_card_shows_each_sample_and_what_the_figures_are_held_against():
    card = render(
        samples=["def a", "def b"],
        fresh_half={"bits_per_byte": 1.51234},
        old_text={"data": "python-stdlib", "before": 1.41, "after": 1.5},
        ngram={"bits_per_byte": 1.9, "order": 5, "counted_characters": 2_000_000},
    )
    assert "`def `:\n\n```text\ndef a\n```\n\n```text\ndef b\n```\n\n## Limitations" in card
    assert "| Bits per byte on the half that did not choose the weights | 1.5123 |" in card
    assert "(python-stdlib) | 1.5000 (before this training 1.4100) |" in card
    assert "| 1.9000 (5-gram, on 2,000,000 characters of the text) |" in card


@pytest.mark.parametrize(
    ("data", "revision", "needed"),
    [
        ("user/corpus", "v1", ":"),
        ("python-stdlib", "v1", ":"),
        ("https://host/book.txt", "v1", ":"),
        ("book.txt", "v1", ", in a folder that has `book.txt`:"),
        ("texts/book.txt", None, ", in a folder that has `mine` and `texts/book.txt`:"),
        ("python-stdlib", None, ", in a folder that has `mine`:"),
        ("validation.txt", "v1", ", in a folder that has `validation.txt`:"),  # of a Hub dataset
    ],
)
def test_the_card_says_where_the_command_to_repeat_the_evaluation_works(data, revision, needed):
    metrics = METRICS | {
        "data": "user/corpus" if data == "validation.txt" else data,
        "datasets": ["user/corpus"] if data in ("user/corpus", "validation.txt") else [],
        "eval_command": ["--data", data, "--held_out", "0.1"],
    }
    card = render_model_card(CONFIG, metrics, name="mine", revision=revision)
    place = f"mine@{revision}" if revision else "mine"
    assert (
        f"To repeat this evaluation{needed}\n\n```bash\n"
        f"hf-nanogpt eval {place} --data {data} --held_out 0.1\n```"
    ) in card


CONTINUES = "- It continues a text. It was not trained to answer"
ANSWERS = "- It learnt to answer only from the conversations"


@pytest.mark.parametrize(
    ("facts", "first"),
    [
        ({}, CONTINUES),
        ({"is_chat": True, "learnt_answers": True}, ANSWERS),
        ({"start_from": "a/b"}, "- This training taught it to continue texts, not to answer"),
        ({"start_from": "a/b", "is_chat": True}, "- It was trained on 4,000 tokens"),
        (
            {"start_from": "a/b", "is_chat": True, "learnt_answers": True},
            "- This training taught it to answer as in the conversations of user/corpus.",
        ),
        ({"is_chat": True}, "- It was trained on 4,000 tokens"),  # whether it answers is not known
    ],
    ids=str,
)
def test_a_card_says_of_answers_what_its_training_knows(facts, first):
    limitations = render(**facts).split("## Limitations\n\n")[1]
    assert limitations.startswith(first)
    assert limitations.count("- It was trained on 4,000 tokens") == 1
    assert all(line.startswith("- ") for line in limitations.split("\n\n")[0].splitlines())


def test_a_card_of_a_model_that_was_not_trained_here_claims_nothing_about_answers():
    bare = render_model_card(CONFIG, {"num_parameters": 7}, name="user/gpt")
    limitations = bare.split("## Limitations\n\n")[1].split("\n\n")[0]
    assert limitations == "- It cannot see back more than 64 tokens."


def test_every_python_snippet_is_python():
    for snippet in re.findall(r"```python\n(.*?)```", render(), re.DOTALL):
        compile(snippet, "card", "exec")


def test_an_unedited_card_is_replaced():
    again = render(eval_loss=0.5, hardware="2 x Thing")
    assert merge_card(again, render()) == again
    assert merge_card(again, again) == again


def test_front_matter_and_text_of_a_person_are_kept_and_the_rest_is_replaced():
    card = edit(render(), "license: unknown", "license: mit\nextra: kept")
    card = edit(card, "- nanogpt\n", "- nanogpt\n- my-tag\n")
    card = card + "\n## Mine\n\nMy words.\n"
    merged = merge_card(render(eval_loss=0.5), card)
    for words in ("My words.", "extra: kept", "- my-tag"):
        assert merged.count(words) == 1
    assert "license: mit" in merged and "license: unknown" not in merged
    assert "0.5000" in merged and "1.2346" not in merged
    assert merge_card(render(eval_loss=0.5), merged) == merged
    over_an_older_one = merge_card(merged, render())
    assert sorted(over_an_older_one.splitlines()) == sorted(merged.splitlines())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("## Limitations\n", "## Limitations\n\nBeware!\n"),  # changed
        ("\n# gpt\n", "\nBefore all.\n\n# gpt\n"),  # added above the line
        ("## Citation\n", ""),  # taken out
    ],
)
def test_generated_text_that_a_person_edited_is_kept_with_a_warning(old, new, caplog):
    card = edit(render(), old, new)
    logging.enable_propagation()
    try:
        merged = merge_card(render(eval_loss=0.5), card, where=f"README of {new!r}")
    finally:
        logging.disable_propagation()
    assert split_card(merged)[1] == split_card(card)[1]
    assert "value: 0.5\n" in merged  # the front matter has the new figures
    [said] = [record.message for record in caplog.records]
    assert f"README of {new!r} was edited by hand" in said
    assert merge_card(render(eval_loss=0.5), merged) == merged
    emptied = card[: card.index("# gpt")].replace("Before all.", "").strip() + "\n"
    assert merge_card(render(), emptied) == render()  # as the warning says


def test_a_card_that_a_person_wrote_keeps_every_line():
    text = "# My model\n\nHello.\n\n```bash\n# a comment\n## more\n```\n"
    merged = merge_card(render(), f"---\nlicense: mit\n---\n\n{text}")
    data, kept = split_card(merged)
    assert kept.strip() == text.strip()
    assert data["license"] == "mit" and data["pipeline_tag"] == "text-generation"


def test_an_unedited_card_of_version_0_1_is_replaced():
    def seal(section: str) -> str:
        return f"{section}\n<!-- hf-nanogpt: {sha256(section.encode()).hexdigest()[:8]} -->"

    sections = ["# gpt\n\nA GPT.", "## Use\n\nSo."]
    names = "<!-- hf-nanogpt wrote: title; Use -->\n"
    old = "\n\n".join(["---\nlicense: mit\n---", *map(seal, sections), names])
    assert split_card(merge_card(render(), old))[1] == split_card(render())[1]
    assert "license: mit" in merge_card(render(), old)
    for edited in (edit(old, "So.", "Thus."), edit(old, "## Use", "Mine.\n\n## Use"), old + "End."):
        assert split_card(merge_card(render(), edited))[1].strip() == split_card(edited)[1].strip()


def test_edits_of_two_copies_are_united_or_refused():
    mine = render() + "\n## Mine\n\nA.\n"
    more = mine + "\n## More\n\nB.\n"
    for here, there in ((mine, more), (more, mine), (more, render()), (render(), more)):
        assert merge_card(here, there) == merge_card(more, more)
    other = edit(mine, "A.", "C.")
    with pytest.raises(ValueError, match="and README of x were edited differently"):
        merge_card(mine, other, where="README of x")
    changed = edit(render(), "## Citation", "## Cited")
    assert merge_card(changed, render()) == merge_card(render(), changed)
    with pytest.raises(ValueError, match="were edited differently"):
        merge_card(changed, edit(changed, "## Cited", "## Citing"))


HOSTILE = [
    "one\ftwo\vthree\x1cfour\x85five\u2028six",
    "one\r\ntwo\rthree\r\n",
    "\x00\x1b]0;title\x07\x7f\x9b",
    "# Heading\n```\n````\n## more\n~~~",
    "{{ 7 * 7 }} {% raw %} {# no #}",
    "---\nlicense: evil\n---\n<!-- hf_nanogpt 0123456789ab: not ours -->",
]


@pytest.mark.parametrize("sample", [*HOSTILE, pytest.param(render(), id="a card")])
def test_no_sample_makes_a_card_look_edited_or_leaves_its_fence(sample, tmp_path):
    card, again = render(sample=sample, prompt="a\n" + sample), render(sample=sample, train_steps=9)
    path = tmp_path / "README.md"
    path.write_text(card, encoding="utf-8", newline="")
    text = path.read_bytes()
    assert not re.search(rb"[\x00-\x08\x0b-\x1f\x7f]", text)
    path.write_bytes(text.replace(b"\n", b"\r\n"))  # as an editor on Windows saves it
    assert merge_card(again, read_card(path)) == again
    assert "9 steps" in again and split_card(again)[0]["license"] == "unknown"
    fenced = re.compile(r"^(`{3,})(?:text|bash)\n.*?^\1$", re.MULTILINE | re.DOTALL)
    outside = fenced.sub("", split_card(again)[1])
    assert re.findall(r"^# (.*)$", outside, re.MULTILINE) == ["gpt"]
    assert "## more" not in outside and "{{ 7 * 7 }}" in render(sample=HOSTILE[4])


def test_a_card_has_one_comment_and_a_card_that_is_not_text_is_refused(tmp_path):
    assert render().count("<!--") == 1
    (tmp_path / "README.md").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not UTF-8"):
        read_card(tmp_path / "README.md")


@pytest.mark.parametrize(
    ("front", "line"), [("a: [\n", 3), ("a: 1\nb: {c\n", 4), ("a: 1\n\tb: 2\n", 3)]
)
def test_invalid_yaml_is_refused_with_its_line(front, line):
    with pytest.raises(ValueError, match=rf"README.md is not .* line [{line - 1}{line}]\b"):
        merge_card(render(), f"---\n{front}---\n\ntext\n")
    with pytest.raises(ValueError, match="must be `name: value` lines"):
        merge_card(render(), "---\njust words\n---\n")


@pytest.mark.parametrize("recipe", [path.name for path in CARDS.iterdir()])
def test_the_stored_cards_equal_what_is_rendered_today(recipe, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "https://huggingface.co")
    folder = CARDS / recipe
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    config = AutoConfig.from_pretrained(folder)
    card = render_model_card(config, metrics, name=f"user/{recipe}", revision="v1")
    assert card == (folder / "README.md").read_text(encoding="utf-8"), "render it again"
    assert yaml.safe_load(card.split("---")[1])["model-index"]
