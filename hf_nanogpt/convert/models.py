"""Models made from the tensors of other models: built without memory, then filled one by one."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from ..checkpoint.foreign import check_fields, check_finite, make_skeleton
from ..checkpoint.weights import LazyTensor, check_tensors, open_weights
from ..configuration_nanogpt import NanoGPTConfig
from ..errors import UserError, explain_errors
from ..untrusted import read_json
from . import nanogpt
from .rules import Format, Step, expand, native_shapes, translate

_CONFIG = "config.json"
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Weights = Mapping[str, LazyTensor]
_Config = TypeVar("_Config", bound=PreTrainedConfig)


def import_native_model(native: Format, folder: Path) -> PreTrainedModel:
    """Read a folder of one of transformers' classes into a model of ours."""
    native_config = _read_config(CONFIG_MAPPING[native.model_type], folder)
    with explain_errors(f"{folder / _CONFIG} cannot be expressed by NanoGPTConfig"):
        config = NanoGPTConfig(**native.import_config(native_config.to_dict()))
    weights: Weights = _clean(open_weights(folder), native)
    if newer := [name for name in weights if re.search(native.newer, name)]:
        raise UserError(
            f"{folder} has the tensor {newer[0]!r} of a newer {native.model_type}, which "
            "NanoGPTConfig cannot express. Only the version in transformers can be converted."
        )
    weights = _untie(weights, native.embedding, native_config, folder)
    check_tensors(
        weights, _stored_shapes(make_skeleton(native_config, folder / _CONFIG)), where=folder
    )
    model = make_skeleton(config, folder / _CONFIG)
    return _fill(model, expand(native.rows, config), weights, where=folder)


def import_nanogpt_model(config: NanoGPTConfig, weights: Weights, path: Path) -> PreTrainedModel:
    """Turn what `nanogpt.read_checkpoint` found into a model of ours."""
    model = make_skeleton(config, path)
    expected = native_shapes(nanogpt.ROWS, _stored_shapes(model), config)
    if not config.mlp_bias:  # then nanoGPT's layer norms have no bias either, while ours do
        expected = {name: shape for name, shape in expected.items() if name.endswith(".weight")}
    weights = _untie(weights, "transformer.wte.weight", config, path)
    check_tensors(weights, expected, where=path)
    return _fill(model, expand(nanogpt.ROWS, config), weights, where=path)


def export_native_model(
    native: Format, native_config: PreTrainedConfig, config: NanoGPTConfig, folder: Path
) -> PreTrainedModel:
    """Read a folder of ours into a model of one of transformers' classes."""
    weights = _untie(open_weights(folder), _EMBEDDING, config, folder)
    check_tensors(weights, _stored_shapes(make_skeleton(config, folder / _CONFIG)), where=folder)
    model = make_skeleton(native_config, folder / _CONFIG)
    return _fill(model, expand(native.rows, config, exporting=True), weights, where=folder)


def read_our_config(folder: Path) -> NanoGPTConfig:
    """Return the configuration of a folder of ours, or raise a `UserError`."""
    model_type = read_json(path := folder / _CONFIG).get("model_type")
    if model_type != NanoGPTConfig.model_type:
        raise UserError(
            f"{path} belongs to a {model_type!s:.80} model, and only our own "
            f"({NanoGPTConfig.model_type}) can be exported: run hf-nanogpt convert first."
        )
    return _read_config(NanoGPTConfig, folder)


def _read_config(config_class: type[_Config], folder: Path) -> _Config:
    path = folder / _CONFIG
    fields = read_json(path) | {"model_type": config_class.model_type}
    check_fields(fields, path)
    if fields.get("quantization_config") is not None:
        raise UserError(f"{folder} is quantized: convert the model that it was made from.")
    with explain_errors(f"{path} is not a valid {config_class.__name__}"):
        return config_class.from_dict(fields)


def _stored_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Return the tensors that a file of this model holds, which leaves out a tied head."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del shapes[_HEAD]
    return shapes


def _clean(weights: Weights, native: Format) -> Weights:
    """Add the prefix that files of a base model leave out, and drop buffers."""
    base = native.embedding.split(".")[0] + "."
    if not any(name.startswith(base) for name in weights):
        weights = {name if name == _HEAD else base + name: t for name, t in weights.items()}
    return {name: t for name, t in weights.items() if not re.fullmatch(native.ignored, name)}


def _untie(weights: Weights, embedding: str, config: PreTrainedConfig, where: Path) -> Weights:
    """Drop a head that is stored although it is tied to the embeddings."""
    if not config.tie_word_embeddings or not {_HEAD, embedding} <= weights.keys():
        return weights
    if not weights[_HEAD].read().equal(weights[embedding].read()):
        raise UserError(
            f"{where} says tie_word_embeddings=True, but {_HEAD!r} differs from {embedding!r}: "
            "set it to False in config.json."
        )
    return {name: tensor for name, tensor in weights.items() if name != _HEAD}


def _fill(
    model: PreTrainedModel, steps: Iterable[Step], weights: Weights, *, where: Path
) -> PreTrainedModel:
    """Replace the tensors of a skeleton by those that the steps make of `weights`."""
    target = _stored_shapes(model)
    tensors = dict(translate(steps, weights, target))
    assert {name: tuple(t.shape) for name, t in tensors.items()} == target
    check_finite(tensors.items(), where)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    return model
