"""Models made from the tensors of other models: built without memory, then filled one by one."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from ..checkpoint.foreign import check_fields, check_finite
from ..checkpoint.weights import LazyTensor, check_tensors, open_weights
from ..configuration_nanogpt import NanoGPTConfig
from ..errors import UserError, explain_errors
from ..modeling_nanogpt import NanoGPTForCausalLM
from ..untrusted import read_json
from . import nanogpt
from .rules import Format, Rows, their_shapes, translate

_CONFIG = "config.json"
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Weights = Mapping[str, LazyTensor]


def read_native_model(native: Format, folder: Path) -> PreTrainedModel:
    """Read a folder of one of transformers' classes into a model of ours."""
    theirs = _read_config(CONFIG_MAPPING[native.model_type], folder)
    with explain_errors(f"{folder / _CONFIG} cannot be expressed by ours"):
        config = NanoGPTConfig(**native.read_config(theirs.to_dict()))
    weights: Weights = _clean(open_weights(folder), native)
    if newer := [name for name in weights if re.search(native.newer, name)]:
        raise UserError(
            f"{folder} holds {newer[0]!r}: this is a newer {native.model_type}, with parts that "
            "NanoGPTConfig cannot express. Only the form that transformers has can be converted."
        )
    weights = _untie(weights, native.embedding, theirs, folder)
    check_tensors(weights, _shapes(_skeleton(_native_class(native), theirs, folder)), where=folder)
    return _fill(
        _skeleton(NanoGPTForCausalLM, config, folder),
        native.rows,
        weights,
        config,
        where=folder,
    )


def read_nanogpt_model(config: NanoGPTConfig, weights: Weights, path: Path) -> PreTrainedModel:
    """Turn what `nanogpt.read_checkpoint` found into a model of ours."""
    model = _skeleton(NanoGPTForCausalLM, config, path)
    expected = their_shapes(nanogpt.ROWS, _shapes(model), config=config)
    if not config.mlp_bias:  # then its layer norms have none either
        expected = {name: shape for name, shape in expected.items() if name.endswith(".weight")}
    weights = _untie(weights, "transformer.wte.weight", config, path)
    check_tensors(weights, expected, where=path)
    return _fill(model, nanogpt.ROWS, weights, config, where=path)


def make_native_model(
    native: Format, theirs: PreTrainedConfig, config: NanoGPTConfig, folder: Path
) -> PreTrainedModel:
    """Read a folder of ours into a model of one of transformers' classes."""
    weights = _untie(open_weights(folder), _EMBEDDING, config, folder)
    check_tensors(weights, _shapes(_skeleton(NanoGPTForCausalLM, config, folder)), where=folder)
    model = _skeleton(_native_class(native), theirs, folder)
    return _fill(model, native.rows, weights, config, where=folder, to_ours=False)


def read_our_config(folder: Path) -> NanoGPTConfig:
    """Return the configuration of a folder of ours, or raise a `UserError`."""
    kind = read_json(path := folder / _CONFIG).get("model_type")
    if kind != NanoGPTConfig.model_type:
        raise UserError(
            f"{path} is that of a {kind!s:.80} model, and only ours "
            f"({NanoGPTConfig.model_type}) are exported: convert it first."
        )
    return _read_config(NanoGPTConfig, folder)


def _read_config(config_class: type[PreTrainedConfig], folder: Path) -> PreTrainedConfig:
    path = folder / _CONFIG
    fields = read_json(path) | {"model_type": config_class.model_type}
    check_fields(fields, path)
    if fields.get("quantization_config") is not None:
        raise UserError(f"{folder} is quantized: take the model that it was made from.")
    with explain_errors(f"{path} is no {config_class.__name__}"):
        return config_class.from_dict(fields)


def _native_class(native: Format) -> type[PreTrainedModel]:
    return getattr(transformers, native.architecture)


def _skeleton(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, where: Path
) -> PreTrainedModel:
    """Build a model whose tensors have shapes and no memory."""
    with (
        explain_errors(f"{where}: its configuration (config.json) cannot be built"),
        torch.device("meta"),
    ):
        return model_class(config)


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Return the tensors that a file of this model holds: a tied head is not among them."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del shapes[_HEAD]
    return shapes


def _clean(weights: Weights, native: Format) -> dict[str, LazyTensor]:
    """Give each tensor its full name, which files of the base model shorten; drop the buffers."""
    base = native.embedding.split(".")[0] + "."
    if not any(name.startswith(base) for name in weights):
        weights = {name if name == _HEAD else base + name: t for name, t in weights.items()}
    return {name: t for name, t in weights.items() if not re.fullmatch(native.ignored, name)}


def _untie(weights: Weights, embedding: str, config: PreTrainedConfig, where: Path) -> Weights:
    """Drop a head that is tied to the embeddings, and stored all the same."""
    if not config.tie_word_embeddings or not {_HEAD, embedding} <= weights.keys():
        return weights
    if not weights[_HEAD].read().equal(weights[embedding].read()):
        raise UserError(
            f"{where} says tie_word_embeddings=True, but {_HEAD!r} differs from {embedding!r}: "
            "set it to False in config.json."
        )
    return {name: tensor for name, tensor in weights.items() if name != _HEAD}


def _fill(
    model: PreTrainedModel,
    rows: Rows,
    weights: Weights,
    config: NanoGPTConfig,
    *,
    where: Path,
    to_ours: bool = True,
) -> PreTrainedModel:
    """Replace the tensors of a skeleton by those that the table makes of `weights`."""
    target = _shapes(model)
    tensors = dict(translate(rows, weights, target, config=config, to_ours=to_ours))
    assert {name: tuple(t.shape) for name, t in tensors.items()} == target
    check_finite(tensors.items(), where)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    return model
