"""The supervised contrastive loss and its gradient, block by block: tensors in, tensors out.

Gunel, Du, Conneau, Stoyanov (2021), equation 3, for L2-normalised representations z with labels y:

    l_i = log Σ_{k≠i} exp(z_i·z_k / τ)  -  1/|P_i| Σ_{p∈P_i} z_i·z_p / τ,     P_i = {p ≠ i: y_p = y_i}

The gradient is written out, because row i occurs twice in the loss: as an anchor, and as a key of every
other anchor, of other ranks' too. With the log-sum-exp of all anchors in hand, each rank computes both parts
for its own rows; no collective runs in the backward, and no similarity outlives its block.
Nothing here knows ranks, models or micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["ABSENT", "attach", "contrast", "count_positives", "normalize", "supervised_contrastive"]

ABSENT = -1
"""The label of a row that takes no part: padding, a filler, an unlabelled row. Any negative label is one."""

BLOCK = 512  # anchors at a time


def normalize(representations: Tensor) -> Tensor:
    """Rows of length 1, in fp32 (in float64 where they are): half precision is too coarse for z·z/τ."""
    wide = representations if representations.dtype == torch.float64 else representations.float()
    z: Tensor = torch.nn.functional.normalize(wide, dim=-1)
    return z


def count_positives(labels: Tensor) -> Tensor:
    """|P_i|: how many other rows have the label of row i, int64 like `labels` [rows]; 0 for absent rows."""
    _, inverse, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    positives: Tensor = (counts[inverse] - 1).masked_fill(labels < 0, 0)
    return positives


@torch.no_grad()
def contrast(
    z: Tensor,
    labels: Tensor,
    rows: slice,
    temperature: float,
    scale: float,
    gather: Callable[[Tensor], Tensor] = lambda local: local,
) -> tuple[Tensor, Tensor]:
    """The losses of this rank's anchors, and the gradient of everybody's total at this rank's rows.

    Args:
        z: normalised representations of this rank's rows, [own, width], fp32 or float64.
        labels: of the rows of all ranks, int64 [keys]; negative ones are left out.
        rows: where this rank's rows are in `labels`.
        temperature: τ.
        scale: factor of each l_i in the total; 1 over the number of anchors makes it a mean.
        gather: this rank's [own, ...] to everybody's [keys, ...], in the order of `labels`.

    Returns:
        scale · l_i of each own row, 0 for an anchor without positives, [own]; and the gradient, like `z`.
    """
    keys, positives = gather(z), count_positives(labels).to(z.dtype)
    has_positives = positives[rows] > 0
    with torch.autocast(z.device.type, enabled=False):
        parts = [
            _anchors(z[at], keys, labels, positives, rows.start + at.start, temperature)
            for at in _blocks(len(z))
        ]
        losses = torch.where(has_positives, torch.cat([loss for loss, _ in parts]), 0.0)
        # exp(s - ∞) = 0: what is no anchor has no part in the gradient.
        lse = gather(torch.where(has_positives, torch.cat([lse for _, lse in parts]), torch.inf))
        gradients = [
            _gradient(z[at], keys, labels, positives, lse, rows.start + at.start, temperature)
            for at in _blocks(len(z))
        ]
    return scale * losses, scale * torch.cat(gradients)


def _blocks(count: int) -> list[slice]:
    return [slice(i, min(i + BLOCK, count)) for i in range(0, max(count, 1), BLOCK)]


def _similarities(
    z: Tensor, keys: Tensor, labels: Tensor, first: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """z·k/τ of a block with every other row, -∞ where one is absent; and which are positives."""
    own, of_block = torch.arange(len(z), device=z.device), labels[first : first + len(z), None]
    taking_part = (of_block >= 0) & (labels >= 0)
    taking_part[own, first + own] = False
    similarity = (z @ keys.T / temperature).masked_fill_(~taking_part, -torch.inf)
    return similarity, taking_part & (of_block == labels)


def _anchors(
    z: Tensor, keys: Tensor, labels: Tensor, positives: Tensor, first: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """l_i and its log-sum-exp for a block of anchors; of no meaning where there is no positive."""
    similarity, positive = _similarities(z, keys, labels, first, temperature)
    lse = torch.logsumexp(similarity, dim=1)
    near = similarity.masked_fill(~positive, 0.0).sum(dim=1) / positives[first : first + len(z)].clamp(min=1)
    return lse - near, lse


def _gradient(
    z: Tensor,
    keys: Tensor,
    labels: Tensor,
    positives: Tensor,
    lse: Tensor,
    first: int,
    temperature: float,
) -> Tensor:
    """∂Σ_k l_k / ∂z_i for a block of rows i: as anchors (row i of the softmax), and as keys (column i)."""
    similarity, positive = _similarities(z, keys, labels, first, temperature)
    own = slice(first, first + len(z))
    push = (similarity - lse[own, None]).exp_() + (similarity - lse).exp_()
    # A positive pair has one label, hence one |P|, and each of the two pulls the other.
    push -= positive * (2.0 / positives[own].clamp(min=1))[:, None]
    return push @ keys / temperature


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():  # create_graph: the attached gradient would count as a constant
            raise RuntimeError("the contrastive loss can't be differentiated twice")
        (gradient,) = ctx.saved_tensors
        return outer[0] * gradient, None, None


def attach(z: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """The scalar `value`, whose gradient at `z` is `gradient`. A second derivative is an error."""
    result: Tensor = _Attach.apply(z, value, gradient)  # type: ignore[no-untyped-call]
    return result


def supervised_contrastive(
    representations: Tensor, labels: Tensor, temperature: float = 0.3, *, reduction: str = "mean"
) -> Tensor:
    """The loss of one batch by itself, differentiable: 0 where no row has a positive.

    Args:
        representations: [rows, width], any floating dtype, not normalised.
        labels: int64 [rows]; rows with a negative one are left out.
        temperature: τ.
        reduction: over the anchors that have positives, `mean` or `sum`.
    """
    z = normalize(representations)
    anchors = int((count_positives(labels) > 0).sum())
    scale = 1.0 / max(1, anchors) if reduction == "mean" else 1.0
    losses, gradient = contrast(z.detach(), labels, slice(0, len(z)), temperature, scale)
    return attach(z, losses.sum(), gradient)
