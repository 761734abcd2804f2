"""LoRA (Hu et al., 2021), through peft, as an ftcore plugin: `ftcore +plugin=lora`."""

from __future__ import annotations

from dataclasses import field
from typing import Any

import torch
from torch import Tensor

from ftcore import State, UserError, hookimpl, plugin

__all__ = ["LoRA"]


@plugin(api=1, needs=("whole_weights",), removes=("full_rank_weights",), conflicts=("l2sp",))
class LoRA:
    """Train low-rank updates of a frozen model, and its new head (Hu et al., 2021)."""

    r: int = 8
    alpha: int = 16
    dropout: float = 0.0
    include: list[str] = field(default_factory=list)
    save_adapter: bool = False

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r must be at least 1, got {self.r}")
        if self.alpha <= 0:
            raise ValueError(f"alpha must be above 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        self._config: Any = None
        self._manifest: dict[str, Any] = {}
        self._adapter: dict[str, Tensor] = {}

    @hookimpl
    def setup_model(self, model: Any, cfg: Any, new: frozenset[str]) -> None:
        """Put adapters beside linear layers, in place: the model stays of its class."""
        import peft

        if cfg.model.add_tokens:
            raise UserError("lora freezes the embeddings, so model.add_tokens would never be trained")
        if getattr(model.config, "quantization_config", None) is not None:
            raise UserError("lora trains on full-precision bases only, as it merges on export")
        heads = [param for name, param in model.named_parameters() if name in new]
        targets = "all-linear" if self.include == ["all-linear"] else self.include or None
        self._config = peft.LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=targets,
            modules_to_save=sorted({name.rpartition(".")[0] for name in new}) or None,
            base_model_name_or_path=cfg.model.path,
        )
        inner = peft.LoraConfig(
            r=self.r, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=targets
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            try:
                peft.inject_adapter_in_model(inner, model)
            except ValueError as error:
                raise UserError(
                    f"plugin.lora.include={self.include}: {str(error).splitlines()[0]}"
                ) from error
        for param in heads:
            param.requires_grad_(True)
        self._config.target_modules = inner.target_modules
        trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
        self._manifest = {
            "adapted": [n.removesuffix(".lora_A.default.weight") for n in trained if "lora_A" in n],
            "trained_parameters": sum(trained.values()),
            "share_of_parameters": round(
                sum(trained.values()) / sum(p.numel() for p in model.parameters()), 4
            ),
        }

    def describe(self) -> dict[str, Any]:
        """What is adapted and how much is trained, for run.json and `ftcore plan`."""
        return self._manifest

    @hookimpl
    def on_export(self, model: Any) -> None:
        """Merge: W + alpha / r · B A takes the place of each adapted layer's weight."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        if self.save_adapter:
            self._adapter = {
                f"base_model.model.{name.replace('.default.', '.')}": param.detach().cpu().clone()
                for name, param in model.named_parameters()
                if param.requires_grad
            }
        for name, module in list(model.named_modules()):
            if isinstance(module, BaseTunerLayer):
                module.merge()
                model.set_submodule(name, module.get_base_layer())
        del model.peft_config

    @hookimpl
    def on_train_end(self, state: State) -> None:
        """Write `adapter/`, which `peft.PeftModel.from_pretrained(base, folder)` reads."""
        is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        if not self.save_adapter or not is_first:
            return
        from safetensors.torch import save_file

        folder = state.run_dir / "adapter"
        self._config.save_pretrained(folder)
        save_file(self._adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})
