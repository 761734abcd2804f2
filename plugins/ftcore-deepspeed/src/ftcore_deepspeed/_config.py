"""DeepSpeed's JSON, made from the one config; and a JSON of the user's own, compared with it key by key."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ftcore import UserError
from ftcore.config import Config
from ftcore.errors import nearest
from ftcore_deepspeed._memory import BUCKET

if TYPE_CHECKING:
    from ftcore_deepspeed._plugin import DeepSpeed

__all__ = ["accepted", "check_known", "derive"]

REFUSED = {
    "scheduler": "the schedule is optim.schedule and optim.warmup",
    "managed_gradient_accumulation": "ftcore says where a step ends",
    "torch_autocast": "train.precision sets autocast",
    "amp": "train.precision sets autocast",
    "data_types": "gradients are accumulated in fp32",
    "data_efficiency": "ftcore chooses the rows",
    "curriculum_learning": "ftcore chooses the rows",
    "checkpoint": "ftcore writes the checkpoints",
    "sequence_parallel_size": "every rank has rows of its own",
    "zero_optimization.round_robin_gradients": "ftcore could not tell whose a slice is",
}
"""Keys of the engine that would take over what ftcore does itself, or hide from it where things are."""

SPELT_OUT = ("optimizer", "bf16", "fp16")
"""Sections of which nothing reaches the engine: what they say is said by ftcore's config."""


def derive(cfg: Config, options: DeepSpeed, world_size: int) -> tuple[dict[str, Any], list[str]]:
    """What the engine is given: ftcore's own settings, and what else stands in the file `trainer.config`.

    Accumulation, clipping and precision are not the engine's (1, 0, fp32): core's loop does them, in one
    way for every strategy.

    Returns:
        The JSON, and the dotted keys that go to the engine as they are in the file, untested.

    Raises:
        UserError: the file contradicts the config (both values are named), or can't be read.
    """
    zero: dict[str, Any] = {"stage": options.stage, "reduce_bucket_size": BUCKET}
    if options.stage in (1, 2) and not options.offload_optimizer and cfg.train.precision != "fp16":
        zero["compute_grad_norm"] = False  # ftcore does; under fp16 the engine's makes it skip an overflow
    if options.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if options.offload_params:
        zero["offload_param"] = {"device": "cpu"}
    engine = {
        "train_micro_batch_size_per_gpu": cfg.micro_batch_size(world_size),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    given, facts, passed = _read(options.config), _facts(cfg, options, world_size), []
    for key, value in _leaves(given):
        section = key.partition(".")[0]
        if reason := REFUSED.get(section) or REFUSED.get(key):
            raise UserError(f"{options.config}: {key} can't be set: {reason}; take it out")
        if key in facts:
            name, ours = facts[key]
            if value != "auto" and _plain(value) != _plain(ours):
                raise UserError(f"{options.config}: {key} is {value}, but {name} is {ours}; make them agree")
        elif section not in SPELT_OUT:
            passed.append(key)
            _put(engine, key, value)
        elif section == "optimizer" or _plain(given[section].get("enabled")) is True:
            raise UserError(f"{options.config}: {key} would do nothing: use optim.* and train.*; take it out")
    return engine, passed


@contextlib.contextmanager
def accepted(path: str | None, passed: list[str]) -> Iterator[None]:
    """What DeepSpeed has against keys that a user's file gave it is the user's to mend: one line.

    Raises:
        UserError: names the file, the keys and what DeepSpeed said.
    """
    try:
        yield
    except Exception as error:
        if not passed or isinstance(error, (UserError, torch.OutOfMemoryError)):
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"trainer.config={path}: DeepSpeed can't start with it: {said} (what it has from there:"
            f" {', '.join(passed)})"
        ) from error


