"""Which settings suit a text: the tokenizer, the size, dropout and the steps, from one table.

No row of the table takes longer than the quickstart does. benchmarks/own_text.py measures what
comes of it, compared with counting and with a compressor.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..checkpoint.steps import list_steps
from ..checkpoint.writing import RECIPE, explain_write_errors
from ..configuration_nanogpt import NanoGPTConfig
from ..data.sources import STDLIB
from ..data.tokenization import TRAINED
from ..errors import UserError, without_secrets
from ..presets import load_preset
from ..untrusted import path_inside
from .arguments import LONGEST, choose_defaults, parse_settings, read_flags
from .looking import Text, look_at
from .recipes import Choice, read_sections

QUICKSTART, FINETUNE = "quickstart", "finetune"
_HELD_OUT = 500_000  # bytes; with more, the exact evaluation at the end would take long


class _Row(NamedTuple):
    """The settings for texts of up to `num_bytes` to train on.

    A text with few different characters gets the `tokenizer`, with `vocab_size` if it is a BPE.
    Another script, such as Chinese, gets a BPE of a token for each of its characters, a lower rate
    for the head, and fewer steps: it is learnt by heart sooner.
    """

    num_bytes: float
    tokenizer: str
    vocab_size: int
    width: int
    heads: int
    context: int
    batch: int
    steps: int


_TABLE = (
    _Row(30_000, "char", 512, 128, 4, 128, 16, 300),
    _Row(120_000, "char", 512, 128, 4, 128, 16, 900),
    _Row(600_000, "char", 512, 128, 4, 128, 16, 800),
    _Row(1_500_000, "bpe", 1024, 192, 3, 256, 8, 500),
    _Row(math.inf, "bpe", 2048, 192, 3, 256, 8, 700),  # as the quickstart
)
_LAYERS = 4
_CHOSEN = {  # all that is ever chosen
    *("tokenizer", "vocab_size", "chat_template", "validation_fraction"),
    *("n_layer", "n_embd", "n_head", "block_size", "dropout", "attention_dropout"),
    *("max_steps", "per_device_train_batch_size", "per_device_eval_batch_size"),
    "head_learning_rate",
}
_FEW_CHARACTERS = 400  # at most so many different ones make a good vocabulary
_RARE = 6  # times that each character comes, on average, if a BPE can have as many tokens
# Dropout grows with the passes over the text. The best of 0, 0.1, 0.2, 0.3 and 0.4 was 0 after 2
# passes, 0.1 after 9, 0.2 after 18, 0.3 after 27 and 0.4 after 41.
_FEW_PASSES, _PASSES, _MOST_DROPOUT = 4, 90, 0.4
# Over another script, divided by the root of its bytes: 14 over 50 kB, and 3 over 1 MB. The head is
# what learns it by heart first; at this lower rate, the text took 2 to 6 % fewer bits.
_MOST_PASSES, _FEWEST_STEPS, _HEAD_RATE = 3000, 25, 0.003
_BPE_BYTES = {512: 2.0, 1024: 2.5, 2048: 3.0, 4096: 4.0}  # that a token stands for, about


def settle_recipe(
    recipe: str | Path | Choice | None,
    flags: Sequence[str],
    *,
    start_from: str | Path | None = None,
    resume: bool = False,
) -> str | Path | Choice:
    """Return the recipe that is named; or the one of the run to resume; or one that suits the text.

    The quickstart's own data keep its recipe. So do streams and tokens, in which there is no text
    to look at. A model to start from gets the recipe `finetune`.

    Raises:
        UserError: as `parse_settings`, or the data cannot be read.
    """
    if recipe is not None:
        return recipe
    if start_from is not None:
        if "data" not in read_flags(flags):
            raise UserError("data: name the text that the model is to learn: --data my.txt.")
        return FINETUNE
    # The steps of the quickstart are not those of the run, which may have other limits.
    sections = {"data": read_sections(QUICKSTART)["data"]}
    data, _, _ = parse_settings(Choice(sections), flags)
    folder = Path(read_flags(flags).get("output_dir") or _name_folder(data.data))
    stored = _find_stored(folder) if resume else None
    if stored and data.data == STDLIB:
        raise UserError(f"output_dir={folder} was trained on another text: give its --data again.")
    if data.data == STDLIB:
        return QUICKSTART
    if stored:
        return _add_folder(_read_stored(stored), folder)
    if resume and list_steps(folder):  # of version 0.1.0, which chose nothing
        return QUICKSTART
    text = look_at(data)
    if text is None:
        return QUICKSTART
    choice = choose_recipe(text, flags)
    return _add_folder(choice.sections, folder, choice.reasons)


def _find_stored(folder: Path) -> Path | None:
    """Return what a run chose: in its folder, else in the last checkpoint that has the file."""
    places = (folder, *reversed(list_steps(folder)))
    return next((place / RECIPE for place in places if (place / RECIPE).is_file()), None)


def _read_stored(path: Path) -> dict[str, dict[str, Any]]:
    """Return what a run chose; whoever wrote its checkpoint could not set anything else."""
    sections = read_sections(path_inside(path.parent, path.name))
    values = {name: value for part in sections.values() for name, value in part.items()}
    # A list would become several flags, and its words could be flags of their own.
    unknown = [
        str(name)
        for name, value in values.items()
        if name not in _CHOSEN or not isinstance(value, str | int | float)
    ]
    if unknown:
        raise UserError(
            f"{path} sets {', '.join(sorted(unknown))} to a value that is never chosen: "
            f"give it as a flag, or name the file, if you trust it: hf-nanogpt train {path} "
            "--resume --output_dir FOLDER."
        )
    return sections


def choose_recipe(text: Text, flags: Sequence[str] = ()) -> Choice:
    """Return the settings that suit a text, and why, given the settings that `flags` already set.

    Those set the others too: how often the steps go over the text, for example.
    """
    typed = read_flags(flags)
    held_out = typed.get("validation_fraction", _choose_fraction(text.num_bytes))
    if typed.get("validation_data"):
        held_out = 0.0
    num_bytes = text.num_bytes * (1 - held_out)
    row = next(row for row in _TABLE if num_bytes <= row.num_bytes)

    # Data and model.
    data: dict[str, Any] = {
        "tokenizer": "bpe" if "vocab_size" in typed else _choose_tokenizer(row, text),
        "vocab_size": _choose_vocab_size(row, text),
    }
    values = data | typed
    if held_out:
        data["validation_fraction"] = held_out
    if text.conversation and values["tokenizer"] in TRAINED:  # others bring their own
        data["chat_template"] = "chatml"
    context, batch = _fit_context(row, text, _count_bytes_per_token(values, text))
    model: dict[str, Any] = {
        "n_layer": _LAYERS,
        **_fit_width(row, typed),
        "block_size": context,
    }
    training: dict[str, Any] = {
        "max_steps": row.steps,
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": batch,
    }
    sections = {"data": data, "model": model, "training": training}

    # Steps and dropout, by what the run comes to with the settings that are typed.
    passes = _count_passes(sections, flags, num_bytes, text)
    if _has_many_characters(text):
        if passes > 1:  # of what is read once, a slow head learns too little
            training["head_learning_rate"] = _HEAD_RATE
        if passes > (most := _MOST_PASSES / num_bytes**0.5):
            training["max_steps"] = max(_FEWEST_STEPS, 5 * round(row.steps * most / passes / 5))
            passes = _count_passes(sections, flags, num_bytes, text)
    model["dropout"] = _choose_dropout(passes)
    if model["dropout"]:
        model["attention_dropout"] = 0.0  # it gains 0.5 %, in steps that take 1.5 times as long
    return Choice(sections, _explain(sections, flags, text, num_bytes, passes))


def _choose_fraction(num_bytes: int) -> float:
    """Return a tenth, or the share with one digit that makes `_HELD_OUT` bytes."""
    return min(0.1, float(f"{_HELD_OUT / num_bytes:.0e}"))


def _has_many_characters(text: Text) -> bool:
    """Say whether the script is one like Chinese, rather than an alphabet with rare signs."""
    return text.num_common > _FEW_CHARACTERS


def _choose_tokenizer(row: _Row, text: Text) -> str:
    """Return a BPE only where the text gives it its vocabulary."""
    if not _has_many_characters(text):
        return "char" if text.num_words < row.vocab_size else row.tokenizer
    are_rare = text.num_bytes / text.bytes_per_character < _RARE * text.num_characters
    return "char" if are_rare else "bpe"


def _choose_vocab_size(row: _Row, text: Text) -> int:
    """Return the size of a BPE: the row's, or a token for each byte and each character."""
    return 256 + text.num_characters if _has_many_characters(text) else row.vocab_size


