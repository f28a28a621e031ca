"""The last screen of a training tells the truth in words; the n-gram figure it is held against."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import CORPUS
from datasets import Dataset

from hf_nanogpt.analysis.ngram import ngram_bits_per_byte
from hf_nanogpt.cli.last_screen import render_last_screen
from hf_nanogpt.data.corpus import Corpus
from hf_nanogpt.training import baseline

METRICS = {
    "start_from": None,
    "num_parameters": 1234567,
    "train_tokens": 890_000,
    "train_seconds": 61.0,
    "eval_loss": 1.5,
    "perplexity": math.exp(1.5),
    "bits_per_byte": 1.414,
    "kept_step": 700,
    "train_steps": 700,
    "planned_steps": 700,
    "is_chat": False,
    "samples": ["To be\nor not.", "To be\na\nb\nc\nd", "To be" + " long" * 40],
}
NGRAM = {"bits_per_byte": 1.9, "order": 5} | {
    "counted_characters": 2_000_000,
    "measured_characters": 111_540,
}


def show(**changes) -> str:
    metrics = METRICS | changes
    result = SimpleNamespace(
        output_dir=Path("runs/mine"), metrics=metrics, prompt="To be", sample=metrics["samples"][0]
    )
    result.question = ""
    return " ".join(render_last_screen(result, "hf-nanogpt").split())


def test_the_figures_are_told_in_words():
    told = show(ngram=NGRAM, fresh_half={"bits_per_byte": 1.436})
    assert (
        "It needs 1.41 bits per byte of text that it has not seen, 1.44 on the half of it that did "
        "not choose the weights. A 5-gram model, which counts 2.0 million characters of the same "
        "text, needs 1.90 (on 111,540 characters of the held-out text)."
    ) in told
    assert "worse" not in told and "weights are those" not in told


@pytest.mark.parametrize(
    ("kept", "start", "advice"),
    [
        (700, None, "train longer (--max_steps), or give it more text, or start from a trained"),
        (9, None, "give it more text, or start from a trained checkpoint (train finetune --from"),
        (9, "runs/first", "give it more text. The weights"),
    ],
)
def test_a_model_that_is_worse_than_counting_is_called_so_with_advice(kept, start, advice):
    told = show(ngram=NGRAM | {"bits_per_byte": 1.3}, kept_step=kept, start_from=start)
    assert f"So the model is worse than counting: {advice}" in told


def test_it_says_which_weights_were_kept_and_when_training_stopped():
    told = show(kept_step=140, train_steps=420)
    assert "Training stopped early, after step 420 of 700." in told
    assert "The weights are those of step 140, where the held-out loss was lowest." in told
    assert "The held-out text took part in this choice, which favours them." in told
    assert "took part" not in show(kept_step=140, fresh_half={"bits_per_byte": 1.4})
    assert "No step made the held-out loss lower" in show(kept_step=0)


def test_fine_tuning_says_what_it_cost():
    told = show(old_text={"data": "python-stdlib", "before": 1.41, "after": 1.523})
    assert (
        "On the text it was trained on before (python-stdlib), it needs 1.52 bits per byte, and "
        "needed 1.41." in told
    )


def test_three_samples_are_shown_three_lines_each():
    told = show()
    assert "Samples, from 'To be': | To be | or not. | To be | a | b | To be long" in told
    assert told.endswith("hf-nanogpt info runs/mine")


@pytest.mark.parametrize("before", [None, {"sample": "<u>Who?<a>It."}])
def test_of_a_chat_the_question_and_the_answers_are_shown(before):
    """Three lines of a sample would all be the question."""
    answers = ["I am.", "Nobody."]
    figures = {name: METRICS[name] for name in ("eval_loss", "perplexity", "bits_per_byte")}
    metrics = METRICS | {"samples": [f"<u>Who?<a>{answer}" for answer in answers], "is_chat": True}
    result = SimpleNamespace(
        output_dir=Path("runs/mine"),
        metrics=metrics | ({"before": before | figures} if before else {}),
        prompt="<u>Who?<a>",
        sample=metrics["samples"][0],
        question="a\nuser\nWho?\nassistant\n",
    )
    told = " ".join(render_last_screen(result, "hf-nanogpt").split())
    said = "in answer to: > user > Who? > assistant | "
    if before:
        assert f"Samples before and after, {said}It. | I am." in told
    else:
        assert f"Samples, {said}I am. | Nobody." in told


def corpus(train: list[str], validation: list[str], **changes) -> Corpus:
    sides = (Dataset.from_dict({"text": texts}) for texts in (train, validation))
    return Corpus(*sides, **changes)


def test_the_ngram_figure_is_that_of_the_first_characters_of_each_side(monkeypatch):
    monkeypatch.setattr(baseline, "_COUNTED", 3_000)
    train = [CORPUS[:1000], CORPUS[1000:5000]]
    found = baseline.measure_ngram(corpus(train, [CORPUS[5000:6000]]))
    expected = ngram_bits_per_byte(CORPUS[:3000], CORPUS[5000:6000])
    assert (found["bits_per_byte"], found["order"]) == expected
    assert (found["counted_characters"], found["measured_characters"]) == (3000, 1000)


def test_only_text_is_counted():
    chats = Dataset.from_dict({"messages": [[{"role": "user", "content": "a"}]]})
    assert baseline.measure_ngram(Corpus(chats, chats)) is None
    streams = (Dataset.from_dict({"text": ["a"]}).to_iterable_dataset() for _ in range(2))
    assert baseline.measure_ngram(Corpus(*streams)) is None
    assert baseline.measure_ngram(Corpus(list, list)) is None
