"""Read a checkpoint that somebody else may have written: its configuration, tokenizer and model.

No code in the folder is run: with `trust_remote_code=False` transformers neither runs it nor asks
on the terminal whether it may. Each file is checked before transformers reads it, so that an error
names the file and no size in it can fill the memory.
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
from transformers.utils import logging

from .. import auto  # noqa: F401 (importing it registers the Auto classes)
from ..configuration_nanogpt import NanoGPTConfig
from ..errors import UserError, explain_errors
from ..untrusted import check_links, read_json
from .weights import open_weights

logger = logging.get_logger(__name__)

CONFIG = "config.json"
_GENERATION = "generation_config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of them has the vocabulary
_TOKENIZER_JSON = (
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
# The largest whole numbers in a configuration, by name: real models stay far below.
_LIMITS = (("layer|attention_types", 1024), ("head|expert", 2**16), ("", 2**31 - 1))
# How many parameters may be described for each stored value (quantized weights are packed), and
# how many always.
_PACKED, _SMALL = 8, 2**24
_MOST_SEQUENCES = 64  # of beams or answers for one prompt


# The configuration


def read_config(folder: Path) -> PreTrainedConfig:
    """Return the configuration in a folder.

    Raises:
        UserError: `config.json` is missing or damaged, has a value of the wrong type or a size
            that no real model has, or needs code.
    """
    path = folder / CONFIG
    fields = read_json(path)
    check_fields(fields, path)
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        code = " Code in a checkpoint is never run." if "auto_map" in fields else ""
        raise UserError(f"{path} has the unknown model_type={model_type!r:.80}.{code}")
    with explain_errors(f"{path} is not a valid configuration of a {model_type} model"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def check_fields(fields: dict[str, Any], path: Path) -> None:
    """Refuse what transformers does not check: enormous sizes, and kernels from the Hub.

    Raises:
        UserError: names the field and the file.
    """
    for name, value in _flatten(fields):
        limit = next(most for names, most in _LIMITS if re.search(names, name))
        is_size = isinstance(value, int) and "theta" not in name  # RoPE's may be larger
        if is_size and abs(value) > limit:
            raise UserError(f"{path} has {name}={value:,}, but at most {limit:,} is allowed.")
        if isinstance(value, str) and "/" in value and re.search("implementation|kernel", name):
            raise UserError(
                f"{path} has {name}={value!r:.80}, which names compiled code to download. Nothing "
                "was downloaded: remove that line."
            )


def _flatten(fields: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the values in nested objects and lists, each with the nearest name above it."""
    stack: list[tuple[str, Any]] = list(fields.items())
    while stack:
        name, value = stack.pop()
        if isinstance(value, dict):
            stack += [(key or name, inner) for key, inner in value.items()]
        elif isinstance(value, list):
            stack += [(name, inner) for inner in value]
        else:
            yield name, value


def check_generation_config(folder: Path) -> None:
    """Refuse a `generation_config.json` with a value of the wrong type, or too many beams."""
    path = folder / _GENERATION
    if not path.is_file():
        return
    fields, defaults = read_json(path), GenerationConfig._get_default_generation_params()
    for name, value in fields.items():
        if value is not None and not _has_right_type(name, value, defaults.get(name)):
            raise UserError(f"{path} has {name}={value!r:.80}, which has the wrong type.")
        if re.search("num_beam|num_return", name) and _is_number(value) and value > _MOST_SEQUENCES:
            raise UserError(f"{path} has {name}={value:,}: at most {_MOST_SEQUENCES} are allowed.")
    with explain_errors(f"{path} is not valid"):
        GenerationConfig.from_dict(fields)