def _fit_context(row: _Row, text: Text, bytes_per_token: float) -> tuple[int, int]:
    """Return a row's context and batch; a longer context and fewer rows where that is better.

    What is left of a conversation when it is cut lacks the question. Of 200 kB of Chinese, 256
    tokens gave 0.7 % fewer bits than 128, and 0.2 % fewer than 512.
    """
    context, batch = row.context, row.batch
    tokens = text.conversation * text.bytes_per_character / bytes_per_token
    if _has_many_characters(text):
        tokens = max(tokens, 255)
    while context <= tokens and context < LONGEST:
        context, batch = 2 * context, max(1, batch // 2)
    return context, batch


def _fit_width(row: _Row, typed: Mapping[str, Any]) -> dict[str, int]:
    """Return a row's width and heads; where one is typed, the other such that they go together."""
    heads, width = typed.get("num_attention_heads"), typed.get("hidden_size")
    if width and not heads:
        fitting = [n for n in range(1, width // 32 + 1) if width % (2 * n) == 0]
        return {"n_embd": width, "n_head": max(fitting, default=1)}
    if heads and heads > 0 and not width:
        return {"n_embd": max(1, row.width // (8 * heads)) * 8 * heads, "n_head": heads}
    return {"n_embd": row.width, "n_head": row.heads}


def _count_passes(
    sections: dict[str, dict[str, Any]], flags: Sequence[str], num_bytes: float, text: Text
) -> float:
    """Return how often the steps of a run go over the text, with the settings that are typed."""
    values = read_flags([*choose_defaults(Choice(sections), flags), *flags])
    per_token = _count_bytes_per_token(values, text) / num_bytes
    if values.get("max_steps", -1) < 0:  # as Trainer reads it
        repeated = values.get("min_train_tokens", 0) * per_token
        return max(values.get("num_train_epochs", 3), repeated)
    blocks = values["per_device_train_batch_size"] * values.get("gradient_accumulation_steps", 1)
    blocks *= int(os.environ.get("WORLD_SIZE", 1))  # of processes that train together
    context = values.get("max_position_embeddings")
    if context is None:  # that of a preset
        context = min(LONGEST, load_preset(values["preset"]).max_position_embeddings)
    tokens = values["max_steps"] * blocks * (values.get("context_length") or context)
    return tokens * per_token


def _count_bytes_per_token(values: Mapping[str, Any], text: Text) -> float:
    """Return the bytes of text that a token stands for; of a BPE about so many."""
    by_kind = {"byte": 1.0, "char": text.bytes_per_character}
    return by_kind.get(values["tokenizer"], _BPE_BYTES.get(values["vocab_size"], 3.0))


def _choose_dropout(passes: float) -> float:
    """Return the dropout for so many passes over the text, in steps of 0.05."""
    if passes < _FEW_PASSES:
        return 0.0
    return round(min(_MOST_DROPOUT, round(20 * passes / _PASSES) / 20), 2)


def _explain(
    sections: dict[str, dict[str, Any]],
    flags: Sequence[str],
    text: Text,
    num_bytes: float,
    passes: float,
) -> tuple[str, ...]:
    """Return a line for each group of settings: those that were chosen, and why."""
    typed = read_flags(flags)
    kept = read_flags(choose_defaults(Choice(sections), flags)).keys() - typed.keys()
    values = {name: value for part in sections.values() for name, value in part.items()}
    if typed.get("tokenizer", values["tokenizer"]) != "bpe":
        del values["vocab_size"]  # which has no effect
    is_short = num_bytes <= _TABLE[-2].num_bytes
    what = " of conversations" if text.conversation else ""
    names = ("tokenizer", "vocab_size", "head_learning_rate", "chat_template")
    lines = {
        names: f"{_say_size(num_bytes)}{what} to train on, "
        f"with {text.num_characters:,} different characters",
        ("n_embd", "block_size", "max_steps"): "more would learn so short a text by heart"
        if is_short
        else "as much as a few minutes on 2 CPU cores allow",
        ("dropout", "attention_dropout"): _explain_dropout(passes),
    }
    shown = {
        reason: [n for n in names if NanoGPTConfig.attribute_map.get(n, n) in kept and n in values]
        for names, reason in lines.items()
    }
    return tuple(
        f"{', '.join(f'{name} {values[name]}' for name in names)}: {reason}"
        for reason, names in shown.items()
        if names
    )


def _explain_dropout(passes: float) -> str:
    """Say what the passes over the text mean; how many they are, the plan says exactly."""
    if passes < 1:
        return "the steps see only a part of the text; more of them learn more"
    often = "often enough to learn it by heart" if passes >= _FEW_PASSES else "only a few times"
    return f"the steps go over the text {often}"


def _say_size(num_bytes: float) -> str:
    """Return a number of bytes in words.

    >>> _say_size(45_012), _say_size(9_500_000)
    ('45 kB', '9.5 MB')
    """
    return f"{num_bytes / 1e6:.3g} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.3g} kB"


def _name_folder(data: str) -> str:
    """Return the folder of a run on `data`, by the name of the file, folder, address or dataset.

    >>> _name_folder("texts/my book.txt"), _name_folder("https://host/a.jsonl.gz?key=1")
    ('runs/my-book', 'runs/a')
    """
    name = without_secrets(data).rstrip("/").split("/")[-1].partition(".")[0]
    return f"runs/{re.sub('[^a-zA-Z0-9_]+', '-', name).strip('-') or 'text'}"


def _add_folder(
    sections: dict[str, dict[str, Any]], folder: Path, reasons: tuple[str, ...] = ()
) -> Choice:
    training = {"output_dir": str(folder)} | sections.get("training", {})
    return Choice(sections | {"training": training}, reasons)


def store_recipe(recipe: str | Path | Choice, output_dir: str | Path) -> None:
    """Write the recipe of a new run into its folder, if it was chosen: resuming reads it."""
    path = Path(output_dir) / RECIPE
    if not isinstance(recipe, Choice):
        if Path(recipe).resolve() != path.resolve():
            path.unlink(missing_ok=True)  # of an earlier run
    elif recipe.reasons or not path.is_file():  # else it was read from there
        sections = {name: dict(part) for name, part in recipe.sections.items()}
        sections["training"].pop("output_dir", None)  # folders are moved
        header = "".join(f"# {line}\n" for line in ("Chosen from the corpus:", *recipe.reasons))
        with explain_write_errors(path, run=output_dir):
            path.write_text(header + yaml.safe_dump(sections, sort_keys=False), encoding="utf-8")
