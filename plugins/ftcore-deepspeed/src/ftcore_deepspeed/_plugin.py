"""The plugin: options, and which hook does what. DeepSpeed is driven in `_strategy`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from ftcore import UserError, hookimpl, plugin
from ftcore.config import Config
from ftcore.plugins import Meta

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
            raise ValueError("offload_optimizer needs stage 1, 2 or 3: stage 0 shards nothing")
        if self.offload_params and self.stage != 3:
            raise ValueError(f"offload_params needs stage 3, got {self.stage}")
        if self.stage:
            self.__ftcore__ = Meta(removes=("whole_weights",))
        if find_spec("deepspeed") is None:
            raise UserError("trainer=deepspeed needs DeepSpeed: pip install 'deepspeed>=0.19.8,<0.20'")

    @hookimpl
    def build_strategy(self, cfg: Config) -> Any:
        from ftcore_deepspeed._strategy import ZeRO

        return ZeRO(cfg, self)