def _has_right_type(name: str, value: Any, default: object) -> bool:
    if isinstance(default, bool):
        return isinstance(value, bool) or (name, value) == ("early_stopping", "never")
    if isinstance(default, int | float):
        return _is_number(value) and math.isfinite(value)
    if name.endswith("_token_id"):
        ids = value if isinstance(value, list) else [value]
        return all(isinstance(i, int) and _is_number(i) and 0 <= i < 2**31 for i in ids)
    return True


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# The tokenizer


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a folder.

    Raises:
        UserError: one of its files is missing or damaged, or it needs code.
    """
    check_links(folder)
    for name in _TOKENIZER_JSON:
        if (folder / name).is_file():
            read_json(folder / name)
    if (folder / CONFIG).is_file():  # it names the class if tokenizer_config.json does not
        check_fields(read_json(folder / CONFIG), folder / CONFIG)
    files = [name for name in (*_TOKENIZER_JSON, "tokenizer.model") if (folder / name).is_file()]
    with explain_errors(f"The tokenizer in {folder} ({', '.join(files)}) cannot be loaded"):
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        except ValueError as error:
            if "trust_remote_code" not in str(error):  # transformers would advise to set it
                raise
            raise UserError("it needs code from the checkpoint, which is never run") from error
    for key in ("is_local", "local_files_only"):  # they describe this call, and would be saved
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


# The model


def read_model(folder: Path) -> PreTrainedModel:
    """Return the model in a folder, from safetensors only.

    Raises:
        UserError: a file is missing or damaged, the weights do not match the configuration, or
            they have NaN or infinity.
    """
    config = read_config(folder)
    check_generation_config(folder)
    if (folder / "adapter_config.json").is_file():  # transformers would load it, with PEFT
        raise UserError(
            f"{folder} has a model and an adapter_config.json: move the adapter elsewhere, or load "
            "both with PEFT."
        )
    _check_shapes(folder, config)
    with explain_errors(f"{folder} cannot be loaded"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
        model, report = loaded  # a pair, because of output_loading_info
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{folder} is not complete: it has no {', '.join(missing[:3])}.")
    if isinstance(config, NanoGPTConfig) and (unknown := sorted(report["unexpected_keys"])):
        raise UserError(
            f"{folder} has {', '.join(unknown[:3])}, which its {CONFIG} does not describe: they do "
            "not belong together."
        )
    check_finite(model.named_parameters(), folder)
    _warn_of_unknown_tokens(model, folder)
    return model


def _warn_of_unknown_tokens(model: PreTrainedModel, folder: Path) -> None:
    """Warn of special tokens outside the vocabulary; transformers does so for some in CONFIG."""
    size, settings = model.get_input_embeddings().num_embeddings, model.generation_config
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        found = getattr(settings, name, None)
        ids = found if isinstance(found, list) else [found]
        if any(i is not None and not 0 <= i < size for i in ids):
            logger.warning(
                f"{folder} has {name}={found}, but the model has {size} tokens: "
                f"such a token never comes. Correct it in {_GENERATION}."
            )


def make_skeleton(config: PreTrainedConfig, where: Path) -> PreTrainedModel:
    """Build the model that a configuration describes, with tensors that take no memory."""
    with explain_errors(f"{where} describes a model that cannot be built"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _check_shapes(folder: Path, config: PreTrainedConfig) -> None:
    """Compare the configuration with the weights before either takes memory."""
    found, model = open_weights(folder), make_skeleton(config, folder / CONFIG)
    stored = sum(math.prod(tensor.shape) for tensor in found.values())
    if (needed := model.num_parameters()) > _PACKED * stored + _SMALL:
        raise UserError(
            f"{folder / CONFIG} describes {needed:,} parameters, but the weights there have "
            f"{stored:,}: they do not belong together."
        )
    if getattr(config, "quantization_config", None) is not None:
        return
    for name, tensor in model.state_dict().items():
        if name in found and found[name].shape != tuple(tensor.shape):
            raise UserError(
                f"{folder} has the weight {name!r} of shape {found[name].shape}, but its "
                f"{CONFIG} describes {tuple(tensor.shape)}: they do not belong together."
            )
        if name in found and not found[name].is_float:
            raise UserError(
                f"{folder} has the weight {name!r} in whole numbers, as if quantized, but its "
                f"{CONFIG} does not say how: give the checkpoint that it was made from."
            )


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], where: Path) -> None:
    """Raise a `UserError` for the first tensor with NaN or infinity in it."""
    for name, tensor in tensors:
        # A bad value makes the sum bad: ten times as fast as a look at each value.
        if tensor.is_floating_point() and not tensor.sum(dtype=torch.float32).isfinite():
            raise UserError(
                f"The weights in {where} cannot be used: {name!r} has NaN or infinity. Either "
                "the training diverged, or the file is damaged."
            )
