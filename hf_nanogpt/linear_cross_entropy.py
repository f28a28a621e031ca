"""The loss of a language model without all its logits, which can outweigh the model itself."""

from typing import Any, TypeGuard

import torch
from torch import nn

# How many logits the loss and the evaluation hold in memory at once: 256 MB in float32.
LOGITS_AT_ONCE = 2**26
# The loss holds so many times as many on a GPU, where larger products are faster.
GPU_FACTOR = 4


def linear_cross_entropy(
    hidden_states: torch.Tensor,
    head: nn.Module,
    labels: torch.Tensor | None,
    *,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """Return the loss in nats per token, computed in chunks of `LOGITS_AT_ONCE` logits.

    Loss and gradients equal those of all logits to rounding, for the loss of transformers
    (`ForCausalLMLoss`) and for the label smoothing of its Trainer. A head that is more than a
    matrix (an adapter, hooks) computes all its logits.

    torch 2.13 has a function of this name, which knows no soft cap and does not compile.

    Args:
        hidden_states: (B, T, C).
        head: the linear layer that makes logits of them.
        labels: (B, T), those of the input: the label at t + 1 belongs to the state at t.
        shift_labels: (B, T), those of the next tokens, in place of `labels`.
        num_items_in_batch: what the sum is divided by; by default the labels that count.

    Raises:
        ValueError: there are no labels.
    """
    if shift_labels is None:
        if labels is None:
            raise ValueError("labels=None: without logits there is only a loss, which needs them.")
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(hidden_states.device)
    states = hidden_states.reshape(-1, hidden_states.shape[-1])
    settings: dict[str, Any] = {"label_smoothing": label_smoothing, "ignore_index": ignore_index}
    if _is_matrix(head):
        weight: torch.Tensor = head.weight
        if not torch.is_grad_enabled():  # then compute no gradients
            states, weight = states.detach(), weight.detach()
        total = LinearCrossEntropy.apply(states, weight, targets, softcap, *settings.values())
    else:
        logits = _cap(head(states).float(), softcap)
        total = nn.functional.cross_entropy(logits, targets, reduction="sum", **settings)
    if num_items_in_batch is None:
        num_items_in_batch = (targets != ignore_index).sum()
    elif isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def _is_matrix(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Say whether a head does nothing but multiply: no adapter, quantization, hook or sharding."""
    if type(head) is not nn.Linear or head.bias is not None or "forward" in vars(head):
        return False
    return not (head._forward_hooks or head._forward_pre_hooks)


def _cap(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class LinearCrossEntropy(torch.autograd.Function):
    """The sum of the cross-entropies of a linear layer's outputs, which never exist all at once.

    The forward pass goes through the rows in chunks, and computes the gradients of each while its
    logits exist, so that nothing is computed twice. The backward pass only scales them.
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, labels, softcap, label_smoothing, ignore_index):
        device = hidden_states.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
        # Sums over many rows need float32, whatever the products are in.
        wide = torch.promote_types(dtype, torch.float32)
        by_states, by_weight = ctx.needs_input_grad[:2]
        grad_states = torch.empty_like(hidden_states) if by_states else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if by_weight else None
        loss = torch.zeros((), dtype=wide, device=hidden_states.device)
        at_once = LOGITS_AT_ONCE * (GPU_FACTOR if device == "cuda" else 1)
        matrix, rows = weight.to(dtype), max(1, at_once // weight.shape[0])
        for start in range(0, hidden_states.shape[0], rows):
            part = slice(start, start + rows)
            states = hidden_states[part].to(dtype)
            nats, error = _differentiate_cross_entropy(
                (states @ matrix.T).to(wide),  # (rows, V); no name keeps them in memory
                labels[part, None],
                softcap,
                label_smoothing,
                ignore_index,
            )
            loss = loss + nats
            error = error.to(dtype)
            if grad_states is not None:
                grad_states[part] = error @ matrix
            if grad_weight is not None:
                grad_weight += error.T @ states
        ctx.save_for_backward(grad_states, grad_weight)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad):
        # With `create_graph` only: the gradients below would be taken for constants.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("linear_cross_entropy has no second derivative.")
        by_states, by_weight = ctx.saved_tensors
        return (
            None if by_states is None else by_states * grad,
            None if by_weight is None else (by_weight * grad).to(ctx.dtype),
            *(None, None, None, None),
        )


def _differentiate_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    softcap: float | None,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of the cross-entropies, and its gradient by the logits (N, V) before the cap.

    `labels` is (N, 1). Smoothing gives a share of each label to all V tokens alike.
    """
    logits = _cap(logits, softcap)
    known = labels != ignore_index
    target = labels.where(known, 0)
    log_probs = logits.log_softmax(-1)
    chosen = log_probs.gather(1, target)
    nats = (label_smoothing - 1) * chosen
    if label_smoothing:
        nats = nats - label_smoothing * log_probs.mean(-1, keepdim=True)
    nats = nats.where(known, 0).sum()
    # The probabilities minus what the label asks for: these are the largest tensors.
    size = log_probs.shape[1]
    if torch.compiler.is_compiling():  # one kernel; a scatter would need three
        is_label = torch.arange(size, device=target.device) == target
        error = log_probs.exp() + torch.where(is_label, label_smoothing - 1, 0.0)
        error = (error - label_smoothing / size) * known
    else:  # in place
        error = log_probs.exp_()
        error.scatter_(1, target, chosen.exp() + label_smoothing - 1)
        error.sub_(label_smoothing / size).mul_(known)
    if softcap is not None:
        error.mul_(1 - (logits / softcap) ** 2)
    return nats, error
