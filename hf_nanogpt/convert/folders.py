"""Both ends of a conversion: what is loaded, and what is written whole or not at all."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    GenerationConfig,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..checkpoint.foreign import CONFIG, TOKENIZERS, check_generation_config, read_tokenizer
from ..checkpoint.loading import TOKENIZER_FILES, download, load_checkpoint, split_revision
from ..checkpoint.writing import check_writable, clear_abandoned, staged_folder
from ..errors import UserError, explain_errors
from ..modeling_nanogpt import NanoGPTForCausalLM
from ..untrusted import read_json

_GENERATION = "generation_config.json"


def load_tokenizer(place: str | Path) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a folder or Hub id; `None` for a folder without one."""
    name, revision = split_revision(place)
    folder = Path(name) if Path(name).is_dir() else download(name, revision, TOKENIZER_FILES)
    if not any((folder / file).is_file() for file in (*TOKENIZERS, "tokenizer_config.json")):
        return None
    return read_tokenizer(folder)


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, *, where: str | Path
) -> None:
    """Raise a `UserError` if the model has no embedding for a token of the tokenizer."""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= config.vocab_size:
        raise UserError(
            f"The tokenizer has a token number {largest}, but the model in {where} has vocab_size="
            f"{config.vocab_size}: give the tokenizer that it was trained with."
        )


def load_our_model(
    checkpoint: str | Path,
) -> tuple[NanoGPTForCausalLM, PreTrainedTokenizerBase]:
    """Load one of our checkpoints; raise a `UserError` for a model of another class."""
    model, tokenizer = load_checkpoint(checkpoint)
    if not isinstance(model, NanoGPTForCausalLM):
        raise UserError(
            f"{checkpoint} is a {type(model).__name__}, not a {NanoGPTForCausalLM.__name__}: run "
            "hf-nanogpt convert first."
        )
    return model, tokenizer


def check_destination(destination: str | Path) -> Path:
    """Return the path if a new folder can be written there, or raise a `UserError`."""
    path = Path(destination)
    clear_abandoned(path)
    content = [p.name for p in path.iterdir()] if path.is_dir() else []
    if content and all(name.startswith(".staged-") for name in content):
        raise UserError(
            f"destination={path} is being written by another process ({content[0]}): wait until it "
            "has finished, or choose another folder."
        )
    if content:
        raise UserError(f"destination={path} exists and is not empty: choose another folder.")
    check_writable(path, name="destination")
    return path


def check_new_file(destination: str | Path, suffix: str, *extra: str) -> Path:
    """Return the path if it ends in `suffix` and a new file can be written there.

    `extra` are endings of files that may be written next to it.
    """
    path = Path(destination)
    if path.suffix != suffix:
        raise UserError(f"destination={path} must be a path that ends in {suffix}.")
    for taken in (path, *(path.with_name(path.name + ending) for ending in extra)):
        if taken.exists():
            raise UserError(f"destination={taken} already exists: choose another name.")
    check_writable(path, name="destination")
    return path


def write_folder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    destination: Path,
    *,
    settings: dict[str, Any] | None = None,
) -> None:
    """Write a whole checkpoint, or nothing; `settings` are those of generation.

    Texts end where our `stream_text` ends them: at the tokenizer's eos if the settings have none.
    """
    with written_folder(destination) as staged:
        model.save_pretrained(staged, state_dict=_published_weights(model))
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        file = staged / _GENERATION
        settings = dict(settings or json.loads(file.read_text(encoding="utf-8")))
        if settings.get("eos_token_id") is None and tokenizer is not None:
            settings["eos_token_id"] = tokenizer.eos_token_id
        _write_json(file, settings)
        if not isinstance(model, NanoGPTForCausalLM):
            _add_older_names(staged, model)


def _published_weights(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """Return the weights of a GPT-2 by the names in OpenAI's files, which MLX expects, else None.

    They lack the prefix `transformer.`, which transformers adds; with a head it would not.
    """
    if not isinstance(model, GPT2LMHeadModel) or not model.config.tie_word_embeddings:
        return None
    return dict(model.base_model.state_dict())


def _add_older_names(folder: Path, model: PreTrainedModel) -> None:
    """Let transformers 4 and what is built on it read a native checkpoint as transformers 5 does.

    Release 4.57, the last, has `rope_theta` and `rope_scaling` instead of `rope_parameters`, and
    would take a base of 10000 without a word. The tokenizer's names are older, too.
    """
    config = read_json(folder / CONFIG)
    if rope := config.get("rope_parameters"):
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        plain = rope["rope_type"] == "default"
        if rope["rope_type"] == "longrope":  # it looks for the length here, and makes the factor
            length = rope["original_max_position_embeddings"]
            config["original_max_position_embeddings"] = length
            if config["max_position_embeddings"] / length != rope.get("factor"):
                rotary: Any = model.base_model.rotary_emb
                scaling["attention_factor"] = rotary.attention_scaling
        config |= {"rope_theta": rope["rope_theta"], "rope_scaling": None if plain else scaling}
        _write_json(folder / CONFIG, config)
    path = folder / "tokenizer_config.json"
    if path.is_file():
        fields = read_json(path)
        if fields.get("tokenizer_class") == "TokenizersBackend":
            fields["tokenizer_class"] = "PreTrainedTokenizerFast"
            # Otherwise it returns token_type_ids, too, which `generate` refuses.
            fields.setdefault("model_input_names", ["input_ids", "attention_mask"])
        if isinstance(fields.get("extra_special_tokens"), list):
            fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
        _write_json(path, fields)


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    text = json.dumps(fields, indent=2, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of generation in a folder; older ones have them in `config.json`."""
    if (folder / _GENERATION).is_file():
        check_generation_config(folder)  # do not copy a damaged one
        return read_json(folder / _GENERATION)
    path = folder / CONFIG
    with explain_errors(f"{path} has settings of generation that are not valid"):
        settings = GenerationConfig.from_model_config(read_json(path))
        return cast(dict[str, Any], json.loads(settings.to_json_string()))


def use_special_tokens(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, settings: dict[str, Any]
) -> None:
    """Replace special ids of another tokenizer in the configuration and in the settings."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        own = getattr(tokenizer, name)
        for place in (vars(model.config), settings):
            known = place.get(name)
            if own is not None and own not in (known if isinstance(known, list) else [known]):
                place[name] = own


@contextmanager
def written_folder(folder: Path, *, file: Path | None = None) -> Iterator[Path]:
    """Stage files for a folder; if that fails, explain it in a `UserError` and leave nothing.

    `file` is the destination to name in the message, where it is one file in the folder.
    """
    existed = folder.exists()
    try:
        with staged_folder(folder) as staged:
            yield staged
    except BaseException as error:
        if not existed and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        # tokenizers, which is written in Rust, raises a bare Exception when the disk is full.
        if isinstance(error, OSError | SafetensorError) or type(error) is Exception:
            # numpy says how many items were written, but not why.
            unknown = isinstance(error, OSError) and error.errno is None
            why = "the disk is full, or a limit on files is reached" if unknown else error
            raise UserError(
                f"destination={file or folder} could not be written, and nothing was left there: "
                f"{why}. Free some space, or choose another place."
            ) from error
        raise
