"""Weights that are mixed: for the forwards and backwards of a step other tensors stand in for them.

The weights themselves are never written. What is kept: the targets, and buffers that the mixtures are
written to. A mask is drawn again where it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from ftcore import Shard
from ftcore.strategies import whole_shape
from ftcore_mixout._mix import factor, mix, slice_factor

__all__ = ["SplitWeights", "WholeWeights", "slices"]

KeyOf = Callable[[str], bytes]
"""The key of a weight's mask, by the weight's name."""


def slices(shards: Iterable[Shard], targets: Mapping[str, Tensor], *, copy: bool) -> dict[str, Tensor]:
    """The part of each target that goes with this rank's part of the weight, 1-D: a view, or a copy."""
    return {
        s.name: targets[s.name].view(-1)[s.offset :][: s.value.numel()].to(s.value.device, copy=copy)
        for s in shards
        if s.name in targets
    }


class WholeWeights:
    """Weights that this rank holds whole: a mixture takes the storage's place, which is only a pointer."""

    def __init__(
        self,
        params: Mapping[str, torch.nn.Parameter],
        targets: Mapping[str, Tensor],
        features: Mapping[str, int | None],
        p: float,
    ) -> None:
        self._params, self._targets, self._features, self._p = params, targets, features, p
        self._buffers: dict[str, Tensor] = {}
        self._own: dict[str, Tensor] = {}  # the weights, while mixtures are in their place
        self._key_of: KeyOf | None = None

    def mix(self, key_of: KeyOf) -> None:
        """Put mixtures in the weights' place (again, where some are there)."""
        self._key_of = key_of
        for name, param in self._params.items():
            own = self._own.setdefault(name, param.data)
            out = self._buffer(name, own)
            param.data = mix(own, self._targets.get(name), self._factor(name), out=out)

    def restore(self) -> None:
        """Put the weights back."""
        for name, own in self._own.items():
            self._params[name].data = own
        self._own = {}

    def scale_gradients(self) -> None:
        """Make what was accumulated under one mask the gradients of the weights, in place."""
        for name, param in self._params.items():
            if param.grad is not None:
                param.grad.mul_(self._factor(name))

    def scale_each_gradient(self) -> None:
        """From now on, make each gradient that arrives one of the weight, by the mask of its forward."""
        for name, param in self._params.items():
            param.register_hook(lambda grad, name=name: grad * self._factor(name))  # type: ignore[no-untyped-call]

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        if name not in self._buffers:
            self._buffers[name] = torch.empty_like(like)
        return self._buffers[name]

    def _factor(self, name: str) -> Tensor:
        assert self._key_of is not None
        param = self._params[name]
        return factor(self._key_of(name), self._p, whole_shape(param), self._features[name], param.device)


class SplitWeights(WholeWeights):
    """Weights of which this rank holds a part: the part is mixed, with its part of the target and mask.

    The masks are those of whole weights, so that the number of ranks changes nothing. All ranks compute
    with the same mixture: a mask of each micro-batch, of which each rank has others, is not possible.
    """

    def __init__(
        self,
        params: Mapping[str, torch.nn.Parameter],
        targets: Mapping[str, Tensor],
        features: Mapping[str, int | None],
        p: float,
        shards: Callable[[], list[Shard]],
        lend: Callable[[Mapping[str, Tensor] | None], None],
    ) -> None:
        super().__init__(params, targets, features, p)
        self._shards, self._lend = shards, lend

    def mix(self, key_of: KeyOf) -> None:
        self._key_of = key_of
        mixed = {}
        for shard in self._mixed_shards():
            out, target = self._buffer(shard.name, shard.value), self._targets.get(shard.name)
            mixed[shard.name] = mix(shard.value, target, self._slice_factor(shard), out=out)
        if self._params:
            self._lend(mixed)

    def restore(self) -> None:
        if self._params:
            self._lend(None)

    def scale_gradients(self) -> None:
        for shard in self._mixed_shards():
            if shard.grad is not None:
                shard.grad.mul_(self._slice_factor(shard))

    def _mixed_shards(self) -> list[Shard]:
        return [shard for shard in self._shards() if shard.name in self._params]

    def _slice_factor(self, shard: Shard) -> Tensor:
        assert self._key_of is not None
        key, features, device = self._key_of(shard.name), self._features[shard.name], shard.value.device
        stop = shard.offset + shard.value.numel()
        return slice_factor(key, self._p, shard.shape, features, device, shard.offset, stop)
