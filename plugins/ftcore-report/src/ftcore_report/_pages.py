"""The page about a comparison: its tables, and four charts each with its figures as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ftcore_report import _svg
from ftcore_report._compare import ALPHA, Comparison, Line
from ftcore_report._html import chart, page, paragraphs, section, table
from ftcore_report._runs import is_number, read_records
from ftcore_report._table import (
    ARM_COLUMNS,
    DIFFERENCE_COLUMNS,
    LEGEND,
    arm_cells,
    difference_cells,
    number,
    title,
)
from ftcore_report._texts import test_texts

__all__ = ["comparison_page"]

DISAGREEMENTS = 25


def comparison_page(comparisons: Sequence[Comparison], notes: Iterable[str]) -> str:
    """All comparisons on one page."""
    body = [part for one in comparisons for part in _comparison(one)]
    left = section("Left out", [paragraphs(list(notes))])
    return page("ftcore compare", [*body, left])


def _comparison(one: Comparison) -> list[str]:
    lines = [line for line in one.lines if line.values]
    tables = [
        table(ARM_COLUMNS, [arm_cells(line) for line in one.lines], "degen.: no better than the majority")
    ]
    different = [line for line in lines if line.difference]
    if different:
        rows = [difference_cells(line) for line in different]
        tables.append(table(DIFFERENCE_COLUMNS, rows, f"Difference to {one.baseline}; {LEGEND}", ["reading"]))
    parts = [section(title(one), [*tables, paragraphs(one.notes)])]
    if lines:
        charts = [_distribution(one, lines), _differences(one, different), _learning(one, lines)]
        parts.append(section("Charts", [*charts, _cost(one, lines)]))
        parts.append(section("Test rows that arms disagree on", [_disagreements(lines)]))
    return parts


def _distribution(one: Comparison, lines: Sequence[Line]) -> str:
    desc = "; ".join(f"{x.arm}: mean {number(x.mean)}, {len(x.values)} runs" for x in lines)
    svg = _svg.strips(
        f"{one.metric} of each run, by arm", desc, [(x.arm, x.values) for x in lines], one.metric
    )
    rows = [
        [x.arm, str(run.seed), number(value), str(run.path)]
        for x in lines
        for run, value in zip(x.runs, x.values, strict=True)
    ]
    return chart("Each run, and the mean of each arm", svg, ("arm", "seed", one.metric, "run"), rows)


def _differences(one: Comparison, lines: Sequence[Line]) -> str:
    if not lines:
        return ""
    rows = [(x.arm, x.difference.value, *(x.corrected or (None, None))) for x in lines if x.difference]
    desc = "; ".join(f"{x.arm}: {x.verdict}" for x in lines)
    axis = f"difference in {one.metric}"
    svg = _svg.forest(f"Difference to {one.baseline}, with {1 - ALPHA:.0%} intervals", desc, rows, axis)
    cells = [difference_cells(line) for line in lines]
    return chart(f"Difference to {one.baseline}", svg, DIFFERENCE_COLUMNS, cells)


def _learning(one: Comparison, lines: Sequence[Line]) -> str:
    """The validation metric over steps: mean of the runs that were evaluated there, lowest to highest."""
    name = f"eval/{one.metric.partition('/')[2]}"
    bands = [band for line in lines if (band := learning_band(line, name))]
    if not bands:
        return ""
    desc = "; ".join(
        f"{b.label}: {b.y[0]:.4g} at step {b.x[0]:g}, {b.y[-1]:.4g} at {b.x[-1]:g}" for b in bands
    )
    svg = _svg.curves(f"{name} while training", desc, bands, "step", name)
    rows = [
        [b.label, f"{x:g}", number(y), number(low), number(high)]
        for b in bands
        for x, y, low, high in zip(b.x, b.y, b.low, b.high, strict=True)
    ]
    return chart(
        f"{name} while training: mean, lowest and highest run",
        svg,
        ("arm", "step", "mean", "lowest", "highest"),
        rows,
    )


def learning_band(line: Line, name: str) -> _svg.Band | None:
    """Mean, lowest and highest value of `name` at each step that every run of the arm has."""
    histories = [
        {int(r["step"]): float(r[name]) for r in read_records(run.path) if is_number(r.get(name))}
        for run in line.runs
    ]
    histories = [h for h in histories if h]
    steps = sorted(set.intersection(*map(set, histories))) if histories else []
    if not steps:
        return None
    values = np.array([[h[s] for s in steps] for h in histories])
    mean, low, high = values.mean(axis=0), values.min(axis=0), values.max(axis=0)
    return _svg.Band(line.arm, steps, mean.tolist(), low.tolist(), high.tolist())


def _cost(one: Comparison, lines: Sequence[Line]) -> str:
    points = [
        _svg.Point(x.arm, x.seconds, x.mean, x.sd or 0.0)
        for x in lines
        if x.seconds is not None and x.mean is not None
    ]
    if not points:
        return ""
    desc = "; ".join(f"{p.label}: {p.y:.4g} in {p.x:.4g} s" for p in points)
    name = f"{one.metric} against seconds of a run"
    svg = _svg.scatter(name, desc, points, "seconds of a run (mean)", f"{one.metric} (mean, sd)")
    rows = [[p.label, number(p.x, 1), number(p.y), number(p.error)] for p in points]
    return chart("Cost against quality", svg, ("arm", "seconds", "mean", "sd"), rows)


def _disagreements(lines: Sequence[Line]) -> str:
    """The rows whose share of right answers differs most between arms."""
    tables: list[list[Any]] = [[run.test for run in line.runs] for line in lines]
    every = [t for group in tables for t in group]
    if len(lines) < 2 or any(t is None or not {"label", "prediction"} <= set(t.column_names) for t in every):
        return ""
    labels = every[0].column("label").to_pylist()
    if any(t.column("label").to_pylist() != labels for t in every):
        return ""
    said = [[t.column("prediction").to_pylist() for t in group] for group in tables]
    right = np.array([[np.mean([p[i] == y for p in g]) for i, y in enumerate(labels)] for g in said])
    spread = right.max(axis=0) - right.min(axis=0)
    picked = [int(i) for i in np.argsort(-spread, kind="stable")[:DISAGREEMENTS] if spread[i] > 0]
    if not picked:
        return ""
    numbers = (
        every[0].column("row").to_pylist() if "row" in every[0].column_names else list(range(len(labels)))
    )
    texts = test_texts(lines[0].runs[0], numbers, labels)
    rows = [
        [
            str(numbers[i]),
            *([texts[i]] if texts else []),
            str(labels[i]),
            *(_answers([p[i] for p in group], labels[i]) for group in said),
        ]
        for i in picked
    ]
    names = ["row", *(["text"] if texts else []), "label", *(line.arm for line in lines)]
    caption = f"The {len(picked)} rows that differ most, of {int((spread > 0).sum())}: runs that were right"
    return table(names, rows, caption, ["text"])


def _answers(said: Sequence[Any], label: Any) -> str:
    """`3/5 (refund)`: how many runs were right, and what the others said most."""
    wrong = Counter(str(s) for s in said if s != label)
    most = f" ({wrong.most_common(1)[0][0]})" if wrong else ""
    return f"{sum(s == label for s in said)}/{len(said)}{most}"
