"""Which runs belong together: split by data and metric, grouped into arms by what differs in the config.

Runs of different data or of different metrics never meet in one figure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ftcore.errors import UserError, nearest
from ftcore_report._runs import Run

__all__ = ["Arm", "Part", "choose_baseline", "split"]

LOWER_IS_BETTER = ("nll", "perplexity", "loss")
ABSENT = "(not there)"


@dataclass(kw_only=True)
class Arm:
    """Runs of one recipe.

    Attributes:
        runs: by unit: the seed, and whatever else the runs of an arm are averaged over.
        failed, running, pruned, lacking: runs without a figure: crashed, not done, ended by a plugin, done
            but without the metric.
    """

    label: str
    plugins: frozenset[str]
    runs: dict[Hashable, Run] = field(default_factory=dict)
    failed: list[Run] = field(default_factory=list)
    running: list[Run] = field(default_factory=list)
    pruned: list[Run] = field(default_factory=list)
    lacking: list[Run] = field(default_factory=list)


@dataclass(kw_only=True)
class Part:
    """Arms that may be compared: same data, same metric.

    Attributes:
        metric: its whole name, such as `test/accuracy`.
        sign: 1 where higher is better, else -1.
    """

    metric: str
    sign: int
    data: str
    arms: list[Arm]
    notes: list[str] = field(default_factory=list)


def split(runs: Sequence[Run], by: Sequence[str], over: Sequence[str], metric: str) -> list[Part]:
    """Comparable runs together, each part grouped into arms.

    Args:
        by: keys (or their groups) that make an arm; empty: all that differ. With an option of a plugin,
            the choice of plugins makes arms too.
        over: keys to average over, like the seed. Naming one below `data.` puts runs of different data
            into one part; they are paired by their data as well.
        metric: `accuracy` or `test/accuracy`, `-` before it where smaller is better; empty: the runs' own.

    Raises:
        UserError: a key that no config has, or a metric that no run has.
    """
    known = {key for run in runs for key in run.config}
    for name in (*by, *over):
        if not any(_is_below(key, name) for key in known):
            raise UserError(f"no config key '{name}' in these runs; {nearest(name, known)}")
    one_data = any(name.partition(".")[0] == "data" for name in over)
    data = _inferred(runs, lambda r: r.data, "data.")
    metrics = _inferred(runs, lambda r: _own_metric(r, metric), "task.")
    if metric and not any(metrics):
        names = sorted({name for run in runs for name in run.metrics})
        raise UserError(f"no run has the metric '{metric}'; {nearest(metric, names) or 'none has any'}")
    parts: dict[tuple[str, str], list[Run]] = {}
    for run, source, name in zip(runs, data, metrics, strict=True):
        parts.setdefault(("" if one_data else source, name), []).append(run)
    return [
        _group(those, by, over, name or "no metric", source, dict(zip(map(id, runs), data, strict=True)))
        for (source, name), those in parts.items()
    ]


def _inferred(runs: Sequence[Run], own: Callable[[Run], str], prefix: str) -> list[str]:
    """`own` of each run; of one that has none (it crashed early), that of runs with the same config there."""

    def config(run: Run) -> Hashable:
        return tuple(sorted((k, str(v)) for k, v in run.config.items() if k.startswith(prefix)))

    values = [own(run) for run in runs]
    known = {config(run): value for run, value in zip(runs, values, strict=True) if value}
    rest = set(values) - {""}
    only = rest.pop() if len(rest) == 1 else ""
    return [v or known.get(config(run), only) for run, v in zip(runs, values, strict=True)]


def _own_metric(run: Run, wanted: str) -> str:
    """The name to compare a run by: of the test data where it has them, `-` kept before it."""
    if not run.result or run.state == "pruned":  # before the test data were looked at
        return ""
    metrics, reported = run.metrics, run.result.get("metric", {})
    sign = "-" if (wanted or run.metric).startswith("-") else ""
    name = (wanted or str(reported.get("name", "") if isinstance(reported, dict) else "")).lstrip("-")
    if wanted and "/" in wanted:
        return sign + name if name in metrics else ""
    base = name.rpartition("/")[2]
    for whole in (f"test/{base}", f"eval/{base}"):
        if whole in metrics:
            return sign + whole
    return ""


def _group(
    runs: Sequence[Run],
    by: Sequence[str],
    over: Sequence[str],
    metric: str,
    data: str,
    source: dict[int, str],
) -> Part:
    sign = -1 if metric.startswith("-") or metric.rpartition("/")[2] in LOWER_IS_BETTER else 1
    part = Part(metric=metric.lstrip("-"), sign=sign, data=data, arms=[])
    differing = _differing(runs)
    # An option says nothing without its plugin.
    of_plugins = any(name.startswith("plugin.") for name in by)
    keys = [
        key
        for key in differing
        if not _in(key, over) and (not by or _in(key, by) or (of_plugins and key == "plugin"))
    ]
    rest = [k for k in differing if k not in keys]
    if rest:
        part.notes.append(f"averaged over {', '.join(rest)}, as over seeds")
    arms: dict[tuple[str, ...], Arm] = {}
    # The newest of two runs of one unit is taken: it is the one that the code of today made.
    for run in sorted(runs, key=lambda r: -_time(r)):
        # Options of a plugin that is not chosen are no difference of their own.
        key = tuple(str(run.config.get(k, ABSENT)) for k in keys)
        if key not in arms:
            plugins = frozenset(run.config["plugin"].split("+")) - {"none"}
            arms[key] = Arm(label=_label(run, keys), plugins=plugins)
            part.arms.append(arms[key])
        unit = (run.seed, *(str(run.config.get(k, ABSENT)) for k in rest), source[id(run)])
        _add(part, arms[key], run, unit)
    if len({arm.label for arm in part.arms}) < len(part.arms):  # paths with one last part
        for arm, values in zip(part.arms, arms, strict=True):
            arm.label = " ".join(f"{k}={v}" for k, v in zip(keys, values, strict=True) if v != ABSENT)
    part.arms.sort(key=lambda a: (len(a.plugins), _natural(a.label)))
    return part


def _add(part: Part, arm: Arm, run: Run, unit: Hashable) -> None:
    if run.state == "running":
        arm.running.append(run)
    elif run.state == "pruned":
        arm.pruned.append(run)
    elif run.state != "finished":
        arm.failed.append(run)
    elif part.metric not in run.metrics:
        arm.lacking.append(run)
    elif unit in arm.runs:
        part.notes.append(f"left out: {run.path} repeats {arm.runs[unit].path}")
    else:
        arm.runs[unit] = run


def _time(run: Run) -> float:
    path = run.path / "result.json"
    return path.stat().st_mtime if path.is_file() else 0.0


def _differing(runs: Sequence[Run]) -> list[str]:
    """Keys whose value differs; of a plugin's options, between the runs that chose the plugin."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    found = []
    for key in keys:
        name = key.split(".")[1] if key.startswith("plugin.") else None
        able = [r for r in runs if name is None or name in r.config["plugin"].split("+")]
        if len({str(r.config.get(key, ABSENT)) for r in able}) > 1:
            found.append(key)
    return found


