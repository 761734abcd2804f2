"""Run directories as they lie on the disk: read, judged, never written. What can't be read is named.

Nothing here trusts a file: a run may be half written, damaged, or another program's.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import yaml
from numpy.typing import NDArray

from ftcore.config import UNESSENTIAL
from ftcore.errors import UserError
from ftcore.lease import touched
from ftcore_report._rows import row_scores

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Problem", "Run", "find_runs", "is_number", "read_records", "read_table"]

MARKS = ("config.yaml", "run.json", "result.json", "metrics.jsonl")
BELOW = {"model", "checkpoints", "predictions", "wandb"}  # of a run: nothing to look for in there
NOT_THE_RECIPE = {"seed", "name", "force", "offline", *(f"train.{key}" for key in UNESSENTIAL)}
HUGE = 1e150
Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Problem:
    """A directory that is left out, and why."""

    path: Path
    why: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run.

    Attributes:
        config: dotted key to value, what makes the recipe (no seed); `plugin` is the chosen names.
        state: `finished`, `pruned` (ended by a plugin), `running`, `failed` (by `failed.json`, or left
            without a result).
        result: of `result.json`; empty where there is none.
        about: of `run.json`; empty where there is none.
        error: of `failed.json`; empty where there is none.
    """

    path: Path
    config: Mapping[str, Any]
    seed: int
    metric: str  # task.metric, `-` before it where smaller is better; empty: the task's own
    state: str
    result: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    _scores: dict[str, NDArray[np.float64] | None] = field(default_factory=dict, repr=False)

    @property
    def metrics(self) -> Mapping[str, float]:
        """Metrics by name: those that are finite, and whose variance is (perplexities may be anything)."""
        found = self.result.get("metrics", {})
        return {k: float(v) for k, v in found.items() if is_number(v) and abs(v) < HUGE}

    @property
    def data(self) -> str:
        """Identifies the data that the figures are of; empty where it is not known.

        Files as they are. Of data that a plugin made, which may be other training rows in each arm, the
        rows that are evaluated.
        """
        about = self.about.get("data", {})
        if about.get("from_files") is False and isinstance(splits := about.get("splits"), dict):
            found = [(s, splits[s].get("sha256")) for s in ("validation", "test") if s in splits]
            return hashlib.sha256(repr(found).encode()).hexdigest()[:16]
        return str(about.get("source") or about.get("fingerprint") or "")

    @property
    def made_by(self) -> Mapping[str, str]:
        """The version of ftcore, and of each plugin with the start of its source's hash, where known."""
        plugins = [p for p in self.about.get("plugins", []) if isinstance(p, dict)]
        found = {str(p.get("name")): f"{p.get('version')} ({str(p.get('source'))[:8]})" for p in plugins}
        return {"ftcore": str(self.about["ftcore"]), **found} if "ftcore" in self.about else found

    @cached_property
    def test(self) -> pa.Table | None:
        """Predictions of the test data: `row`, `label`, `prediction`, `scores` where there are classes."""
        return read_table(self.path / "predictions" / "test.parquet")

    @cached_property
    def memory_mb(self) -> float | None:
        """Peak memory by its training records; None where they don't say."""
        found = [r["memory_mb"] for r in read_records(self.path) if is_number(r.get("memory_mb"))]
        return max(found, default=None)

    def row_scores(self, metric: str) -> NDArray[np.float64] | None:
        """The metric's score of each test row, where there are such."""
        if metric not in self._scores:
            self._scores[metric] = None if self.test is None else row_scores(self.test, metric)
        return self._scores[metric]


