"""ONNX, the file that onnxruntime runs without PyTorch: a step of generation, its cache in and out.

transformers' own exporter traces and translates; ours are the step, and the run that compares the
file with the model before it is there. The graph takes `input_ids` (B, T), `attention_mask` (B,
S + T) and `past_key_values.N.key` and `.value` (B, G, S, D), and gives `logits` (B, T, V) and
`present.N.key` and `.value` (B, G, S + T, D). B, T and S are free, and S may be 0.
"""

import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from ..checkpoint.folder import check_writable, staged_folder
from ..errors import UserError
from ..modeling_nanogpt import NanoGPTForCausalLM
from .one_file import check_free, check_new_file, load_own

ONE_FILE_BYTES = int(1.5 * 2**30)  # a protobuf ends at 2 GiB; larger weights go beside it
TOLERANCE = 1e-3  # of the largest logit: rounding stays below it, a fault does not
Past = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class OnnxFile:
    """The file written, and the largest difference of its logits in onnxruntime from the model's.

    `data` is the file of the weights that lies beside it where they are too large for one.
    """

    path: Path
    data: Path | None
    num_bytes: int
    largest_difference: float


def export_onnx(checkpoint: str | Path, destination: str | Path) -> OnnxFile:
    """Write one of our checkpoints in float32 as one file for onnxruntime, of any family.

    Its metadata hold `tokenizer.json`, and `eos_token_id` and `max_position_embeddings` as JSON.
    What is written is run first, on padded prompts and then with their cache.

    Args:
        checkpoint: a folder or Hub id of ours.
        destination: a path that ends in `.onnx` and does not exist; its folder is made.

    Raises:
        UserError: the frequencies of RoPE depend on the text's length, the tokenizer has no
            `tokenizer.json`, onnxruntime gives other logits, packages are missing, or the
            destination cannot be written.
    """
    destination = check_new_file(destination, ".onnx")
    data = destination.with_name(destination.name + ".data")
    check_free(data)
    check_writable(destination, name="destination")
    try:
        import onnx  # noqa: F401 (the exporter wants it)
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError("ONNX needs three packages: pip install 'hf-nanogpt[onnx]'.") from error

    model, tokenizer = load_own(checkpoint)
    metadata = _describe(model, tokenizer)
    step = _Step(model.float())
    program = _trace(step)
    program.metadata_props.update(metadata)
    try:
        with staged_folder(destination.parent) as staged:
            difference = _write(program, staged / destination.name, step)
    except OSError as error:
        raise UserError(
            f"destination={destination} could not be written, and nothing was left of it: {error}."
        ) from error
    files = [path for path in (destination, data) if path.exists()]
    num_bytes = sum(path.stat().st_size for path in files)
    return OnnxFile(destination, data if data in files else None, num_bytes, difference)


