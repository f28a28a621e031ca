"""8-bit weights for generation on a CPU, where most of the time goes into reading the weights."""

from copy import deepcopy
from functools import cache

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .errors import UserError


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and one scale for each output.

    The input is rounded to 8 bits, too, with one scale for each row, so that the product is one of
    whole numbers: LLM.int8() (arXiv:2208.07339), section 2.2, "vector-wise", without its outliers.
    """

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        scale = _find_scale(weight)  # (out, 1)
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.squeeze(1))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = _find_scale(x)
        rows = (x / scale).round_().to(torch.int8).flatten(0, -2)
        count = len(rows)
        if count == 1 and torch.compiler.is_compiling():
            rows = torch.cat((rows, rows))  # torch 2.13 compiles the product of a single row wrong
        product = torch._int_mm(rows, self.weight.t())[:count].unflatten(0, x.shape[:-1])
        y = (product * scale).mul_(self.scale)
        return y if self.bias is None else y.add_(self.bias)


def _find_scale(rows: torch.Tensor) -> torch.Tensor:
    """Return the value of one step of 8 bits in each row; a row of zeros stays zero."""
    return rows.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-12).div_(127)


@cache
def multiplies_exactly() -> bool:
    """Return whether this processor multiplies 8-bit numbers correctly.

    Without AVX512-VNNI oneDNN adds pairs of products in 16 bits, which overflow silently.
    """
    largest = torch.full((2, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(largest, largest.t()) == 64 * 127 * 127).all())


def quantize_model(model: PreTrainedModel) -> PreTrainedModel:
    """Replace every linear layer of a model, including its head, by one with int8 weights.

    Changes the model in place and returns it, for inference only. Embeddings and norms stay as they
    are, and so does the configuration object, which other models may share.

    Trained weights lose quality: on SmolLM2-135M's the most likely token stays the same at 86 % of
    the positions, and the KL divergence from float32 is 0.051. llama.cpp's q8_0 has 97 % and
    0.0013, see `export_gguf`. Measure your own model with `hf-nanogpt eval --quantize int8`.

    Raises:
        UserError: the model is not in float32 on the CPU, it has Conv1D layers like transformers'
            own GPT-2, or this processor multiplies 8-bit numbers incorrectly.
    """
    if any(isinstance(module, Conv1D) for module in model.modules()):
        raise UserError(
            f"int8 weights are for linear layers, but {type(model).__name__} has Conv1D layers: "
            "run hf-nanogpt convert first."
        )
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise UserError(
            f"int8 weights are for a float32 model on the CPU, but this one is {model.dtype} on "
            f"{model.device}: load it as float32 on the CPU."
        )
    if not multiplies_exactly():
        raise UserError(
            "int8 weights do not work on this processor: it lacks AVX512-VNNI, and without that "
            "torch multiplies large 8-bit numbers incorrectly. Use float32, or export the model to "
            "GGUF with --dtype q8_0 for llama.cpp."
        )
    shared, config = model.config, deepcopy(model.config)
    config.tie_word_embeddings = False  # or `tie_weights` would restore floats
    for parent in list(model.modules()):
        if getattr(parent, "config", None) is shared:
            parent.config = config  # type: ignore[assignment]  # torch: modules and tensors only
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child))
    return model.eval()
