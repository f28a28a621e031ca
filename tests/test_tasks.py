"""Tasks of lm-eval on our checkpoints give the scores that log-probabilities by hand give."""

import json
import math
import random
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from test_quantization import needs_int8

from hf_nanogpt import evaluate_tasks, load_checkpoint, train_tokenizer
from hf_nanogpt.cli import main
from hf_nanogpt.quantization import quantize_model

needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is missing: pip install 'hf-nanogpt[eval]'"
)
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("tasks")]  # lm-eval's import takes long
TOKENIZER = train_tokenizer([], kind="byte")
ROWS = [
    {"q": f"{a} + {b} =", "choices": [f"{a + b}", f"{a + b + 7}", "many"], "answer": (a + b) % 3}
    for a in range(3)
    for b in range(5)
]
CHOICE = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
TEXT = """
task: prose
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{q}}"
metric_list: [{metric: bits_per_byte}]
"""


@pytest.fixture(scope="module")
def model():
    return tiny_model("nano", vocab_size=len(TOKENIZER))


@pytest.fixture
def workplace(tmp_path, monkeypatch, model) -> Path:
    """A folder with two checkpoints, questions and tasks."""
    monkeypatch.chdir(tmp_path)
    Path("questions.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    Path("sums.yaml").write_text(CHOICE, encoding="utf-8")
    Path("prose.yaml").write_text(TEXT, encoding="utf-8")
    for name, other in {"a": model, "b": tiny_model("gpt2", vocab_size=len(TOKENIZER))}.items():
        other.save_pretrained(name)
        TOKENIZER.save_pretrained(name)
    return tmp_path


@torch.no_grad()
def log_likelihood(model, context: str, text: str) -> float:
    before = TOKENIZER(context)["input_ids"] or [TOKENIZER.eos_token_id]
    ids = [*before, *TOKENIZER(text)["input_ids"]]
    logs = model(torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
    return math.fsum(logs[i - 1, ids[i]].item() for i in range(len(before), len(ids)))


@needs_lm_eval
def test_scores_equal_arithmetic_by_hand(workplace, model):
    scores = {
        (x.task, x.metric): x
        for x in evaluate_tasks(model, ["sums.yaml", "prose.yaml"], tokenizer=TOKENIZER)
    }
    hits = {"acc": 0, "acc_norm": 0}
    for row in ROWS:
        chances = [log_likelihood(model, row["q"], f" {choice}") for choice in row["choices"]]
        per_letter = [x / len(choice) for x, choice in zip(chances, row["choices"], strict=True)]
        hits["acc"] += chances.index(max(chances)) == row["answer"]
        hits["acc_norm"] += per_letter.index(max(per_letter)) == row["answer"]
    for metric, count in hits.items():
        share = count / len(ROWS)
        assert scores["sums", metric].value == pytest.approx(share)
        error = math.sqrt(share * (1 - share) / (len(ROWS) - 1))
        assert scores["sums", metric].stderr == pytest.approx(error)
    nats = -math.fsum(log_likelihood(model, "", row["q"]) for row in ROWS)
    bits = nats / math.log(2) / sum(len(row["q"]) for row in ROWS)
    assert scores["prose", "bits_per_byte"].value == pytest.approx(bits, rel=1e-5)
    assert len(scores) == 3


@needs_lm_eval
def test_scores_equal_those_of_lm_eval_without_us(workplace):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    results = simple_evaluate(
        HFLM(pretrained="a", device="cpu", batch_size=4),
        tasks=["sums.yaml"],
        num_fewshot=2,
        limit=9,
        task_manager=TaskManager(include_defaults=False),
    )
    expected = results["results"]["sums"]
    scores = evaluate_tasks("a", ["sums.yaml"], num_fewshot=2, limit=9, batch_size=3)
    assert {f"{score.metric},none": score.value for score in scores}.items() <= expected.items()
    assert [score.stderr for score in scores] == [
        expected[f"{score.metric}_stderr,none"] for score in scores
    ]


@needs_lm_eval
def test_tasks_that_use_chance_give_the_scores_of_lm_eval_each_time(workplace):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    Path("chance.py").write_text(
        "import random\n"
        "import numpy as np\n"
        "def shuffle(docs):\n"
        "    rows = []\n"
        "    for row in list(docs) * 8:\n"
        "        order = random.sample(range(3), 3)\n"
        "        choices = [row['choices'][i] for i in order]\n"
        "        answer = order.index(row['answer'])\n"
        "        rows.append({'q': row['q'] + str(np.random.rand()), 'choices': choices, "
        "'answer': answer})\n"
        "    return docs.from_list(rows)\n"
    )
    text = CHOICE + "process_docs: !function chance.shuffle\n"
    Path("chance.yaml").write_text(text.replace("task: sums", "task: chance"))
    lm, settings = HFLM(pretrained="b", device="cpu", batch_size=4), {"num_fewshot": 1}
    random.seed(5)
    before = random.getstate(), torch.get_rng_state()
    found = [evaluate_tasks("b", ["chance.yaml"], **settings) for _ in range(2)]
    assert random.getstate() == before[0] and torch.get_rng_state().equal(before[1])
    manager = TaskManager(include_defaults=False)
    expected = simple_evaluate(lm, tasks=["chance.yaml"], task_manager=manager, **settings)
    for scores in found:
        values = {f"{score.metric},none": score.value for score in scores}
        assert values.items() <= expected["results"]["chance"].items()


@needs_lm_eval
def test_command_compares_checkpoints_on_tasks(workplace, capsys):
    assert main(["eval", "a", "b", "--tasks", "sums.yaml,prose.yaml", "--plot", "plot.png"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["task", "a", "b"]
    assert [line[:2] for line in lines[1:4]] == [
        ["sums", "acc"],
        ["sums", "acc_norm"],
        ["prose", "bits_per_byte"],
    ]
    [prose] = evaluate_tasks("b", ["prose.yaml"])
    assert lines[3][-1] == f"{prose.value:.4f}"
    assert Path("plot.png").read_bytes().startswith(b"\x89PNG")


@needs_int8
@needs_lm_eval
def test_command_measures_rounded_weights_on_tasks(workplace, capsys):
    assert main(["eval", "b", "--tasks=prose.yaml", "--quantize=int8"]) == 0
    rounded = quantize_model(load_checkpoint("b")[0])
    [prose] = evaluate_tasks(rounded, ["prose.yaml"], tokenizer=TOKENIZER)
    assert capsys.readouterr().out.split()[-1] == f"{prose.value:.4f}"


@needs_lm_eval
def test_bad_tasks_are_one_sentence(workplace, capsys):
    bad = {
        "no_split.yaml": (CHOICE.replace("test_split: test", "test_split: val"), "val"),
        "no_data.yaml": (CHOICE.replace("questions.jsonl", "none.jsonl"), "none.jsonl"),
        "no_column.yaml": (CHOICE.replace("{{q}}", "{{nope}}"), "nope"),
        "no_task.yaml": ("a: 1", "no_task.yaml"),
        "no_yaml.yaml": ("a: [", "no_yaml.yaml"),
        "no_metric.yaml": (CHOICE.replace("metric: acc}", "metric: luck}"), "no_metric"),
    }
    for name, (text, word) in bad.items():
        Path(name).write_text(text, encoding="utf-8")
        assert main(["eval", "a", "--tasks", name]) == 2, name
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("hf-nanogpt: ") and word in last, last
    for flags, word in {("none.yaml",): "none.yaml", ("sums.yaml", "--limit=0"): "limit=0"}.items():
        assert main(["eval", "a", "--tasks", *flags]) == 2
        assert word in capsys.readouterr().err


def test_without_the_extra_the_command_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    tiny_model("nano").save_pretrained(tmp_path)
    assert main(["eval", str(tmp_path), "--tasks", "arc_easy"]) == 2
    assert "pip install 'hf-nanogpt[eval]'" in capsys.readouterr().err
