"""Faster norms and rotary positions for CPUs, equal to the plain forms but for rounding.

On a CPU each small operation reads and writes the whole tensor, and autograd keeps every
intermediate result. The functions here pass over memory less often and keep only their inputs.
"""

import torch
from torch import nn

from .modeling_nanogpt import NanoGPTAttention, NanoGPTRMSNorm, apply_rotary_pos_emb


def use_cpu_kernels(model: nn.Module) -> None:
    """Replace the weighted RMS norms and the rotation inside a model by faster ones, in place.

    Parameters, state-dict keys, saved files and copies of the model stay as they are. The faster
    forms apply to float32 on a CPU without torch.compile; elsewhere the plain forms run. Models
    wrapped by PEFT are fine, and a second call changes nothing.
    """
    for parent in list(model.modules()):
        if isinstance(parent, NanoGPTAttention):
            parent.apply_rotary_pos_emb = apply_rotary_pos_emb_on_cpu
        for name, child in list(parent.named_children()):
            if type(child) is NanoGPTRMSNorm and child.weight is not None:
                setattr(parent, name, CPURMSNorm(child))


def _runs_eagerly(x: torch.Tensor) -> bool:
    """Return whether nothing will fuse the operations of a plain form."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()


def _inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    if torch.is_grad_enabled():
        # Somebody differentiates the gradient. The derivative of `vector_norm` is wrong at 0.
        return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # reads x once, writes no squares
    return norm.square().div_(x.shape[-1]).add_(eps).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    """y = w * s * x with s = (mean(x^2) + eps)^(-1/2), over a last dimension of D.

    `backward` is made of differentiable operations on the inputs, so that second derivatives are
    right too; `setup_context` and the vmap rule serve `torch.func`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, eps):
        return (x * _inverse_rms(x, eps)).mul_(weight)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, ctx.eps = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        size = weight.numel()
        scale = _inverse_rms(x, ctx.eps)
        # dL/dw = sum over rows of s * g * x, and
        # dL/dx = s * g * w - x * s^3 / D * sum(g * x * w).
        product = (grad * x).reshape(-1, size)
        grad_weight = scale.reshape(-1) @ product
        along_x = (product @ weight).view_as(scale) * scale.pow(3) / size
        grad_x = (grad * weight).mul_(scale).addcmul_(x, along_x, value=-1)
        return grad_x, grad_weight, None


class CPURMSNorm(NanoGPTRMSNorm):
    """A weighted `NanoGPTRMSNorm` in another form; it takes over all that the norm has."""

    weight: nn.Parameter

    def __init__(self, norm: NanoGPTRMSNorm):
        nn.Module.__init__(self)
        vars(self).update(vars(norm))  # the parameter, the hooks and the mode

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not _runs_eagerly(hidden_states) or self.weight.dtype != torch.float32:
            return super().forward(hidden_states)
        # Calling an autograd function costs more than the arithmetic of a single token.
        norm = _RMSNorm.apply if torch.is_grad_enabled() else _RMSNorm.forward
        return norm(hidden_states, self.weight, self.variance_epsilon)


class _Rotation(torch.autograd.Function):
    """Rotate x by the angles of cos and sin; the gradient is rotated back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, cos, sin):
        half = x.shape[-1] // 2
        rotated = x * cos
        rotated[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        rotated[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return rotated

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, cos, sin = inputs
        ctx.save_for_backward(cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _Rotation.apply(grad, cos, -sin), None, None


def apply_rotary_pos_emb_on_cpu(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate as `apply_rotary_pos_emb` does; cos and sin are constants here."""
    if not _runs_eagerly(q) or cos.requires_grad or sin.requires_grad:
        return apply_rotary_pos_emb(q, k, cos, sin)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotate = _Rotation.apply if torch.is_grad_enabled() else _Rotation.forward
    return rotate(q, cos, sin), rotate(k, cos, sin)
