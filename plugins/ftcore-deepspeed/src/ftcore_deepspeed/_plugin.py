"""The plugin: options, and which hook does what. DeepSpeed is driven in `_strategy`."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from ftcore import State, UserError, hookimpl, plugin
from ftcore.config import Config
from ftcore.launch import rank_environment
from ftcore.plugins import Meta, installed
from ftcore.strategies import local_ranks
from ftcore_deepspeed import _memory
from ftcore_deepspeed._config import derive

__all__ = ["DeepSpeed"]


@plugin()
class DeepSpeed:
    """Split optimiser states, gradients, weights over ranks: DeepSpeed ZeRO (Rajbhandari et al., 2020)."""

    stage: int = 2
    devices: int | None = None
    offload_optimizer: bool = False
    offload_params: bool = False
    config: str | None = None

    def __post_init__(self) -> None:
        if self.stage not in (0, 1, 2, 3):
            raise ValueError(f"stage must be 0, 1, 2 or 3, got {self.stage}")
        if self.devices is not None and self.devices < 1:
            raise ValueError(f"devices must be at least 1, got {self.devices}")
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("offload_optimizer needs stage 1, 2 or 3: stage 0 splits nothing")
        if self.offload_params and self.stage != 3:
            raise ValueError(f"offload_params needs stage 3, got stage {self.stage}")
        if self.stage:
            self.__ftcore__ = Meta(removes=("whole_weights",))
        if find_spec("deepspeed") is None:
            raise UserError("trainer=deepspeed needs DeepSpeed: pip install 'deepspeed>=0.19.8,<0.20'")
        self._engine_config: dict[str, Any] = {}
        self._passed: list[str] = []

    @hookimpl(wrapper=True)
    def load_tokenizer(self, cfg: Config) -> Generator[None, Any, Any]:
        """The first hook that has the config, before ranks start: what contradicts it is said here."""
        _, world_size, _ = rank_environment()
        ranks = world_size if world_size > 1 else local_ranks("deepspeed", self.devices)
        self._engine_config, self._passed = derive(cfg, self, ranks)
        return (yield)

    @hookimpl
    def build_strategy(self, cfg: Config) -> Any:
        from ftcore_deepspeed._strategy import ZeRO

        return ZeRO(cfg, self, *derive(cfg, self, rank_environment()[1]))

    @hookimpl
    def on_train_start(self, state: State) -> None:
        """Leave the engine's config in the run's directory."""
        if rank_environment()[0] == 0:
            text = json.dumps(self._engine_config, indent=2) + "\n"
            (state.run_dir / "deepspeed.json").write_text(text, encoding="utf-8")

    @hookimpl(wrapper=True)
    def load_model(self, cfg: Config) -> Generator[None, torch.nn.Module, torch.nn.Module]:
        """At stage 3 split a pretrained model while it loads, where no plugin is to see it whole."""
        if self.stage < 3 or torch.get_default_device().type == "meta":
            return (yield)
        from transformers.integrations import HfDeepSpeedConfig

        whole = cfg.model.add_tokens or cfg.model.path.startswith("ftcore:tiny")
        splits = not whole and not any(map(_sees_weights, cfg.plugin))
        # transformers looks for this object: while it is there, from_pretrained splits, and later on
        # ranks make equally many forwards in generation.
        self._split = HfDeepSpeedConfig(self._engine_config) if splits else None
        model = yield
        self._split = HfDeepSpeedConfig(self._engine_config)
        return model

    def memory(
        self, parameters: Sequence[tuple[int, bool]], kept: int, ranks: int, device_gb: float | None
    ) -> dict[str, Any]:
        """Bytes a rank by stage and offloading, and the fastest that fits a device; for `ftcore plan`."""
        chosen = (self.stage, self.offload_optimizer, self.offload_params)
        return _memory.report(_memory.count(parameters, kept), ranks, chosen, device_gb)

    def describe(self) -> dict[str, Any]:
        """For run.json and `ftcore plan`: what of `trainer.config` goes to the engine untested."""
        return {"stage": self.stage, "untested_keys": self._passed}


def _sees_weights(name: str) -> bool:
    """Whether a plugin has a hook that is given weights before the engine is: split ones look empty to it."""
    cls = installed()[name][0].load()
    hooks = ("load_model", "setup_model", "param_options")
    return any(hasattr(cls, hook) for hook in hooks) or "pretrained" in cls.__ftcore__.needs
