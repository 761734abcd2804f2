"""From arms to figures: one line an arm, its difference to the baseline, and what may be said of it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ftcore.errors import UserError
from ftcore_report import _stats
from ftcore_report._arms import Arm, Part, choose_baseline, split
from ftcore_report._rows import is_degenerate
from ftcore_report._runs import Run, is_number

if TYPE_CHECKING:
    from ftcore_report._stats import Difference

__all__ = ["ALPHA", "Comparison", "Line", "compare"]

ALPHA = 0.05
PAIRS_FROM = 6  # shared seeds that make a pairing worth more than the runs that it leaves out
MANY_SEEDS = 1000  # more than anyone will run: said as such


@dataclass(kw_only=True)
class Line:
    """One arm in figures.

    Attributes:
        best: by the metric's direction.
        degenerate: runs that are no better than the majority class on the test data; None: not known.
        seconds, tokens_per_second, memory_mb: means over its runs; None where not recorded. Memory is the
            peak of the GPU, or else of the process, which jobs of one sweep may share.
        p: adjusted by Holm over the arms of this comparison.
        corrected: the interval at the level that Holm tests this arm at.
        verdict: what may be said, in words.
    """

    arm: str
    runs: list[Run]
    values: list[float]
    failed: int
    degenerate: int | None
    mean: float | None = None
    sd: float | None = None
    median: float | None = None
    best: float | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    memory_mb: float | None = None
    difference: Difference | None = None
    p: float | None = None
    corrected: tuple[float, float] | None = None
    verdict: str = ""

    @property
    def is_called(self) -> bool:
        """Whether a difference may be claimed: Holm's p below 0.05, and the corrected interval without 0."""
        if self.p is None or self.corrected is None:
            return False
        return self.p < ALPHA and not self.corrected[0] <= 0 <= self.corrected[1]


@dataclass(kw_only=True)
class Comparison:
    """All arms on one data set by one metric; `notes` are what a reader has to know."""

    metric: str
    sign: int
    data: str
    baseline: str | None
    lines: list[Line]
    notes: list[str] = field(default_factory=list)


def compare(
    runs: Sequence[Run],
    *,
    by: Sequence[str] = (),
    over: Sequence[str] = (),
    metric: str = "",
    baseline: str = "",
) -> list[Comparison]:
    """Compare arms of runs; one `Comparison` for each data set and metric among them.

    Raises:
        UserError: an unknown key or metric, or a baseline that no comparison has.
    """
    parts = split(runs, by, over, metric)
    errors: list[UserError] = []
    found = []
    for part in parts:
        try:
            base = choose_baseline(part, baseline)
        except UserError as error:
            errors.append(error)
            part.notes.append(str(error))
            base = None
        found.append(_compare_part(part, base))
    if errors and len(errors) == len(parts):
        raise errors[0]
    return found


def _compare_part(part: Part, baseline: Arm | None) -> Comparison:
    lines = {arm.label: _line(part, arm) for arm in part.arms}
    for arm in part.arms:
        _note_missing(part, arm)
    _note_versions(part)
    if part.metric.startswith("eval/"):
        part.notes.append("validation figures, which also chose the weights: no test data was scored")
    if baseline is not None:
        _differences(part, baseline, lines)
    return Comparison(
        metric=part.metric,
        sign=part.sign,
        data=part.data,
        baseline=baseline.label if baseline else None,
        lines=list(lines.values()),
        notes=part.notes,
    )


def _line(part: Part, arm: Arm) -> Line:
    runs = list(arm.runs.values())
    values = np.array([run.metrics[part.metric] for run in runs])
    known = [bad for run in runs if (bad := is_degenerate(run.test)) is not None]
    line = Line(
        arm=arm.label,
        runs=runs,
        values=values.tolist(),
        failed=len(arm.failed),
        degenerate=sum(known) if known and len(known) == len(runs) else None,
        seconds=_mean([run.result.get("seconds") for run in runs]),
        tokens_per_second=_mean([_rate(run) for run in runs]),
        memory_mb=_mean([run.memory_mb for run in runs]),
    )
    if len(values):
        line.mean, line.median = float(values.mean()), float(np.median(values))
        line.best = float((part.sign * values).max() * part.sign)
        line.sd = float(values.std(ddof=1)) if len(values) > 1 else None
    return line


def _mean(values: Sequence[object]) -> float | None:
    numbers = [float(v) for v in values if is_number(v)]
    return float(np.mean(numbers)) if numbers and len(numbers) == len(values) else None


def _rate(run: Run) -> float | None:
    tokens, seconds = run.result.get("tokens"), run.result.get("seconds")
    if not isinstance(tokens, int) or not is_number(seconds) or seconds <= 0:
        return None
    return tokens / seconds


def _note_missing(part: Part, arm: Arm) -> None:
    """Name what an arm's figures are without."""
    for what, runs in (
        ("failed or stopped without a result", arm.failed),
        ("running", arm.running),
        ("pruned", arm.pruned),
        (f"without {part.metric}", arm.lacking),
    ):
        if runs:
            named = ", ".join(_why(run) for run in runs)
            part.notes.append(f"left out of {arm.label}: {len(runs)} {what}: {named}")