def _is_below(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.")


def _in(key: str, names: Iterable[str]) -> bool:
    return any(_is_below(key, name) for name in names)


def _label(run: Run, keys: Sequence[str]) -> str:
    shown, plugins = [], run.config["plugin"]
    for key in keys:
        if key == "plugin":
            shown.append("no plugin" if plugins == "none" else plugins)
        elif key in run.config:
            name = key.removeprefix("plugin.").removeprefix(f"{plugins}." if "plugin" in keys else "")
            shown.append(f"{name}={_short(run.config[key])}")
        elif not key.startswith("plugin."):
            shown.append(f"{key}={ABSENT}")
    return " ".join(shown) or "all runs"


def _natural(label: str) -> list[tuple[float, str]]:
    """A key that sorts the numbers in labels as numbers."""
    pieces = re.split(r"(\d+(?:\.\d+)?)", label)  # text and numbers by turns
    return [(float(p), "") if i % 2 else (0.0, p) for i, p in enumerate(pieces)]


def _short(value: Any) -> str:
    """A value as it is written on a command line; of a path, its last part."""
    if isinstance(value, str) and value.startswith("/"):
        return value.rpartition("/")[2]
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def choose_baseline(part: Part, named: str) -> Arm | None:
    """The arm to compare with: the named one, else the only one with no plugin that others lack.

    Raises:
        UserError: no arm of that name, or several.
    """
    if named:
        exact = [a for a in part.arms if a.label == named]
        found = exact or [a for a in part.arms if set(named.split()) <= set(a.label.split())]
        if len(found) != 1:
            labels = "; ".join(a.label for a in (found or part.arms))
            raise UserError(f"{'several arms match' if found else 'no arm'} '{named}'; there are: {labels}")
        return found[0]
    everywhere = frozenset.intersection(*(a.plugins for a in part.arms))
    plain = [a for a in part.arms if a.plugins == everywhere]
    if len(part.arms) < 2:
        return None
    if len(plain) != 1:
        alike = f"have {'+'.join(sorted(everywhere))} alone" if everywhere else "have no plugin"
        why = f"{len(plain)} arms {alike}" if plain else "every arm has a plugin of its own"
        part.notes.append(f"no baseline: {why}, so no difference is claimed; name one by --baseline")
        return None
    return plain[0]
