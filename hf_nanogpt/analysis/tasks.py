"""Benchmarks by the names that papers give: lm-eval, by its own `HFLM`, on our checkpoints."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.folder import load_checkpoint
from ..errors import UserError


@dataclass(frozen=True)
class TaskScore:
    """One figure of one task, such as its accuracy, with the standard error where there is one."""

    task: str
    metric: str
    value: float
    stderr: float | None


def evaluate_tasks(
    model: PreTrainedModel | str | Path,
    tasks: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
) -> list[TaskScore]:
    """Measure a model on tasks of lm-eval (Gao et al., https://zenodo.org/records/12608602).

    Args:
        model: a model with its `tokenizer`, or the folder or Hub id of a checkpoint.
        tasks: names of tasks, groups or tags that lm-eval knows, and paths of YAML files of one's
            own in its format. A task may run Python code that it brings: take those you trust.
        num_fewshot: solved examples before each question; by default the task's own.
        limit: look at the first so many questions of each task only.
        batch_size: questions at a time.

    Raises:
        UserError: lm-eval is missing, there is no such checkpoint or task, or its data cannot be
            had.
    """
    check_lm_eval()
    _check_counts(num_fewshot=num_fewshot, limit=limit)
    loaded = _load_tasks(tasks, num_fewshot)
    if not isinstance(model, PreTrainedModel):
        model, own_tokenizer = load_checkpoint(model)
        tokenizer = tokenizer or own_tokenizer
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, trust_remote_code=False)
    # Not `simple_evaluate`, which takes ten seconds to describe the machine each time.
    results = evaluate(lm, loaded, limit=limit, log_samples=False)
    scores = results["results"] | results.get("groups", {})
    return [score for task, figures in scores.items() for score in _read_scores(task, figures)]


def check_lm_eval() -> None:
    """Raise a `UserError` where the extra is missing."""
    if find_spec("lm_eval") is None:
        raise UserError("Tasks need a package: pip install 'hf-nanogpt[eval]'.")


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        least = 1 if name == "limit" else 0
        if count is not None and count < least:
            raise UserError(f"{name}={count} is not possible: give {least} or more.")


@cache
def _index_tasks(include_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=include_defaults)


def _is_task_file(name: str) -> bool:
    """Say whether `name` is a YAML file that describes a task, and no group of others."""
    if not name.endswith((".yaml", ".yml")):
        return False
    text = Path(name).read_text(encoding="utf-8") if Path(name).is_file() else ""
    return not re.search("^group:", text, re.MULTILINE)


def _load_tasks(names: Sequence[str], num_fewshot: int | None) -> dict[str, Any]:
    """Return the tasks and groups of those names, with their data."""
    # lm-eval reads its 14,000 descriptions for ten seconds, which tasks in files do not need.
    index = _index_tasks(not all(map(_is_task_file, names)))
    for name in names:
        if name not in index.task_index and not Path(name).is_file():
            near = difflib.get_close_matches(name, index.all_tasks, n=1)
            hint = f"did you mean {near[0]}?" if near else "`lm-eval ls tasks` lists them."
            raise UserError(f"tasks={name} is no task of lm-eval and no YAML file: {hint}")
    try:
        loaded = index.load(list(names))
    except Exception as error:  # of YAML, jinja2, datasets, huggingface_hub or the task's own code
        why = " ".join(str(error).split())
        raise UserError(f"tasks={','.join(names)} cannot be loaded: {why}") from error
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own != 0:  # 0 in a description means never
            task.set_config("num_fewshot", (own or 0) if num_fewshot is None else num_fewshot)
        task.set_fewshot_seed(1234)  # of lm-eval's command line, so that figures are the same
    return loaded


def _read_scores(task: str, figures: dict[str, Any]) -> list[TaskScore]:
    """Read figures such as {"acc,none": 0.5, "acc_stderr,none": 0.1}, by metric and filter."""
    scores = []
    for key, value in figures.items():
        metric, _, kept = key.partition(",")
        if not kept or metric.endswith("_stderr"):
            continue
        stderr = figures.get(f"{metric}_stderr,{kept}")
        name = metric if kept == "none" else f"{metric} ({kept})"
        known = isinstance(stderr, float)  # where it is not known lm-eval writes "N/A"
        scores.append(TaskScore(task, name, float(value), stderr if known else None))
    return scores
