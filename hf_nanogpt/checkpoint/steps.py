"""The `checkpoint-N` folders of a training: which are whole, and which are damaged.

Each has a `trainer_state.json`, which is written last. In it `InterruptibleTrainer` records the
sizes and checksums of the other files, and a checksum of its own.
"""

import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState
from transformers.utils import logging

from ..errors import UserError
from ..untrusted import path_inside, read_json

logger = logging.get_logger(__name__)

RECORD = "InterruptibleTrainer"  # the name of our record in the state
STEPS = "checkpoint-[0-9]*"
_STATE = "trainer_state.json"
_NUMBER = int | float
# The types of Trainer's fields that start as null, and of what our record must have.
_OPTIONAL: dict[str, Any] = {
    "train_batch_size": int,
    "best_metric": _NUMBER,
    "best_model_checkpoint": str,
}
_RECORDED: dict[str, Any] = {
    "settings": dict,
    "seconds": _NUMBER,
    "running_losses": list,
    "last_logged": int,
}


# Find a step


def find_last_checkpoint(output_dir: str | Path) -> str | None:
    """Return the last whole `checkpoint-N` in `output_dir`, or None."""
    return next((str(step) for step in _whole_steps(output_dir)), None)


def find_intact_checkpoint(output_dir: str | Path) -> str | None:
    """Return the last whole `checkpoint-N` with files as they were written, or None.

    It reads all files. A damaged step is skipped with a warning.

    Raises:
        UserError: all whole steps are damaged.
    """
    damaged = []
    for step in _whole_steps(output_dir):
        if (name := find_damage(step)) is None:
            return str(step)
        logger.warning(f"{step / name} is damaged, so {step.name} cannot be resumed from.")
        damaged.append(str(step / name))
    if damaged:
        raise UserError(
            f"output_dir={output_dir} has no intact checkpoint-* to resume from: "
            f"{', '.join(damaged)} {'is' if len(damaged) == 1 else 'are'} damaged. Restore a copy, "
            "or train again in another output_dir."
        )
    return None


def list_steps(output_dir: str | Path) -> list[Path]:
    """Return the `checkpoint-N` folders by their number, whole or not."""
    steps = {p.name.removeprefix("checkpoint-"): p for p in Path(output_dir).glob(STEPS)}
    return [steps[n] for n in sorted(filter(str.isdecimal, steps), key=int)]


def _whole_steps(output_dir: str | Path) -> Iterator[Path]:
    """Yield the steps with a state and files of full length, the last first."""
    for step in reversed(list_steps(output_dir)):
        try:
            sizes = read_record(step).get("sizes", {})
            if all(path_inside(step, name).stat().st_size >= sizes[name] for name in sizes):
                yield step
        except (OSError, UserError):  # a file is missing or cut off
            continue


# Read and write the state


def save_state(state: TrainerState, path: str) -> None:
    """Write a `trainer_state.json` with a checksum of itself, and without paths of this machine."""
    if state.best_model_checkpoint:  # a resumed run finds the path by `best_global_step`
        state = replace(state, best_model_checkpoint=Path(state.best_model_checkpoint).name)
    callbacks: Any = state.stateful_callbacks  # a dict; the annotation says list
    if record := callbacks.get(RECORD):
        record["checksum"] = sum_state(json.loads(json.dumps(asdict(state))))
    TrainerState.save_to_json(state, path)


def find_damage(step: str | Path) -> str | None:
    """Return the name of a file in a `checkpoint-N` that is not as it was written, or None."""
    state = read_json(Path(step) / _STATE)
    record = _get_record(state)
    if not _is_state(state) or not _is_record(state, record):
        return _STATE
    if record.get("checksum", sum_state(state)) != sum_state(state):
        return _STATE
    for name, checksum in record.get("checksums", {}).items():
        try:
            if sum_file(path_inside(step, name)) != checksum:
                return name
        except OSError:  # a failing disk
            return name
    return None


def sum_file(path: Path) -> str:
    """Return the CRC-32 of a file. It finds damage by accident, not by intent, at some GB/s."""
    total = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            total = zlib.crc32(block, total)
    return f"{total:08x}"


def sum_state(state: dict[str, Any]) -> str:
    """Return the checksum of a state's content, without the recorded checksum."""
    record = {k: v for k, v in _get_record(state).items() if k != "checksum"}
    rest = state | {"stateful_callbacks": state.get("stateful_callbacks", {}) | {RECORD: record}}
    return f"{zlib.crc32(json.dumps(rest, sort_keys=True).encode()):08x}"


def read_record(step: str | Path) -> dict[str, Any]:
    """Return what `InterruptibleTrainer` recorded in a `checkpoint-N`, empty if others wrote it."""
    return _get_record(read_json(Path(step) / _STATE))


def _get_record(state: dict[str, Any]) -> dict[str, Any]:
    callbacks = state.get("stateful_callbacks", {})
    record = callbacks.get(RECORD, {}) if isinstance(callbacks, dict) else None
    if isinstance(record, dict):
        sizes, checksums = record.get("sizes", {}), record.get("checksums", {})
        both = isinstance(sizes, dict) and isinstance(checksums, dict)
        if both and all(isinstance(size, int) for size in sizes.values()):
            return record
    raise UserError(f"{_STATE} has a record that was not written by a training.")


def _is_state(state: dict[str, Any]) -> bool:
    """Return whether a state has the names and types that Trainer writes."""
    defaults = vars(TrainerState())
    types = _OPTIONAL | {
        name: _NUMBER if isinstance(value, _NUMBER) else type(value)
        for name, value in defaults.items()
        if value is not None
    }
    step, rows = state.get("global_step", 0), state.get("log_history") or []
    return (
        state.keys() <= defaults.keys()
        and all(
            isinstance(value, types.get(name, object))
            for name, value in state.items()
            if value is not None
        )
        and isinstance(step, int)
        and step >= 0
        and all(isinstance(row, dict) and isinstance(row.get("step"), _NUMBER) for row in rows)
    )


def _is_record(state: dict[str, Any], record: dict[str, Any]) -> bool:
    """Return whether our record is whole and has the right types; it may be absent."""
    if not record:
        return True
    control = state["stateful_callbacks"].get("TrainerControl")
    args = control.get("args") if isinstance(control, dict) else None
    return (
        all(isinstance(record.get(name), value_type) for name, value_type in _RECORDED.items())
        and all(isinstance(loss, _NUMBER) for loss in record["running_losses"])
        and isinstance(args, dict)
        and args.keys() == TrainerControl().state()["args"].keys()
        and all(isinstance(value, bool) for value in args.values())
    )
