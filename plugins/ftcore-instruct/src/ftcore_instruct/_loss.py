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
        hasattr(F, "linear_cross_entropy")  # torch 2.13
        and model.config.model_type in PLAIN_HEADS
        and is_linear
        and not head._forward_hooks
        and not head._forward_pre_hooks
    )


@contextlib.contextmanager
def without_head(model: Any) -> Iterator[None]:
    """While it lasts, the model's `logits` are the hidden states that its head would read."""
    head = model.get_output_embeddings()
    head.forward = lambda hidden: hidden
    try:
        yield
    finally:
        del head.forward


def chunked_sum(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The sum of `token_losses` of `hidden @ weight.T`, with `CHUNK` logits at a time; scalar, fp32.

    Gradients are made in the forward pass, chunk by chunk, so there is no second derivative.

    Args:
        hidden: [tokens, width].
        weight: [vocabulary, width].
        labels: int64 [tokens], all trained.
    """
    options = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=min(len(hidden), max(1, CHUNK // len(weight))), chunking_method=None
    )
    total: Tensor = F.linear_cross_entropy(
        hidden, weight.to(hidden.dtype), labels, reduction="sum", options=options
    )
    return total.float()
