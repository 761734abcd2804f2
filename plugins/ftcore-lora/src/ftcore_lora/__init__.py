"""LoRA (Hu et al., 2021), through peft, as an ftcore plugin: `ftcore +plugin=lora`."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Collection, Generator
from dataclasses import field
from typing import Any

import torch
from torch import Tensor

from ftcore import State, UserError, hookimpl, plugin
from ftcore.strategies import base_model

__all__ = ["LoRA", "modules"]


def modules(model: Any, include: Collection[str], new: Collection[str]) -> list[str]:
    """Full names of the modules to adapt; what is new (`new` names its parameters) is trained whole instead.

    Args:
        include: names, each the last parts of a module's (`query`, `attention.self.query`); none is peft's
            choice for the model, `all-linear` alone every linear layer but the output layer and tied ones.

    Raises:
        UserError: a name that fits no module, or one whose update could not be merged.
    """
    trained_whole = {name.rpartition(".")[0] for name in new}
    there = {n: m for n, m in model.named_modules() if n not in trained_whole}
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    if list(include) == ["all-linear"]:
        output = model.get_output_embeddings()
        return [
            n
            for n, m in there.items()
            if _is_linear(m) and m is not output and uses[id(m.weight)] == 1  # a tied one has more
        ]
    linear = sorted({n.rpartition(".")[2] for n, m in there.items() if _is_linear(m)})
    known = f"linear layers are {', '.join(linear)}; [all-linear], with no other name, is all of them"
    if not (names := include or _usual(model.config.model_type)):
        kind = model.config.model_type
        raise UserError(f"plugin.lora.include: peft has no choice for a model of type {kind}; {known}")
    found: list[str] = []
    for name in names:
        fits = [n for n in there if n == name or n.endswith(f".{name}")]
        if not fits:
            raise UserError(f"plugin.lora.include: no pretrained module is called '{name}'; {known}")
        for one in fits:
            _check_mergeable(one, there[one], uses)
        found += [n for n in fits if n not in found]
    return found


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: torch.nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nx")  # GPT-2's


def _usual(model_type: str) -> list[str]:
    """What peft adapts in such a model; nothing where it knows of none."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL

    names = USUAL.get(model_type)
    return list(names) if isinstance(names, list) else []


def _check_mergeable(name: str, module: Any, uses: Counter[int]) -> None:
    if not _is_linear(module) and not isinstance(module, torch.nn.Embedding):
        raise UserError(
            f"plugin.lora.include: {name} is a {type(module).__name__}; only linear layers and embeddings can"
            " be adapted"
        )
    if uses[id(module.weight)] > 1:
        raise UserError(
            f"plugin.lora.include: {name} shares its weight with another module, which an update merged into"
            " it would change too; leave it out"
        )


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
        self._layers: list[Any] = []

    @hookimpl
    def setup_model(self, model: Any, cfg: Any, new: frozenset[str]) -> None:
        """Put adapters beside linear layers, in place: the model stays of its class."""
        import peft

        if cfg.model.add_tokens:
            raise UserError("lora freezes the embeddings, so model.add_tokens would never be trained")
        if getattr(model.config, "quantization_config", None) is not None:
            raise UserError("lora trains on full-precision bases only, as it merges on export")
        heads = [param for name, param in model.named_parameters() if name in new]
        adapted = modules(model, self.include, new)
        options: dict[str, Any] = {
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": adapted,
            "fan_in_fan_out": any(_is_conv1d(model.get_submodule(name)) for name in adapted),
        }
        self._config = peft.LoraConfig(
            **options,
            modules_to_save=sorted({name.rpartition(".")[0] for name in new}) or None,
            base_model_name_or_path=cfg.model.path,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            peft.inject_adapter_in_model(peft.LoraConfig(**options), model)
        for param in heads:
            param.requires_grad_(True)
        self._layers = [model.get_submodule(name) for name in adapted]
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self._manifest = {
            "adapted": adapted,
            "trained_parameters": trained,
            "share_of_parameters": round(trained / sum(p.numel() for p in model.parameters()), 4),
        }

    def describe(self) -> dict[str, Any]:
        """What is adapted and how much is trained, for run.json and `ftcore plan`."""
        return self._manifest

    @hookimpl(wrapper=True)
    def predict(self) -> Generator[None, Any, Any]:
        """Evaluate what will be exported: merged weights round otherwise, in 16 bits by much."""
        weights = [layer.get_base_layer().weight for layer in self._layers]
        own = [weight.data for weight in weights]
        for layer, weight in zip(self._layers, weights, strict=True):
            weight.data = weight.data.clone()
            layer.merge()
        try:
            return (yield)
        finally:
            for layer, weight, data in zip(self._layers, weights, own, strict=True):
                weight.data = data  # taking the update off again would not give the same weight
                layer.merged_adapters.clear()

    @hookimpl
    def on_export(self, model: torch.nn.Module) -> None:
        """Merge: W + alpha / r · B A takes the place of each adapted layer's weight."""
        base = base_model(model)
        if self.save_adapter:
            self._adapter = {
                f"base_model.model.{name.replace('.default.', '.').removesuffix('.default')}": (
                    param.detach().cpu().clone()
                )
                for name, param in base.named_parameters()
                if param.requires_grad
            }
        for name, layer in zip(self._manifest["adapted"], self._layers, strict=True):
            layer.merge()
            base.set_submodule(name, layer.get_base_layer())
        self._layers = []
        del base.peft_config

    @hookimpl
    def on_train_end(self, state: State) -> None:
        """Write `adapter/`, which `peft.PeftModel.from_pretrained(base, folder)` reads."""
        if torch.distributed.is_initialized() and torch.distributed.get_rank():
            return
        from safetensors.torch import save_file

        folder = state.run_dir / "adapter"
        shutil.rmtree(folder, ignore_errors=True)  # of a run that force=true has replaced
        if self._adapter:  # a run that was pruned exports nothing
            self._config.save_pretrained(folder)
            save_file(self._adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})
