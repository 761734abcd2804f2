"""A weight that is mixed: for the forwards and backwards of a step another tensor stands in for it."""

from __future__ import annotations

import torch
from torch import Tensor

from ftcore_mixout._mix import factor, mix

__all__ = ["MixedWeight"]


class MixedWeight:
    """Swaps a parameter's storage for the mixture and back; the weights themselves are never written.

    Restoring is exact because it is only a pointer. What is kept: the target, and the buffer that the
    mixture is written to. The mask is drawn again where it is needed.
    """

    def __init__(
        self,
        param: torch.nn.Parameter,
        target: Tensor | None,
        *,
        features: int | None,
        p: float,
    ) -> None:
        self.param = param
        self.target = target
        self._features = features
        self._p = p
        self._key = b""
        self._buffer: Tensor | None = None
        self._own: Tensor | None = None  # the weights, while the mixture is in their place

    def mix(self, key: bytes) -> None:
        """Put the mixture by the mask of `key` in the weight's place (again, where one is there)."""
        own = self.param.data if self._own is None else self._own
        if self._buffer is None:
            self._buffer = torch.empty_like(own)
        self._key = key
        self.param.data = mix(own, self.target, self._factor(), out=self._buffer)
        self._own = own

    def restore(self) -> None:
        """Put the weight back."""
        if self._own is not None:
            self.param.data, self._own = self._own, None

    def scale_gradient(self) -> None:
        """Make what was accumulated under one mask the gradient of the weight, in place."""
        if self.param.grad is not None:
            self.param.grad.mul_(self._factor())

    def scale_each_gradient(self) -> None:
        """From now on, make each gradient that arrives one of the weight, by the mask of its forward."""
        self.param.register_hook(lambda grad: grad * self._factor())  # type: ignore[no-untyped-call]

    def _factor(self) -> Tensor:
        return factor(self._key, self._p, self.param.shape, self._features, self.param.device)
