"""From a command line to a search space, in Hydra's own grammar.

optim.lr=tag(log, interval(1e-5, 1e-3))    a float, drawn in the logarithm
plugin.mixout.p=interval(0, 0.9)           a float; asked for in trials that choose mixout
train.batch_size=8,16,32                   one of
'+plugin=[],mixout,[mixout,contrastive]'   one of
train.epochs=range(2, 6)                   2, 3, 4 or 5
train.epochs=int(interval(2, 5))           the same
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from ftcore.compose import UNNAMED
from ftcore.errors import UserError

__all__ = ["Space", "distribution"]

MAX_COMBINATIONS = 1000
MAX_SAMPLES = 20


@dataclass(frozen=True)
class Space:
    """What a study draws, and what stays: `KEY=VALUE` as on the command line.

    Attributes:
        overrides: key to text, where it stays, or to what it is drawn from; later ones replace earlier.
        selects: which plugins a list of overrides chooses.
    """

    overrides: dict[str, str | BaseDistribution]
    selects: Callable[[Sequence[str]], Sequence[str]]

    @classmethod
    def parse(cls, overrides: Sequence[Override], selects: Callable[[Sequence[str]], Sequence[str]]) -> Space:
        """Of Hydra's overrides.

        Raises:
            UserError: nothing is drawn; a sweep that is no distribution; options of a plugin that no
                trial would choose.
        """
        found = {
            o.get_key_element(): distribution(o) if o.is_sweep_override() else o.get_value_element_as_str()
            for o in overrides
        }
        space = cls(found, selects)
        if not any(isinstance(v, BaseDistribution) for v in found.values()):
            raise UserError(
                "nothing to search: give some key a set of values, as in"
                " optim.lr='tag(log, interval(1e-5, 1e-3))' train.batch_size=8,16"
            )
        space._check_plugins()
        return space

    def draw(self, value: Callable[[str, BaseDistribution], Any]) -> list[str]:
        """One trial's overrides, by the value of a key and its distribution.

        Options of a plugin that it does not choose are neither drawn nor set.
        """

        def drawn(key: str) -> str:
            found = self.overrides[key]
            return f"{key}={value(key, found) if isinstance(found, BaseDistribution) else found}"

        chosen = [drawn(key) for key in self.overrides if not _of(key)]
        plugins = set(self.selects(chosen))
        return chosen + [drawn(key) for key in self.overrides if _of(key) in plugins]

    def samples(self) -> Iterator[list[str]]:
        """Overrides of a few trials: each choice of a key is in one, those of plugins and models first."""
        first = {key: _choices(value)[0] for key, value in self.overrides.items()}
        keys = sorted(first, key=lambda key: "." in key)
        others = [first | {key: value} for key in keys for value in _choices(self.overrides[key])[1:]]
        for trial in [first, *others][:MAX_SAMPLES]:
            yield self.draw(lambda key, _, trial=trial: trial[key])  # type: ignore[misc]

    def describe(self) -> dict[str, str]:
        """Each key that changes a run and what it is or is drawn from, as text: equal for equal spaces."""
        return {key: str(value) for key, value in sorted(self.overrides.items()) if key not in UNNAMED}

    def _check_plugins(self) -> None:
        needed = {_of(key): key for key in self.overrides if _of(key)}
        groups = {
            key: _choices(value)
            for key, value in self.overrides.items()
            if "." not in key and not isinstance(value, IntDistribution | FloatDistribution)
        }
        combinations = itertools.islice(itertools.product(*groups.values()), MAX_COMBINATIONS)
        for values in combinations:
            if not needed:
                return
            for name in self.selects([f"{k}={v}" for k, v in zip(groups, values, strict=True)]):
                needed.pop(name, None)
        for name, key in needed.items():
            raise UserError(f"'{key}' has no effect: no trial chooses '{name}'; add it to +plugin=")


def _of(key: str) -> str:
    """The plugin whose option `key` is; empty where it is none."""
    parts = key.lstrip("+").split(".")
    return parts[1] if parts[0] == "plugin" and len(parts) > 2 else ""


def _choices(value: str | BaseDistribution) -> Sequence[Any]:
    """What a key may be; of an interval, its ends."""
    if isinstance(value, CategoricalDistribution):
        return list(value.choices)
    if isinstance(value, IntDistribution | FloatDistribution):
        return [value.low, value.high]
    return [value]


def distribution(override: Override) -> BaseDistribution:
    """What a sweep's values are drawn from.

    Raises:
        UserError: it is none of Optuna's.
    """
    key, sweep = override.get_key_element(), override.value()
    tags = set(getattr(sweep, "tags", ()))
    if tags - {"log"}:
        raise UserError(f"{key}: no tag '{min(tags - {'log'})}' is known; known: log")
    if isinstance(sweep, IntervalSweep):
        low, high = sweep.start, sweep.end
        ends = (low, high)
        if None in ends or not all(map(math.isfinite, ends)) or low > high or (tags and low <= 0):
            start = ", from above 0" if tags else ""
            raise UserError(f"{key}: an interval goes up{start}, between two numbers")
        kind = IntDistribution if isinstance(low, int) and isinstance(high, int) else FloatDistribution
        return kind(low, high, log=bool(tags))
    if tags:
        raise UserError(f"{key}: 'log' is for intervals: tag(log, interval(...))")
    if isinstance(sweep, RangeSweep):
        points: list[Any] = list(override.sweep_iterator())
        if len(points) > 1 and all(isinstance(p, int) for p in points) and points[0] < points[-1]:
            return IntDistribution(points[0], points[-1], step=points[1] - points[0])
        return CategoricalDistribution([str(p) for p in points])
    if isinstance(sweep, ChoiceSweep) or override.is_discrete_sweep():
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    raise UserError(f"{key}: can't draw from {override.get_value_element_as_str()}")
