"""The mathematics: tensors in, tensors out. Never imports ftcore.

    mixed = u + m * (w - u) / (1 - p)        d mixed / d w = m / (1 - p)

w: the weight, u: its target (None is zero), m: the mask, 0 with probability p. The mean over masks is w.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from ftcore_mixout._mask import draw

__all__ = ["decay_", "factor", "mix", "slice_factor"]


def factor(key: bytes, p: float, shape: Sequence[int], features: int | None, device: torch.device) -> Tensor:
    """m / (1 - p) for a whole weight, fp32, in a shape that broadcasts to it.

    Args:
        features: the axis of the weight that is its input features: one draw for each of them
            (the paper's mixout). None draws one for each element.
    """
    size = prod(shape) if features is None else shape[features]
    return draw(key, p, 0, size, device).view(
        [n if features in (None, axis) else 1 for axis, n in enumerate(shape)]
    )


def slice_factor(
    key: bytes,
    p: float,
    shape: Sequence[int],
    features: int | None,
    device: torch.device,
    start: int,
    stop: int,
) -> Tensor:
    """Elements `start` to `stop` of the flattened whole factor: what a rank needs that owns a shard."""
    if features is None:
        return draw(key, p, start, stop, device)
    row = prod(shape[features + 1 :])
    which = torch.arange(start, stop, device=device).div_(row, rounding_mode="floor") % shape[features]
    return factor(key, p, shape, features, device).view(-1)[which]


def mix(w: Tensor, u: Tensor | None, factor: Tensor, out: Tensor | None = None) -> Tensor:
    """u + factor * (w - u), in u's precision: w - u is lost where both are rounded to bf16."""
    if u is None:
        return torch.mul(w, factor.to(w.dtype), out=out)
    if out is None or out.dtype == u.dtype == w.dtype:
        return torch.lerp(u, w.to(u.dtype), factor.to(u.dtype), out=out)
    return out.copy_(torch.lerp(u, w.to(u.dtype), factor.to(u.dtype)))


def decay_(w: Tensor, u: Tensor, rate: float) -> None:
    """w -= rate * (w - u), in place: decoupled weight decay toward the target."""
    w.lerp_(u, rate)
