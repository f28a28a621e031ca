"""ONNX, the file that onnxruntime runs without PyTorch: one step of generation with its cache.

transformers' exporter traces and translates. Ours are the step, and a comparison of the file with
the model before the file is put in place. The graph takes `input_ids` (B, T), `attention_mask`
(B, S + T) and `past_key_values.N.key` and `.value` (B, G, S, D). It returns `logits` (B, T, V) and
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

from ..errors import UserError
from ..generation import find_ends
from ..modeling_nanogpt import NanoGPTForCausalLM
from .folders import check_new_file, load_our_model, written_folder

ONE_FILE_BYTES = int(1.5 * 2**30)  # protobuf allows 2 GiB; larger weights get a file of their own
TOLERANCE = 1e-3  # of the largest logit: rounding stays below it, a fault does not
Past = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class OnnxFile:
    """The file written, and how far its logits in onnxruntime are from the model's at most.

    `data` is a second file with the weights, where they are too large for one.
    """

    path: Path
    data: Path | None
    num_bytes: int
    largest_difference: float


def export_onnx(checkpoint: str | Path, destination: str | Path) -> OnnxFile:
    """Write one of our checkpoints in float32 as a file for onnxruntime.

    Its metadata hold `tokenizer.json`, and `eos_token_id` and `max_position_embeddings` as JSON.
    Before the file is put in place, it is run on padded prompts and then with their cache.

    Args:
        checkpoint: a folder or Hub id of ours.
        destination: a path that ends in `.onnx` and does not exist; its folder is made.

    Raises:
        UserError: the frequencies of RoPE depend on the text's length, the tokenizer has no
            `tokenizer.json`, onnxruntime gives other logits, packages are missing, or the
            destination cannot be written.
    """
    destination = check_new_file(destination, ".onnx", ".data")
    data = destination.with_name(destination.name + ".data")
    try:
        import onnx  # noqa: F401 (the exporter imports it)
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError("ONNX needs three packages: pip install 'hf-nanogpt[onnx]'.") from error

    model, tokenizer = load_our_model(checkpoint)
    metadata = _describe(model, tokenizer)
    step = _Step(model.float())
    program = _trace(step)
    program.metadata_props.update(metadata)
    with written_folder(destination.parent, file=destination) as staged:
        difference = _write(program, staged / destination.name, step)
    files = [path for path in (destination, data) if path.exists()]
    num_bytes = sum(path.stat().st_size for path in files)
    return OnnxFile(destination, data if data in files else None, num_bytes, difference)


def _describe(model: NanoGPTForCausalLM, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the metadata of the file; refuse a model that a graph cannot express."""
    config: Any = model.config
    rope_type = (config.rope_parameters or {}).get("rope_type")
    if rope_type in ("dynamic", "longrope"):
        raise UserError(
            f"ONNX: the frequencies of rope_type={rope_type!r} depend on the text's length, but in "
            "a graph they are fixed."
        )
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"ONNX: {type(tokenizer).__name__} has no tokenizer.json to write.")
    return {
        "tokenizer.json": tokenizer.backend_tokenizer.to_str(),
        "eos_token_id": json.dumps(find_ends(model, tokenizer)),
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
        # Without a configuration all layers keep all positions; the mask limits sliding windows.
        cache: Any = DynamicCache(
            [(layer["key"], layer["value"]) for layer in past_key_values.values()]
        )
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

    rows, new, seen = 2, 2, 3  # the tracer would take sizes of 0 and 1 as fixed
    past, free = _make_past(step.model.config, rows=rows, length=seen), torch.export.Dim.DYNAMIC
    inputs = {
        "input_ids": torch.zeros(rows, new, dtype=torch.long),
        "attention_mask": torch.ones(rows, seen + new, dtype=torch.long),
        "past_key_values": past,
    }
    shapes: dict[str, Any] = {name: {0: free, 1: free} for name in inputs}
    shapes["past_key_values"] = {n: {x: {0: free, 2: free} for x in past[n]} for n in past}
    with _quiet():
        exporter: Any = OnnxExporter()  # annotated for a PreTrainedModel and no nested inputs
        exported = exporter.export(step, inputs, config=OnnxConfig(dynamic_shapes=shapes))
        # Older releases of transformers return torch's program, which has the graph inside.
        old = isinstance(exported, torch.onnx.ONNXProgram)
        graph = exported.model if old else exported.program
        ClearMetadataAndDocStringPass()(graph)
    return graph


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporters' messages and warnings: a user can act on none of them."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _write(program: Any, path: Path, step: _Step) -> float:
    """Write the file and return the largest difference; raise if it is more than rounding."""
    import onnx_ir

    size = sum(value.const_value.nbytes for value in program.graph.initializers.values())
    onnx_ir.save(
        program, path, external_data=f"{path.name}.data" if size > ONE_FILE_BYTES else None
    )
    difference, largest = _compare(step, path)
    if not difference <= TOLERANCE * largest:  # also where one of them is NaN
        raise UserError(
            f"ONNX: the logits of onnxruntime differ from the model's by {difference:.2g}, and the "
            f"largest is {largest:.2g}, so nothing was written: try other versions of the packages "
            "in hf-nanogpt[onnx]."
        )
    return difference


@torch.no_grad()
def _compare(step: _Step, path: Path) -> tuple[float, float]:
    """Return the largest difference of the file's logits from the model's, and their largest."""
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
    feed = {
        f"past_key_values.{n}.{name}": tensor.numpy()
        for n, layer in past.items()
        for name, tensor in layer.items()
    }
    # The prompts, then one more token after their cache; each side continues from its own cache.
    for start, end in ((0, length), (length, length + 1)):
        feed |= {"input_ids": text[:, start:end].numpy(), "attention_mask": mask[:, :end].numpy()}
        outputs = dict(zip(names, session.run(names, feed), strict=True))
        feed = {name.replace("present", "past_key_values"): x for name, x in outputs.items()}
        expected = step(text[:, start:end], mask[:, :end], past)
        past, real = expected["present"], mask[:, start:end].bool()
        logits = expected["logits"][real]
        gap = (torch.from_numpy(feed.pop("logits"))[real] - logits).abs().max().item()
        difference, largest = max(difference, gap), max(largest, logits.abs().max().item())
    return difference, largest
