"""The plugin: which hook does what. The mathematics is in `_mix`, the choice of weights in `_select`."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping
from dataclasses import field
from typing import Any, Literal

import torch
from torch import Tensor

from ftcore import Batch, Shard, State, Step, UserError, hookimpl, plugin
from ftcore.plugins import Meta
from ftcore.strategies import base_model
from ftcore_mixout import _select
from ftcore_mixout._mask import mask_key
from ftcore_mixout._mix import decay_
from ftcore_mixout._weights import SplitWeights, WholeWeights, slices

__all__ = ["Mixout"]

HOOKS = (
    "load_model",
    "setup_model",
    "on_train_start",
    "on_step_start",
    "forward",
    "on_backward_end",
    "on_export",
)
DECAY_HOOKS = ("param_options", "on_gradients")
CONTROL_HOOKS = ("setup_model", "load_model", "param_options")


@plugin(needs=("full_rank_weights",))
class Mixout:
    """Mix weights with their pretrained values while training (Lee, Cho, Kang, 2020)."""

    p: float = 0.7
    target: Literal["pretrained", "zero"] = "pretrained"
    granularity: Literal["column", "element"] = "column"
    mask_scope: Literal["step", "micro_batch"] = "step"
    decay: float = 0.0
    control: bool = False
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not 0 <= self.p < 1:
            raise ValueError(f"p must be in [0, 1), got {self.p}")
        if not 0 <= self.decay < float("inf"):
            raise ValueError(f"decay must be at least 0 and finite, got {self.decay}")
        if self.decay and self.target == "zero":
            raise ValueError("decay pulls to the pretrained weights; with target=zero use optim.weight_decay")
        if self.control and self.decay:
            raise ValueError("control is the run without mixout at a lower rate; it takes no decay")
        if self.mask_scope == "micro_batch" and self.p and not self.control:
            # Ranks are at different micro-batches at a time, so that no two could share a mixture.
            self.__ftcore__ = Meta(needs=("full_rank_weights", "whole_weights"))
        self._original: dict[str, Tensor] = {}  # every candidate as it was loaded, until the choice is made
        self._axes: dict[str, int] = {}  # of the weights that are mixed: the axis of their input features
        self._targets: dict[str, Tensor] = {}
        self._slices: dict[str, Tensor] = {}  # of the targets, as this rank's shards are of the weights
        self._weights: WholeWeights | None = None
        self._settings: list[tuple[Any, str, float]] = []
        self._manifest: dict[str, Any] = {}
        self._target_hash = ""
        # What is no method is not registered: at p=0 nothing is, and without decay core has no reason
        # to sum weights over ranks after each step's `on_gradients`.
        used = {*(HOOKS if self.p or self.decay else ()), *(DECAY_HOOKS if self.decay else ())}
        if self.control:
            used = set(CONTROL_HOOKS if self.p else ())
        for name in {*HOOKS, *DECAY_HOOKS} - used:
            setattr(self, name, None)

    @hookimpl(wrapper=True)
    def load_model(self) -> Generator[None, torch.nn.Module, torch.nn.Module]:
        """Copy every candidate's pretrained value, before any plugin's `setup_model` may change it."""
        model = yield
        params = dict(model.named_parameters())
        self._axes = _select.linear_weights(model)
        self._original = {name: params[name].detach().clone() for name in self._axes}
        return model

    @hookimpl
    def setup_model(self, model: torch.nn.Module, new: frozenset[str]) -> None:
        _select.check_trainable_base(model)
        self._axes = _select.select(self._axes, model, new, self.include, self.exclude)
        if self.target == "pretrained":
            self._targets = {name: self._original[name] for name in self._axes}
        self._original = {}
        off: list[str] = []
        if self.p and not self.control:
            off, self._settings = _select.turn_off_dropout(model, self._axes)
        self._manifest = _select.describe(model, self._axes, off)
        copies = bool(self._targets) + bool(self.p)  # the target, and the mixture
        self._manifest["kept_parameters"] = 0 if self.control else copies * self._manifest["mixed_parameters"]

    def describe(self) -> dict[str, Any]:
        """What is mixed, and which dropout is off, for run.json and `ftcore plan`."""
        return self._manifest

    @hookimpl
    def param_options(self, name: str) -> dict[str, float] | None:
        """No ordinary decay where `decay` takes its place; in a control, the rate that mixout amounts to."""
        if name not in self._axes:
            return None
        return {"lr_scale": (1 - self.p) ** 0.5} if self.control else {"weight_decay": 0.0}

    @hookimpl
    def on_train_start(self, state: State) -> None:
        params = dict(base_model(state.model).named_parameters())
        if lost := [name for name in self._axes if name not in params]:
            raise UserError(f"mixout: another plugin took away {lost[0]}, which is to be mixed")
        if frozen := [name for name in self._axes if not params[name].requires_grad]:
            raise UserError(
                f"mixout: another plugin froze {frozen[0]} after it was chosen to be mixed; name that plugin"
                " before mixout in +plugin=[...], or leave the weight out by plugin.mixout.exclude"
            )
        features = {name: axis if self.granularity == "column" else None for name, axis in self._axes.items()}
        mixed = {name: params[name] for name in self._axes if self.p}
        if state.lend is None:
            self._targets = {name: target.to(state.device) for name, target in self._targets.items()}
            self._slices = slices(state.shards(), self._targets, copy=False)
            self._weights = WholeWeights(mixed, self._targets, features, self.p)
        else:
            self.state_dict()  # the hash, while the target is whole
            self._targets = self._slices = slices(state.shards(), self._targets, copy=True)
            self._weights = SplitWeights(mixed, self._slices, features, self.p, state.shards, state.lend)
        if self.mask_scope == "micro_batch":
            self._weights.scale_each_gradient()

    @hookimpl(tryfirst=True)
    def on_step_start(self, step: Step) -> None:
        if self.mask_scope == "step":
            self._mix(step, -1)

    @hookimpl(wrapper=True)
    def forward(self, batch: Batch, step: Step) -> Generator[None, Any, Any]:
        if self.mask_scope == "micro_batch":
            self._mix(step, batch.micro_batch)
        return (yield)

    def _mix(self, step: Step, micro_batch: int) -> None:
        assert self._weights is not None
        self._weights.mix(lambda name: mask_key(step.seed, step.index, micro_batch, name))

    @hookimpl
    def on_backward_end(self) -> None:
        assert self._weights is not None
        if self.mask_scope == "step":
            self._weights.scale_gradients()
        self._weights.restore()

    @hookimpl
    def on_gradients(self, shards: list[Shard], lr: float) -> None:
        for shard in shards:
            if (target := self._slices.get(shard.name)) is not None:
                decay_(shard.value, target, lr * shard.lr_scale * self.decay)

    @hookimpl
    def on_export(self) -> None:
        for config, key, value in self._settings:
            setattr(config, key, value)

    def state_dict(self) -> dict[str, Any]:
        """The hash of the target. The target itself is in the files of `model.path`, and not saved again."""
        if not self._target_hash:
            self._target_hash = _hash(self._targets)
        return {"target_sha256": self._target_hash}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse to go on with another target than the run began with."""
        saved, now = str(state["target_sha256"]), self.state_dict()["target_sha256"]
        if now != saved:
            raise UserError(
                "mixout: the pretrained weights in model.path are not those that this run began with"
                f" (sha256 {now[:12]}, then {saved[:12]}): put those back, or start anew with force=true"
            )


def _hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
