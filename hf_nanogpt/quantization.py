"""Weights of 8 bits for generation on a CPU, where reading the weights is most of the work."""

from functools import cache

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .errors import UserError


class Int8Linear(nn.Module):
    """A linear layer with int8 weights, one scale for each output.

    The input is rounded to 8 bits too, with one scale for each row, so that whole numbers are
    multiplied: LLM.int8() (arXiv:2208.07339), section 2.2, "vector-wise", without its outliers.
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
            rows = torch.cat((rows, rows))  # torch 2.13 compiles the product of one row wrongly
        product = torch._int_mm(rows, self.weight.t())[:count].unflatten(0, x.shape[:-1])
        y = (product * scale).mul_(self.scale)
        return y if self.bias is None else y.add_(self.bias)


def _find_scale(rows: torch.Tensor) -> torch.Tensor:
    """Return what 1 stands for in 8 bits, by row; a row of zeros stays one."""
    return rows.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-12).div_(127)


@cache
def multiplies_exactly() -> bool:
    """Say whether products of 8-bit numbers are right here.

    Without AVX512-VNNI oneDNN adds pairs of products in 16 bits, which cannot hold them, and says
    nothing.
    """
    largest = torch.full((2, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(largest, largest.t()) == 64 * 127 * 127).all())


def quantize_model(model: PreTrainedModel) -> PreTrainedModel:
    """Replace every linear layer of a model, its head included, by one with int8 weights.

    Changes the model in place and returns it, for use and not for training or saving. Embeddings
    and norms stay as they are.

    Trained weights lose quality by this: on those of SmolLM2-135M the most likely token stays the
    same at 86 % of the positions, and the KL divergence from float32 is 0.051. llama.cpp's q8_0 has
    97 % and 0.0013, see `export_gguf`. Measure your own model by `hf-nanogpt eval --quantize int8`.

    Raises:
        UserError: the model is not in float32 on the CPU, or has layers of another kind, as
            transformers' own GPT-2; or this processor multiplies 8-bit numbers wrongly.
    """
    if any(isinstance(module, Conv1D) for module in model.modules()):
        raise UserError(
            f"int8 weights are for linear layers, and {type(model).__name__} has Conv1D instead: "
            "make it ours first by hf-nanogpt convert."
        )
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise UserError(
            f"int8 weights are for a float32 model on the CPU, and this one is {model.dtype} on "
            f"{model.device}: load it there first."
        )
    if not multiplies_exactly():
        raise UserError(
            "int8 weights are not possible on this processor: torch multiplies large 8-bit numbers "
            "wrongly on it, as it lacks AVX512-VNNI. Use float32, or export the model to GGUF with "
            "--dtype q8_0 for llama.cpp."
        )
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child))
    model.config.tie_word_embeddings = False  # else `tie_weights` gives the head its floats back
    return model.eval()