def check_known(engine: Mapping[str, Any], path: str | None, passed: list[str]) -> None:
    """Refuse a key that DeepSpeed never looks at: it would do nothing, and DeepSpeed doesn't say so.

    Raises:
        UserError: names the key, and the nearest of those that DeepSpeed knows.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    asked: set[str] = set()
    DeepSpeedConfig(_Read(copy.deepcopy(dict(engine)), "", asked))
    starts = (accumulate(key.split("."), "{}.{}".format) for key in passed)  # a, a.b, a.b.c
    for key in chain.from_iterable(starts):
        group = key.rpartition(".")[0]
        known = {name for name in asked if name.rpartition(".")[0] == group}
        if known and key not in asked:  # where a section is read as a whole, DeepSpeed says what is unknown
            raise UserError(f"trainer.config={path}: DeepSpeed has no '{key}'; {nearest(key, known)}")


class _Read(dict[str, Any]):
    """A dict that notes what it, and the dicts in it, were asked for, by dotted keys."""

    def __init__(self, plain: Mapping[str, Any], prefix: str, asked: set[str]) -> None:
        super().__init__(
            {k: _Read(v, f"{prefix}{k}.", asked) if isinstance(v, dict) else v for k, v in plain.items()}
        )
        self._prefix, self._asked = prefix, asked

    def __contains__(self, key: object) -> bool:
        self._asked.add(f"{self._prefix}{key}")
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self._asked.add(f"{self._prefix}{key}")
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._asked.add(f"{self._prefix}{key}")
        return super().get(key, default)

    def keys(self) -> Any:
        return super().keys() if self._prefix else self  # by `in self.keys()` it asks, too


def _facts(cfg: Config, options: DeepSpeed, world_size: int) -> dict[str, tuple[str, Any]]:
    """Dotted key of a DeepSpeed JSON: what says the same in ftcore, and its value."""
    micro, precision = cfg.micro_batch_size(world_size), cfg.train.precision
    accumulation = -(-cfg.train.batch_size // (micro * world_size))
    offload = {True: "cpu", False: "none"}
    facts = {
        "train_batch_size": ("train.batch_size", cfg.train.batch_size),
        "train_micro_batch_size_per_gpu": ("train.micro_batch_size", micro),
        "gradient_accumulation_steps": ("what train.batch_size and the ranks leave", accumulation),
        "gradient_clipping": ("train.max_grad_norm", cfg.train.max_grad_norm or 0.0),
        "bf16.enabled": (f"train.precision={precision}, so it", precision == "bf16"),
        "fp16.enabled": (f"train.precision={precision}, so it", precision == "fp16"),
        "optimizer.type": ("ftcore's optimiser", "AdamW"),
        "optimizer.params.lr": ("optim.lr", cfg.optim.lr),
        "optimizer.params.betas": ("optim.betas", list(cfg.optim.betas)),
        "optimizer.params.eps": ("optim.eps", cfg.optim.eps),
        "optimizer.params.weight_decay": ("optim.weight_decay", cfg.optim.weight_decay),
        "zero_allow_untested_optimizer": ("ftcore's own setting", True),
        "zero_force_ds_cpu_optimizer": ("ftcore's own setting", False),
        "zero_optimization.stage": ("trainer.stage", options.stage),
    }
    for key, option in (("offload_optimizer", "offload_optimizer"), ("offload_param", "offload_params")):
        name = f"trainer.{option}={getattr(options, option)}, so it"
        facts[f"zero_optimization.{key}.device"] = (name, offload[getattr(options, option)])
    return facts


def _plain(value: Any) -> Any:
    """A value as it is compared: 1, 1.0 and "1e0" are one number, "True" is true, case is no matter."""
    if isinstance(value, list):
        return [_plain(v) for v in value]
    text = str(value).strip().lower()
    if text in ("true", "false"):
        return text == "true"
    try:
        return float(text)
    except ValueError:
        return text


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _put(node: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a dotted key; "auto", which asks for a value of ours, has none here and is left to the engine."""
    *groups, last = dotted.split(".")
    for group in groups:
        node = node.setdefault(group, {})
    if value != "auto":
        node[last] = value


def _read(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"trainer.config={path} can't be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"trainer.config={path} must hold a JSON object, not a {type(found).__name__}")
    return found