def _note_versions(part: Part) -> None:
    """Name what is not the same code in all runs: it may be what their figures differ by."""
    made: dict[str, set[str]] = {}
    for run in (run for arm in part.arms for run in arm.runs.values()):
        for name, version in run.made_by.items():
            made.setdefault(name, set()).add(version)
    for name, versions in made.items():
        if len(versions) > 1:
            part.notes.append(f"these runs are of several versions of {name}: {', '.join(sorted(versions))}")


def _why(run: Run) -> str:
    return f"{run.path} ({run.error})" if run.error else str(run.path)


def _differences(part: Part, baseline: Arm, lines: dict[str, Line]) -> None:
    """Fill in difference, p, interval and verdict of every arm but the baseline."""
    base = lines[baseline.label]
    base.verdict = "baseline"
    tested = []
    others = sum(len(arm.runs) > 1 for arm in part.arms) - 1 if len(baseline.runs) > 1 else 0
    alpha = ALPHA / max(1, others)
    for arm in part.arms:
        line = lines[arm.label]
        if arm is baseline or not line.runs or not base.runs:
            continue
        line.difference = _difference(part, arm, baseline, alpha)
        if line.difference.p is None:
            line.verdict = "one seed: nothing can be said"
        else:
            tested.append((line, line.difference, line.difference.p))
    levels = _stats.holm([p for *_, p in tested])
    for (line, d, _), (adjusted, share) in zip(tested, levels, strict=True):
        line.p, line.corrected = adjusted, _stats.interval(d, ALPHA * share)
        line.verdict = _verdict(line, d, part.sign, alpha)


def _difference(part: Part, arm: Arm, baseline: Arm, alpha: float) -> Difference:
    """Paired by unit where the arms have the same ones; by test row where every run scored the same rows."""
    shared = [unit for unit in arm.runs if unit in baseline.runs]
    several = len(shared) > 1 or len(arm.runs) == len(baseline.runs) == 1
    paired = several and (len(shared) >= PAIRS_FROM or len(shared) == len(arm.runs) == len(baseline.runs))
    left = {*arm.runs, *baseline.runs} - set(shared) if paired else set()
    if left:
        part.notes.append(
            f"difference of {arm.label}: paired by seed, without"
            f" {len(left)} run(s) whose seed only one arm has: {_seeds(left)}"
        )
    ours = [arm.runs[u] for u in (shared if paired else arm.runs)]
    theirs = [baseline.runs[u] for u in (shared if paired else baseline.runs)]
    tables, why_not = _by_row(part, [*ours, *theirs])
    if tables is None:
        tables = np.array([[run.metrics[part.metric]] for run in [*ours, *theirs]])
        if (note := f"intervals resample seeds only: {why_not}") not in part.notes:
            part.notes.append(note)
    of_rows, n = not why_not and tables.shape[1] > 1, len(ours)
    return _stats.difference(tables[:n], tables[n:], paired=paired, rows=of_rows, alpha=alpha)


def _seeds(units: set[Hashable]) -> str:
    return ", ".join(sorted(str(unit[0]) if isinstance(unit, tuple) else str(unit) for unit in units))


def _by_row(part: Part, runs: Sequence[Run]) -> tuple[NDArray[np.float64] | None, str]:
    """Scores [runs, rows] whose means are the runs' metrics, or None and why not."""
    prefix, _, name = part.metric.partition("/")
    if prefix != "test":
        return None, f"{part.metric} is not of the test data"
    tables, rows = [], None
    for run in runs:
        if run.test is None:
            return None, f"{run.path} has no predictions/test.parquet"
        scores = run.row_scores(name)
        if scores is None or abs(scores.mean() - run.metrics[part.metric]) > 1e-6 * max(1, scores.max()):
            return None, f"{name} is no mean over rows that their predictions give"
        if not {"row", "label"} & set(run.test.column_names):
            return None, f"the predictions of {run.path} don't say which rows they are of"
        here = run.test.select([c for c in ("row", "label", "target") if c in run.test.column_names])
        if rows is not None and not here.equals(rows):
            return None, f"{run.path} was not scored on the same test rows as {runs[0].path}"
        rows = here
        tables.append(scores)
    return np.array(tables), ""


def _verdict(line: Line, d: Difference, sign: int, alpha: float) -> str:
    if line.is_called:
        return "better" if d.value * sign > 0 else "worse"
    need = _stats.needed(d, alpha)
    if need is None:
        return "not distinguishable: no difference seen"
    if need.rows is not None:
        return f"not distinguishable: needs about {need.rows:,} test rows (there are {d.rows:,}), not seeds"
    assert need.seeds is not None
    more = max(1, need.seeds - min(d.runs))
    if more > MANY_SEEDS:
        return f"not distinguishable; over {MANY_SEEDS:,} more seeds"
    return f"not distinguishable; about {more} more seed{'s' if more > 1 else ''}"
