"""Which weights of a model are mixed, and which dropout makes way for it. Reads transformers models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ftcore import UserError

__all__ = ["check_trainable_base", "describe", "linear_weights", "select", "turn_off_dropout"]

KEPT = ("emb", "classifier", "summary", "layer")  # in a config key: not the dropout of a mixed layer


def check_trainable_base(model: Any) -> None:
    """Refuse what has no full-rank, floating-point weights to mix.

    Raises:
        UserError: LoRA or other adapters, or a quantised base.
    """
    names = [name for name, _ in model.named_parameters()]
    if hasattr(model, "peft_config") or any("lora_" in name for name in names):
        raise UserError(
            "mixout can't be combined with LoRA: the base keeps its pretrained weights, so mixing them with"
            " themselves changes nothing, and the adapters have no pretrained weights to be mixed with;"
            " use LoRA's own dropout, or train all weights"
        )
    quantised = getattr(model.config, "quantization_config", None) is not None
    if quantised or not all(p.is_floating_point() for p in model.parameters()):
        raise UserError(
            "mixout can't be combined with a quantised base: its weights are not trained, so they never leave"
            " their pretrained values; load the model in full precision"
        )


def linear_weights(model: nn.Module) -> dict[str, int]:
    """Name to the axis of its input features, of each linear layer's weight that no other layer shares."""
    every = model.named_parameters(remove_duplicate=False)
    uses = Counter(id(param) for _, param in every)
    return {
        f"{name}.weight".lstrip("."): axis
        for name, module in model.named_modules()
        if (axis := _feature_axis(module)) is not None and uses[id(module.weight)] == 1
    }


def _feature_axis(module: nn.Module) -> int | None:
    if isinstance(module, nn.Linear):
        return 1
    return 0 if type(module).__name__ == "Conv1D" and hasattr(module, "nx") else None  # GPT-2's


def select(
    candidates: Mapping[str, int],
    model: nn.Module,
    new: Collection[str],
    include: Sequence[str],
    exclude: Sequence[str],
) -> dict[str, int]:
    """The candidates that are trained, were pretrained, and match the patterns.

    Raises:
        UserError: a pattern that no candidate matches, or nothing left.
    """
    params = dict(model.named_parameters())
    there = [n for n in candidates if n in params and params[n].requires_grad and n not in new]
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not _matches(there, [pattern]):
                raise UserError(
                    f"plugin.mixout.{option}: no weight that can be mixed matches '{pattern}';"
                    f" there are: {', '.join(there[:3])}, ..."
                )
    chosen = _matches(there, include or ["*"])
    chosen -= _matches(there, exclude)
    if not chosen:
        why = f": plugin.mixout.exclude leaves none of its {len(there)}" if there else ""
        raise UserError(f"mixout finds no pretrained linear layer to mix in this model{why}")
    return {name: candidates[name] for name in there if name in chosen}


def _matches(names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    return {name for name in names for pattern in patterns if fnmatchcase(name, pattern)}


def turn_off_dropout(model: Any, mixed: Collection[str]) -> tuple[list[str], list[tuple[Any, str, float]]]:
    """Set to 0 each dropout in a block that holds mixed weights; embeddings and new heads keep theirs.

    Returns:
        What was turned off; and the settings of configs that some models (Falcon, GPT-Neo) read in
        each forward, as (config, key, value before), so that the export can have them back.
    """
    embedding, off = model.get_input_embeddings().weight, []
    configs: dict[int, Any] = {}
    for name, block in model.named_modules():
        holds_mixed = any(f"{name}.{n}".lstrip(".") in mixed for n, _ in block.named_parameters())
        if not holds_mixed:
            continue
        if hasattr(getattr(block, "config", None), "to_dict"):
            configs.setdefault(id(block.config), block.config)
        if all(param is not embedding for param in block.parameters()):  # else a whole stack, or the model
            off += [f"{name}.{found}" for found in _zero(block)]
    settings = [(c, key, value) for c in configs.values() for key, value in _rates(c) if not _kept(key)]
    for config, key, _ in settings:
        setattr(config, key, 0.0)
    return off, settings


def _zero(block: nn.Module) -> Iterator[str]:
    """Set a block's own dropout rates, and those of the dropout modules right in it, to 0."""
    for key, _ in list(_rates(block)):
        if "layer" not in key:
            setattr(block, key, 0.0)
            yield key
    for name, child in block.named_children():
        if isinstance(child, nn.modules.dropout._DropoutNd) and child.p:
            child.p = 0.0
            yield name


def _kept(key: str) -> bool:
    return any(part in key for part in KEPT)


def _rates(owner: Any) -> Iterator[tuple[str, float]]:
    """Attributes that are dropout rates above 0."""
    for key, value in vars(owner).items():
        if "drop" in key and isinstance(value, float | int) and not isinstance(value, bool) and value:
            yield key, float(value)


def describe(model: nn.Module, mixed: Mapping[str, int], off: Sequence[str]) -> dict[str, Any]:
    """The manifest: what is mixed, how much of the model that is, and which dropout is off."""
    params = dict(model.named_parameters())
    count = sum(params[name].numel() for name in mixed)
    return {
        "mixed": list(mixed),
        "mixed_parameters": count,
        "share_of_parameters": round(count / sum(p.numel() for p in params.values()), 4),
        "dropout_off": list(off),
    }
