"""Weights of 8 bits for generation on a CPU, where reading the weights is most of the work."""

import torch
from torch import nn
from transformers import PreTrainedModel


class Int8Linear(nn.Module):
    """A linear layer with int8 weights, one scale for each output, by torch's quantized kernels.

    The input is rounded to 8 bits too, with one scale for all that is given at a time: a row's
    result depends a little on the other rows.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        scales = weight.abs().amax(dim=1).clamp(min=1e-12).double() / 127
        zeros = torch.zeros_like(scales, dtype=torch.long)
        rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(rounded, linear.bias)
        # Sums of two products overflow 16 bits on a CPU that has no instruction for them (VNNI).
        self.seven_bits = not torch.cpu.get_capabilities().get("avx512_vnni", True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.quantized.linear_dynamic(x, self.packed, self.seven_bits)


def quantize_model(model: PreTrainedModel) -> PreTrainedModel:
    """Replace every linear layer of a model, its head included, by one with int8 weights.

    Changes the model in place and returns it, for use and not for training or saving. Embeddings
    and norms stay as they are.

    Raises:
        ValueError: the model is not in float32 on the CPU.
    """
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise ValueError(
            f"int8 weights are for a float32 model on the CPU, and this one is {model.dtype} on "
            f"{model.device}: load it there first."
        )
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child))
    return model.eval()
