"""What a `checkpoint-N` says of its own files, to find damage before it is resumed from."""

import json
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState

from ..errors import UserError
from ..untrusted import path_inside, read_json

# Where the `trainer_state.json` of a step keeps what `InterruptibleTrainer` adds.
RECORD = "InterruptibleTrainer"
_STATE = "trainer_state.json"
_NUMBER = int | float
# What may be null in Trainer's part of it, and all that a training adds.
_OPTIONAL: dict[str, Any] = {
    "train_batch_size": int,
    "best_metric": _NUMBER,
    "best_model_checkpoint": str,
}
_ADDED: dict[str, Any] = {
    "settings": dict,
    "seconds": _NUMBER,
    "running_losses": list,
    "last_logged": int,
}


def save_state(state: TrainerState, path: str) -> None:
    """Write a `trainer_state.json` with a checksum of its own, and no path of this machine."""
    if state.best_model_checkpoint:  # resuming makes the path from `best_global_step`
        state = replace(state, best_model_checkpoint=Path(state.best_model_checkpoint).name)
    if record := state.stateful_callbacks.get(RECORD):
        record["checksum"] = sum_state(json.loads(json.dumps(asdict(state))))
    TrainerState.save_to_json(state, path)


def find_damage(step: str | Path) -> str | None:
    """Return the name of a file in a whole `checkpoint-N` that is not as it was written, if any."""
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
        except OSError:  # of a failing disk
            return name
    return None


def sum_file(path: Path) -> str:
    """Return the CRC-32 of a file: it finds damage, though not by intent, at some GB a second."""
    total = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            total = zlib.crc32(block, total)
    return f"{total:08x}"


def sum_state(state: dict[str, Any]) -> str:
    """Return the checksum of the content of a `trainer_state.json`, without this checksum."""
    record = {k: v for k, v in _get_record(state).items() if k != "checksum"}
    rest = state | {"stateful_callbacks": state.get("stateful_callbacks", {}) | {RECORD: record}}
    return f"{zlib.crc32(json.dumps(rest, sort_keys=True).encode()):08x}"


def read_record(step: str | Path) -> dict[str, Any]:
    """Return what `InterruptibleTrainer` has written in a `checkpoint-N`; of others, nothing."""
    return _get_record(read_json(Path(step) / _STATE))


def _get_record(state: dict[str, Any]) -> dict[str, Any]:
    callbacks = state.get("stateful_callbacks", {})
    record = callbacks.get(RECORD, {}) if isinstance(callbacks, dict) else None
    known = record if isinstance(record, dict) else {}
    parts = [known.get(name, {}) for name in ("sizes", "checksums")]
    sizes = parts[0].values() if isinstance(parts[0], dict) else ()
    if not all(isinstance(part, dict) for part in (record, *parts)) or not all(
        isinstance(size, int) for size in sizes
    ):
        raise UserError(f"{_STATE} has a record that no training wrote.")
    return known


def _is_state(state: dict[str, Any]) -> bool:
    """Say whether a `trainer_state.json` has the names and types that Trainer's own has."""
    usual = vars(TrainerState())
    rows = state.get("log_history") or []
    return (
        state.keys() <= usual.keys()
        and isinstance(state.get("global_step", 0), int)
        and all(
            isinstance(value, _NUMBER if isinstance(usual[name], _NUMBER) else type(usual[name]))
            for name, value in state.items()
            if usual[name] is not None and value is not None
        )
        and all(
            isinstance(state[name], kind)
            for name, kind in _OPTIONAL.items()
            if state.get(name) is not None
        )
        and state.get("global_step", 0) >= 0
        and all(isinstance(row, dict) and isinstance(row.get("step"), _NUMBER) for row in rows)
    )


def _is_record(state: dict[str, Any], record: dict[str, Any]) -> bool:
    """Say whether what a training adds is whole, and of the right types; of others, it is none."""
    if not record:
        return True
    control = state["stateful_callbacks"].get("TrainerControl")
    args = control.get("args") if isinstance(control, dict) else None
    return (
        all(isinstance(record.get(name), kind) for name, kind in _ADDED.items())
        and all(isinstance(loss, _NUMBER) for loss in record["running_losses"])
        and isinstance(args, dict)
        and args.keys() == TrainerControl().state()["args"].keys()
        and all(isinstance(value, bool) for value in args.values())
    )