def find_runs(directories: Sequence[Path]) -> tuple[list[Run], list[Problem]]:
    """All runs at or below the directories, by path, and the directories that look like runs and are none.

    Raises:
        UserError: no such directory.
    """
    for directory in directories:
        if not directory.is_dir():
            raise UserError(f"no directory {directory}")
    runs, problems = [], []
    paths: dict[Path, Path] = {}  # one that is named twice, perhaps by a link (`runs/latest`), is one
    for path in (p for d in directories for p in _candidates(d)):
        paths.setdefault(path.resolve(), path)
    for path in paths.values():
        try:
            runs.append(_read(path))
        except (OSError, ValueError) as error:
            problems.append(Problem(path, str(error)))
    return runs, problems


def _candidates(directory: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(directory):
        is_run = any(mark in files for mark in MARKS)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and not (is_run and f in BELOW))
        if is_run:
            yield Path(root)


def _read(path: Path) -> Run:
    """One run; `ValueError` says what is wrong with it."""
    plain = _config(path / "config.yaml")
    result = _json(path / "result.json")
    if result and not _is_result(result):
        raise ValueError("result.json is no result of ftcore")
    about = _json(path / "run.json")
    if not isinstance(about.get("data", {}), dict) or not isinstance(about.get("plugins", []), list):
        raise ValueError("run.json is no description by ftcore")
    failed = _json(path / "failed.json")
    state = {
        "finished": "finished",
        "pruned": "pruned",
        "": "running" if touched(path) is not None else "failed",
    }
    return Run(
        path=path,
        config=_recipe(plain),
        seed=plain["seed"],
        metric=str(plain["task"].get("metric") or ""),
        state=state.get(str(result.get("status", "")), "failed"),
        result=result,
        about=about,
        error=str(failed.get("error", "")),
    )


def _is_result(found: Mapping[str, Any]) -> bool:
    """Whether what is shown of a result has the kinds that core writes; what is not there may lack."""
    metric, costs = found.get("metric"), found.get("plugin_cost", {})
    named = metric is None or (isinstance(metric, dict) and isinstance(metric.get("name"), str | None))
    return (
        isinstance(found.get("status"), str)
        and isinstance(found.get("metrics", {}), dict)
        and named
        and isinstance(costs, dict)
        and all(isinstance(cost, dict) for cost in costs.values())
    )


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError("config.yaml is missing")
    try:
        plain: Any = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config.yaml can't be read: {str(error).splitlines()[0]}") from None
    groups = ("model", "data", "task", "optim", "train")
    good = isinstance(plain, dict) and all(isinstance(plain.get(g), dict) for g in groups)
    good = good and isinstance(plain.get("plugin"), dict | None)
    if not good or not isinstance(plain.get("seed"), int):
        raise ValueError("config.yaml is not ftcore's, or is half written")
    found: dict[str, Any] = plain
    return found


def _json(path: Path) -> dict[str, Any]:
    """The object of a JSON file; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the decoder, and of the encoding
        raise ValueError(f"{path.name} can't be read: {str(error).splitlines()[0]}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} holds no object")
    return found


def _recipe(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The config flattened: what makes two runs two recipes."""
    plugins = plain.get("plugin") or {}
    flat: dict[str, Any] = {"plugin": "+".join(plugins) or "none"}

    def add(prefix: str, node: Any) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                add(f"{prefix}.{key}" if prefix else str(key), value)
        elif prefix not in NOT_THE_RECIPE:
            flat[prefix] = tuple(map(str, node)) if isinstance(node, list) else node

    add("", {key: value for key, value in plain.items() if key != "plugin"})
    add("plugin", plugins)
    return flat


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a run's `metrics.jsonl`; a half-written last line is left out."""
    try:
        lines = (path / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and is_number(record.get("step")):
            found.append(record)
    return found


def read_table(path: Path) -> pa.Table | None:
    """A predictions file; None where there is none or it can't be read."""
    if not path.is_file():
        return None
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:  # `read_table` would import pandas
            return file.read()
    except (OSError, pa.ArrowException):
        return None


def is_number(value: Any) -> TypeGuard[float]:
    """Whether this is a finite number; JSON that Python wrote may hold others."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
