"""Read a checkpoint that somebody else may have written: its configuration, tokenizer and model.

Nothing that the folder brings is run: transformers is always told `trust_remote_code=False`, with
which it neither runs foreign code nor asks on the terminal whether it may. Each file is looked at
before transformers gets it, so that an error names the file and no size in it can fill the memory.
"""

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .. import auto  # noqa: F401 (importing it registers the Auto classes)
from ..errors import UserError, explain_errors
from ..untrusted import check_links, read_json
from .weights import open_weights

CONFIG = "config.json"
_GENERATION = "generation_config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of them has the vocabulary
_OF_TOKENIZER = (
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
# Whole numbers in a configuration, by name: models that are in use stay far below.
_LIMITS = ((re.compile("layer|attention_types"), 1024), (re.compile("head|expert"), 2**16))
_LARGEST = 2**31 - 1
# A model may need so many times the values that are stored (quantized weights are packed).
_PACKED = 8
_SMALL = 2**24
_MOST_SEQUENCES = 64  # that one prompt may make, as beams or answers


# The configuration


def read_config(folder: Path) -> PreTrainedConfig:
    """Return the configuration in a folder.

    Raises:
        UserError: `config.json` is missing or damaged, has a value of the wrong type or a size
            that no model has, or needs code of its own.
    """
    path = folder / CONFIG
    fields = read_json(path)
    check_fields(fields, path)
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        code = "Code that a checkpoint brings is never run." if "auto_map" in fields else ""
        raise UserError(f"{path} has model_type={kind!r:.80}, which is not known here. {code}")
    with explain_errors(f"{path} is not the configuration of a {kind} model"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def check_fields(fields: dict[str, Any], path: Path) -> None:
    """Refuse what no class checks: enormous sizes, and kernels to be fetched from the Hub.

    Raises:
        UserError: names the field and the file.
    """
    for name, value in _flatten(fields):
        limit = next((most for names, most in _LIMITS if names.search(name)), _LARGEST)
        is_size = isinstance(value, int) and "theta" not in name  # of rope: a large whole number
        if is_size and abs(value) > limit:
            raise UserError(f"{path} has {name}={value:,}, and at most {limit:,} is read.")
        if isinstance(value, str) and "/" in value and re.search("implementation|kernel", name):
            raise UserError(
                f"{path} has {name}={value!r:.80}, which is compiled code to download: it was not "
                "followed. Remove that line."
            )


def _flatten(fields: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the values in nested objects and lists, each with the innermost name around it."""
    left: list[tuple[str, Any]] = list(fields.items())
    while left:
        name, value = left.pop()
        if isinstance(value, dict):
            left += [(key or name, inner) for key, inner in value.items()]
        elif isinstance(value, list):
            left += [(name, inner) for inner in value]
        else:
            yield name, value


def check_generation_config(folder: Path) -> None:
    """Refuse a `generation_config.json` with a value of the wrong type, or with too many beams."""
    path = folder / _GENERATION
    if not path.is_file():
        return
    fields, usual = read_json(path), GenerationConfig._get_default_generation_params()
    for name, value in fields.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        wanted = usual.get(name)
        if value is None or name not in usual:
            fine = value is None or not name.endswith("_token_id") or _are_ids(value)
        elif isinstance(wanted, bool):
            fine = isinstance(value, bool) or (name, value) == ("early_stopping", "never")
        else:
            fine = not isinstance(wanted, int | float) or (number and math.isfinite(value))
        if not fine:
            raise UserError(f"{path} has {name}={value!r:.80}, which is not of the right type.")
        if re.search("num_beam|num_return", name) and number and value > _MOST_SEQUENCES:
            raise UserError(f"{path} has {name}={value:,}: at most {_MOST_SEQUENCES} are made.")
    with explain_errors(f"{path} is not valid"):
        GenerationConfig.from_dict(fields)


def _are_ids(value: object) -> bool:
    ids = value if isinstance(value, list) else [value]
    return all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in ids)


# The tokenizer


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a folder.

    Raises:
        UserError: one of its files is missing or damaged, or it needs code of its own.
    """
    check_links(folder)
    for name in _OF_TOKENIZER:
        if (folder / name).is_file():
            read_json(folder / name)
    if (folder / CONFIG).is_file():  # names the class where tokenizer_config.json does not
        check_fields(read_json(folder / CONFIG), folder / CONFIG)
    files = [name for name in (*_OF_TOKENIZER, "tokenizer.model") if (folder / name).is_file()]
    with explain_errors(f"The tokenizer in {folder} ({', '.join(files)}) cannot be loaded"):
        try:
            return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        except ValueError as error:
            if "trust_remote_code" not in str(error):  # which transformers advises to set
                raise
            raise UserError("it needs code that it brings, which is never run") from error


# The model


def read_model(folder: Path) -> PreTrainedModel:
    """Return the model in a folder, from safetensors only.

    Raises:
        UserError: a file is missing or damaged, the weights are not those that the configuration
            describes, or they hold NaN or infinity.
    """
    config = read_config(folder)
    check_generation_config(folder)
    if (folder / "adapter_config.json").is_file():  # transformers would load it, with PEFT
        raise UserError(
            f"{folder} holds a model and an adapter_config.json: move the adapter elsewhere, or "
            "load both with PEFT."
        )
    _check_shapes(folder, config)
    with explain_errors(f"{folder} cannot be loaded"):
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{folder} has no weights for {', '.join(missing[:3])}: it is not whole.")
    check_finite(model.named_parameters(), folder)
    return model


def make_skeleton(config: PreTrainedConfig, folder: Path) -> PreTrainedModel:
    """Build the model that a configuration describes, of tensors that take no memory."""
    what = f"{folder / CONFIG} describes a model that cannot be built"
    with explain_errors(what), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _check_shapes(folder: Path, config: PreTrainedConfig) -> None:
    """Compare configuration and weights before either takes memory."""
    found, model = open_weights(folder), make_skeleton(config, folder)
    stored = sum(math.prod(tensor.shape) for tensor in found.values())
    if (needed := model.num_parameters()) > _PACKED * stored + _SMALL:
        raise UserError(
            f"{folder / CONFIG} describes {needed:,} parameters, but the weights beside it have "
            f"{stored:,}: they do not belong together."
        )
    if getattr(config, "quantization_config", None) is not None:
        return
    for name, tensor in model.state_dict().items():
        if name in found and found[name].shape != tuple(tensor.shape):
            raise UserError(
                f"{folder} has the weight {name!r} of shape {found[name].shape}, and its "
                f"{CONFIG} describes {tuple(tensor.shape)}: they do not belong together."
            )


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], where: Path) -> None:
    """Raise a `UserError` for the first tensor with NaN or infinity in it."""
    for name, tensor in tensors:
        # A sum is ten times as fast as looking at each value, and not finite where one is not.
        if tensor.is_floating_point() and not tensor.sum(dtype=torch.float32).isfinite():
            raise UserError(
                f"The weights in {where} cannot be used: {name!r} holds NaN or infinity. Its "
                "training has diverged, or the file is damaged."
            )
