"""Cross entropy where labels are trained, and nowhere else: no logits are computed for a masked token.

Tensors in, tensors out. Sums, never means: core normalises over the whole optimiser step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["chunked_sum", "has_plain_head", "kept_positions", "token_losses", "without_head"]

IGNORED = -100
CHUNK = 2**24  # logits at a time in `chunked_sum`: 64 MiB in fp32

PLAIN_HEADS = (
    "gemma",
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
    "stablelm",
)
"""Model types whose logits are their head's output as it is: not scaled (Granite), not capped (Gemma 2)."""


def kept_positions(labels: Tensor) -> Tensor:
    """Positions whose next token is trained, in any row.

    Args:
        labels: [rows, tokens], aligned with the input, -100 where not trained.

    Returns:
        int64 [kept], ascending; the label of position t is `labels[:, t + 1]`.
    """
    return (labels[:, 1:] != IGNORED).any(dim=0).nonzero().flatten()


def token_losses(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy of each trained token, fp32 [trained], in row order.

    Args:
        logits: [rows, tokens, vocabulary].
        labels: [rows, tokens], -100 where not trained.
    """
    trained = labels != IGNORED
    return F.cross_entropy(
        logits[trained].float(), labels[trained], reduction="none", label_smoothing=label_smoothing
    )


def has_plain_head(model: Any) -> bool:
    """Whether logits are `hidden @ weight.T` and no more, so that `chunked_sum` is the model's own loss."""
    head = model.get_output_embeddings()
    is_linear = type(head) is torch.nn.Linear and head.bias is None and head.weight.ndim == 2
    return bool(
        model.config.model_type in PLAIN_HEADS
        and is_linear
        and not head._forward_hooks
        and not head._forward_pre_hooks
    )


@contextlib.contextmanager
def without_head(model: Any) -> Iterator[None]:
    """While it lasts, the model's `logits` are the hidden states that its head would read."""
    head = model.get_output_embeddings()
    head.forward = _as_read
    try:
        yield
    finally:
        del head.forward


def _as_read(hidden: Tensor) -> Tensor:
    """In the dtype of the head's product: under autocast a half."""
    device = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden


def chunked_sum(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The sum of `token_losses` of `hidden @ weight.T`, with `CHUNK` logits at a time; scalar, fp32.

    The products are in the dtype of `hidden`, the softmax and every sum in fp32 at least. Gradients are made
    in the forward pass, chunk by chunk, so there is no second derivative.

    Args:
        hidden: [tokens, width].
        weight: [vocabulary, width].
        labels: int64 [tokens], all trained.
    """
    total: Tensor = _ChunkedSum.apply(hidden, weight, labels)  # type: ignore[no-untyped-call]
    return total


class _ChunkedSum(torch.autograd.Function):
    """Cross entropy of a linear head: dL/dlogits = softmax - one-hot, used up before the next chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        head = weight.to(hidden.dtype)
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        size = max(1, CHUNK // len(weight))
        for start in range(0, len(hidden), size):
            part, target = hidden[start : start + size], labels[start : start + size, None]
            logs = torch.log_softmax((part @ head.T).to(wide), dim=1)
            total -= logs.gather(1, target).sum()
            if of_hidden is None and of_weight is None:
                continue
            grad = logs.exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=wide))
            grad = grad.to(hidden.dtype)
            if of_hidden is not None:
                torch.mm(grad, head, out=of_hidden[start : start + size])
            if of_weight is not None:
                of_weight += grad.T @ part
        ctx.save_for_backward(of_hidden, None if of_weight is None else of_weight.to(weight.dtype))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_total: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        of_hidden, of_weight = ctx.saved_tensors
        return (
            None if of_hidden is None else of_hidden * of_total.to(of_hidden.dtype),
            None if of_weight is None else of_weight * of_total.to(of_weight.dtype),
            None,
        )
