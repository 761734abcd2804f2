"""L2-SP (Li, Grandvalet, Davoine, 2018) as an ftcore plugin: `ftcore +plugin=l2sp`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import cos, pi
from typing import Any, Literal

import torch
from torch import Tensor

from ftcore import Shard, Step, UserError, hookimpl, plugin

__all__ = ["L2SP", "factor", "penalty"]


def penalty(value: Tensor, pretrained: Tensor | None, alpha: float, beta: float) -> Tensor:
    """alpha/2 · ‖w - w0‖² where there is a w0, else beta/2 · ‖w‖² (equation 5 of the paper).

    Args:
        value: w, 1-D fp32: a whole parameter, or any part of one.
        pretrained: w0, as `value`; None for a parameter that is new.

    Returns:
        A scalar, fp32. Sums of parts are the penalty of the whole.
    """
    if pretrained is None:
        return beta / 2 * value.square().sum()
    return alpha / 2 * (value - pretrained).square().sum()


def factor(schedule: str, progress: float) -> float:
    """What alpha and beta are multiplied by when `progress` (0 to 1) of training is done."""
    return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + cos(pi * progress)) / 2}[schedule]


@plugin(api=1, needs=("pretrained", "full_rank_weights"))
class L2SP:
    """Pull weights to their pretrained values, and new ones to zero (Li et al., 2018)."""

    alpha: float = 0.1
    beta: float = 0.01
    schedule: Literal["constant", "linear", "cosine"] = "constant"

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
        self._hash = ""
        self._manifest: dict[str, Any] = {}

    @hookimpl(tryfirst=True)
    def setup_model(self, model: torch.nn.Module, new: frozenset[str]) -> None:
        """Hash the pretrained values, while each process has them whole and none is changed."""
        digest, kept = hashlib.sha256(), 0
        for name, param in model.named_parameters():
            if not param.requires_grad or name in new:
                continue
            kept += param.numel()
            if not param.is_meta:  # the outline of `ftcore plan`
                digest.update(name.encode())
                digest.update(param.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        self._hash = digest.hexdigest()
        self._manifest = {"new": sorted(new), "kept_parameters": kept}

    def describe(self) -> dict[str, Any]:
        """What has no w0, and so is pulled to zero; and how many w0 are kept, for `ftcore plan`'s memory."""
        return self._manifest

    @hookimpl
    def param_options(self) -> dict[str, float] | None:
        """No ordinary decay to zero beside the pull: the paper has one in place of the other."""
        return {"weight_decay": 0.0} if self.alpha or self.beta else None

    @hookimpl
    def regularize(self, shards: Sequence[Shard], step: Step) -> dict[str, Tensor] | None:
        if not shards or not (self.alpha or self.beta):
            return None
        parts = [penalty(shard.value, shard.pretrained, self.alpha, self.beta) for shard in shards]
        return {"l2sp": factor(self.schedule, step.progress) * torch.stack(parts).sum()}

    def state_dict(self) -> dict[str, Any]:
        """The hash of the pretrained values; they are read from `model.path` again, and not saved."""
        return {"pretrained_sha256": self._hash}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse to go on with another w0 than the run began with."""
        if state["pretrained_sha256"] != self._hash:
            raise UserError(
                "l2sp: the pretrained weights in model.path are not those that this run began with"
                f" (sha256 {self._hash[:12]}, then {state['pretrained_sha256'][:12]}): put those back,"
                " or start anew with force=true"
            )