def _describe(model: NanoGPTForCausalLM, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the metadata of the file, or raise a `UserError` for what has no place in it."""
    config: Any = model.config
    kind = (config.rope_parameters or {}).get("rope_type")
    if kind in ("dynamic", "longrope"):
        raise UserError(
            f"ONNX: rope_parameters has rope_type={kind!r}, whose frequencies depend on the text's "
            "length, and a graph has none but fixed ones."
        )
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"ONNX: {type(tokenizer).__name__} has no tokenizer.json to be written.")
    return {
        "tokenizer.json": tokenizer.backend_tokenizer.to_str(),
        "eos_token_id": json.dumps(model.generation_config.eos_token_id),
        "max_position_embeddings": json.dumps(config.max_position_embeddings),
    }


class _Step(nn.Module):
    """The model with its cache as plain tensors, and positions counted from the mask."""

    def __init__(self, model: NanoGPTForCausalLM):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past_key_values: Past
    ) -> dict[str, Any]:
        # Without the configuration all layers keep all positions; the mask does the sliding.
        cache = DynamicCache([(layer["key"], layer["value"]) for layer in past_key_values.values()])
        positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        output = self.model(input_ids, attention_mask, positions, cache, use_cache=True)
        present = {
            str(n): {"key": layer.keys, "value": layer.values}
            for n, layer in enumerate(cache.layers)
        }
        return {"logits": output.logits, "present": present}


def _make_past(config: Any, *, rows: int, length: int) -> Past:
    shape = (rows, config.num_key_value_heads, length, config.head_dim)
    return {
        str(n): {name: torch.zeros(shape) for name in ("key", "value")}
        for n in range(config.num_hidden_layers)
    }


def _trace(step: _Step) -> Any:
    """Return the graph (an `onnx_ir.Model`) without the stack traces of this machine."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    # Sizes of 0 and 1 would be taken as fixed.
    rows, new, seen = 2, 2, 3
    past, free = _make_past(step.model.config, rows=rows, length=seen), torch.export.Dim.DYNAMIC
    inputs = {
        "input_ids": torch.zeros(rows, new, dtype=torch.long),
        "attention_mask": torch.ones(rows, seen + new, dtype=torch.long),
        "past_key_values": past,
    }
    shapes: dict[str, Any] = {name: {0: free, 1: free} for name in inputs}
    shapes["past_key_values"] = {n: {x: {0: free, 2: free} for x in past[n]} for n in past}
    with _quiet():
        exported = OnnxExporter().export(step, inputs, config=OnnxConfig(dynamic_shapes=shapes))
        # Older releases of transformers return torch's program, which has the graph inside.
        old = isinstance(exported, torch.onnx.ONNXProgram)
        graph = exported.model if old else exported.program
        ClearMetadataAndDocStringPass()(graph)
    return graph


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to themselves what exporters print and warn of, none of which a user can act on."""
    torchs, verbosity = logging.getLogger("torch.onnx"), transformers_logging.get_verbosity()
    level = torchs.level
    try:
        torchs.setLevel(logging.ERROR)
        transformers_logging.set_verbosity_error()
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torchs.setLevel(level)
        transformers_logging.set_verbosity(verbosity)


def _write(program: Any, path: Path, step: _Step) -> float:
    """Write the file and return the largest difference, or raise where it is more than rounding."""
    import onnx_ir

    size = sum(value.const_value.nbytes for value in program.graph.initializers.values())
    beside = f"{path.name}.data" if size > ONE_FILE_BYTES else None
    onnx_ir.save(program, path, external_data=beside)
    difference, largest = _compare(step, path)
    if not difference <= TOLERANCE * largest:  # nor is it where one is not a number
        raise UserError(
            f"ONNX: the logits of onnxruntime are {difference:.2g} away from the model's, which "
            f"reach {largest:.2g}, so nothing was written: try other versions of hf-nanogpt[onnx]."
        )
    return difference


@torch.no_grad()
def _compare(step: _Step, path: Path) -> tuple[float, float]:
    """Return the largest difference of the logits from the model's, and its largest logit."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    config: Any = step.model.config
    length = max(1, min(12, config.max_position_embeddings - 1))
    seed = torch.Generator().manual_seed(0)
    text = torch.randint(config.vocab_size, (2, length + 1), generator=seed)
    mask = torch.ones_like(text)
    mask[0, : length // 2] = 0  # a shorter prompt, padded on the left
    past, difference, largest = _make_past(config, rows=2, length=0), 0.0, 0.0
    feed = _flatten(past)
    for start, end in ((0, length), (length, length + 1)):
        feed |= {"input_ids": text[:, start:end].numpy(), "attention_mask": mask[:, :end].numpy()}
        theirs = dict(zip(names, session.run(names, feed), strict=True))
        feed = {name.replace("present", "past_key_values"): x for name, x in theirs.items()}
        own = step(text[:, start:end], mask[:, :end], past)
        past, real = own["present"], mask[:, start:end].bool()
        logits = own["logits"][real]
        off = (torch.from_numpy(feed.pop("logits"))[real] - logits).abs().max().item()
        difference, largest = max(difference, off), max(largest, logits.abs().max().item())
    return difference, largest


def _flatten(past: Past) -> dict[str, Any]:
    return {
        f"past_key_values.{n}.{name}": tensor.numpy()
        for n, layer in past.items()
        for name, tensor in layer.items()
    }
