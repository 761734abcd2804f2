"""Learning-rate schedules as functions of the step, and the parameter groups."""

import math
from typing import Any

import torch

from ftcore.config import OptimConfig
from ftcore.hooks import Hooks
from ftcore.strategies import whole_shape

__all__ = ["build_optimizer", "lr_factor"]


def lr_factor(optim: OptimConfig, index: int, total: int) -> float:
    """Factor of `optim.lr` at step `index` (0-based) of `total`: a linear warm-up, then the schedule.

    The first step already has a rate above zero and the last one still has.
    """
    warmup = optim.warmup if optim.warmup >= 1 else math.ceil(optim.warmup * total - 1e-9)
    if index < warmup:
        return (index + 1) / warmup
    left = (total - index) / max(1.0, total - warmup)
    if optim.schedule == "linear":
        return left
    if optim.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (1 - left)))
    return 1.0


def build_optimizer(model: torch.nn.Module, hooks: Hooks) -> torch.optim.Optimizer:
    """The optimiser over groups of parameters that share a decay and a rate.

    Vectors (biases, norms) are not decayed; `param_options` of plugins overrides both.
    """
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        options = hooks.param_options(name, param)
        default = hooks.cfg.optim.weight_decay if len(whole_shape(param)) > 1 else 0.0
        decay = options.get("weight_decay", default)
        groups.setdefault((decay, options.get("lr_scale", 1.0)), []).append(param)
    params: list[dict[str, Any]] = [
        {"params": members, "weight_decay": decay, "lr": hooks.cfg.optim.lr, "lr_scale": scale}
        for (decay, scale), members in groups.items()
    ]
    return hooks.build_optimizer(params)
