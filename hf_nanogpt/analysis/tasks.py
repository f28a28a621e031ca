"""Benchmarks from papers: tasks of lm-eval, run by its own `HFLM` on our checkpoints."""

import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.loading import load_checkpoint
from ..data.encoding import encoding_errors
from ..errors import UserError, did_you_mean, explain_errors


@dataclass(frozen=True)
class TaskScore:
    """One score on one task, such as its accuracy, with the standard error if there is one."""

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
    """Evaluate a model on tasks of lm-eval (Gao et al., https://zenodo.org/records/12608602).

    Args:
        model: a model with its `tokenizer`, or the folder or Hub id of a checkpoint.
        tasks: names of tasks, groups or tags that lm-eval knows, and paths of your own YAML files
            in its format. A task may run Python code that it brings: use only tasks you trust.
        num_fewshot: solved examples before each question; by default the task's own number.
        limit: use only the first questions of each task, this many.
        batch_size: questions at a time.

    Raises:
        UserError: lm-eval is missing, there is no such checkpoint or task, or its data cannot be
            loaded.
    """
    check_lm_eval()
    for name, value, least in (("num_fewshot", num_fewshot, 0), ("limit", limit, 1)):
        if value is not None and value < least:
            raise UserError(f"{name}={value} must be at least {least}.")
    index = _find_tasks(tasks)
    if not isinstance(model, PreTrainedModel):
        model, checkpoint_tokenizer = load_checkpoint(model)
        tokenizer = tokenizer or checkpoint_tokenizer
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):
        def tok_encode(self, string, *args, **settings):
            with encoding_errors(self.tokenizer, string):
                return super().tok_encode(string, *args, **settings)

        def tok_batch_encode(self, strings, *args, **settings):
            with encoding_errors(self.tokenizer, *strings):
                return super().tok_batch_encode(strings, *args, **settings)

    settings = {"batch_size": batch_size, "trust_remote_code": False}
    lm = Model(pretrained=model, tokenizer=tokenizer, **settings)
    # Not `simple_evaluate`, which spends ten seconds describing the machine each time.
    with _lm_eval_seeds():
        loaded = _load_tasks(index, tasks, num_fewshot)
        results = evaluate(lm, loaded, limit=limit, log_samples=False)
    scores = results["results"] | results.get("groups", {})
    return [score for task, values in scores.items() for score in _read_scores(task, values)]


def check_lm_eval() -> None:
    """Raise a `UserError` if the extra is missing."""
    if find_spec("lm_eval") is None:
        raise UserError("Tasks need lm-eval: pip install 'hf-nanogpt[eval]'.")


@contextmanager
def _lm_eval_seeds() -> Iterator[None]:
    """Set the seeds that lm-eval's command line sets, and restore the caller's randomness after.

    Tasks draw examples before questions, and some shuffle choices when their data is loaded.
    """
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _find_tasks(names: Sequence[str]) -> Any:
    """Return an index of tasks that has these names."""
    # lm-eval spends ten seconds reading its 14,000 descriptions, which tasks in files do not need.
    index = _index_tasks(not all(map(_is_task_file, names)))
    for name in names:
        if name not in index.task_index and not Path(name).is_file():
            hint = did_you_mean(name, index.all_tasks) or " `lm-eval ls tasks` lists all tasks."
            raise UserError(f"tasks={name} is not a task of lm-eval or a YAML file.{hint}")
    return index


def _load_tasks(index: Any, names: Sequence[str], num_fewshot: int | None) -> dict[str, Any]:
    """Return the tasks and groups with these names, with their data."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    # Errors may come from YAML, jinja2, datasets, huggingface_hub or the task's own code.
    with explain_errors(f"tasks={','.join(names)} cannot be loaded"):
        loaded = index.load(list(names))
    for task in loaded["tasks"].values():
        described = task.get_config("num_fewshot")
        if described != 0:  # 0 in a description means never
            task.set_config("num_fewshot", (described or 0) if num_fewshot is None else num_fewshot)
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    return loaded


@cache
def _index_tasks(include_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=include_defaults)


def _is_task_file(name: str) -> bool:
    """Say whether `name` is a YAML file that describes one task, not a group of tasks."""
    if not name.endswith((".yaml", ".yml")):
        return False
    text = Path(name).read_text(encoding="utf-8", errors="replace") if Path(name).is_file() else ""
    return not re.search("^group:", text, re.MULTILINE)


def _read_scores(task: str, values: dict[str, Any]) -> list[TaskScore]:
    """Read scores such as {"acc,none": 0.5, "acc_stderr,none": 0.1}, by metric and filter."""
    scores = []
    for key, value in values.items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr"):
            continue
        stderr = values.get(f"{metric}_stderr,{filter_name}")
        if not isinstance(stderr, float):  # lm-eval writes "N/A" if it is not known
            stderr = None
        name = metric if filter_name == "none" else f"{metric} ({filter_name})"
        scores.append(TaskScore(task, name, float(value), stderr))
    return scores
