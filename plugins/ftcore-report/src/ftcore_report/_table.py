"""A comparison as tables on the terminal, as CSV and as JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ftcore_report._compare import ALPHA, Comparison, Line
from ftcore_report._stats import interval

__all__ = [
    "ARM_COLUMNS",
    "DIFFERENCE_COLUMNS",
    "arm_cells",
    "as_json",
    "difference_cells",
    "show",
    "write_csv",
]

ARM_COLUMNS = (
    "arm",
    "n",
    "mean",
    "sd",
    "median",
    "best",
    "failed",
    "degen.",
    "seconds",
    "tok/s",
    "memory",
)
DIFFERENCE_COLUMNS = ("arm", "difference", "interval", "p (Holm)", "reading")


def show(comparisons: Sequence[Comparison], notes: Iterable[str], console: Console) -> None:
    """Print all of it."""
    for one in comparisons:
        console.print(f"\n{escape(title(one))}", style="bold")
        console.print(_table(ARM_COLUMNS, [arm_cells(line) for line in one.lines]))
        if any(line.difference for line in one.lines):
            rows = [difference_cells(line) for line in one.lines if line.difference]
            console.print(f"difference to {escape(str(one.baseline))}, {LEGEND}")
            console.print(_table(DIFFERENCE_COLUMNS, rows))
        for note in one.notes:
            console.print(f"note: {note}", markup=False, soft_wrap=True)
    for note in notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)


LEGEND = f"{1 - ALPHA:.0%} interval over seeds and test rows, both corrected for the number of arms"


def title(one: Comparison) -> str:
    """What is compared, in one line."""
    better = "higher" if one.sign > 0 else "lower"
    data = f", data {one.data[:8]}" if one.data else ""
    return f"{one.metric} ({better} is better{data})"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table without the columns of which nothing is known."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    kept = [i for i, _ in enumerate(columns) if any(row[i] != "-" for row in rows)]
    for i in kept:
        is_text = columns[i] in ("arm", "reading")
        table.add_column(columns[i], justify="left" if is_text else "right", no_wrap=not is_text)
        if is_text:
            table.columns[-1].overflow, table.columns[-1].min_width = "fold", 16
    for row in rows:
        table.add_row(*(escape(row[i]) for i in kept))
    return table


def arm_cells(line: Line) -> list[str]:
    """One arm as text, in the order of `ARM_COLUMNS`."""
    return [
        line.arm,
        str(len(line.values)),
        number(line.mean),
        number(line.sd),
        number(line.median),
        number(line.best),
        str(line.failed),
        "-" if line.degenerate is None else str(line.degenerate),
        number(line.seconds, 1),
        number(line.tokens_per_second, 0),
        "-" if line.memory_mb is None else f"{line.memory_mb:,.0f} MB",
    ]


def difference_cells(line: Line) -> list[str]:
    """An arm's difference to the baseline as text, in the order of `DIFFERENCE_COLUMNS`."""
    assert line.difference is not None
    low, high = line.corrected or (None, None)
    return [
        line.arm,
        number(line.difference.value, sign=True),
        "-" if low is None else f"[{number(low, sign=True)}, {number(high, sign=True)}]",
        number(line.p, 3),
        line.verdict,
    ]


def number(value: float | None, digits: int = 4, *, sign: bool = False) -> str:
    """A figure as text; a dash where there is none."""
    return "-" if value is None else f"{value:{'+' if sign else ''},.{digits}f}"


def as_json(comparisons: Sequence[Comparison], notes: Iterable[str]) -> dict[str, Any]:
    """Everything, unrounded."""
    return {
        "comparisons": [
            {
                "metric": one.metric,
                "higher_is_better": one.sign > 0,
                "data": one.data,
                "baseline": one.baseline,
                "arms": [_arm_json(line) for line in one.lines],
                "notes": one.notes,
            }
            for one in comparisons
        ],
        "notes": list(notes),
    }


def _arm_json(line: Line) -> dict[str, Any]:
    d = line.difference
    return {
        "arm": line.arm,
        "n": len(line.values),
        "values": {str(run.path): value for run, value in zip(line.runs, line.values, strict=True)},
        **{name: getattr(line, name) for name in ("mean", "sd", "median", "best", "failed", "degenerate")},
        **{name: getattr(line, name) for name in ("seconds", "tokens_per_second", "memory_mb")},
        "difference": d
        and {
            "value": d.value,
            "paired_by_seed": d.paired,
            "runs": d.runs,
            "test_rows": d.rows or None,
            "se": d.se,
            "interval": interval(d, ALPHA),
            "interval_corrected": line.corrected,
            "p": d.p,
            "p_holm": line.p,
            "is_called": line.is_called,
        },
        "verdict": line.verdict,
    }


def write_csv(comparisons: Sequence[Comparison], path: Path) -> None:
    """One line for each arm of each comparison."""
    names = [
        *("metric", "data", "arm", "n", "mean", "sd", "median", "best", "failed", "degenerate", "seconds"),
        *("tokens_per_second", "memory_mb", "difference", "low", "high", "p", "p_holm", "verdict"),
    ]
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, names)
        out.writeheader()
        for one in comparisons:
            for line in one.lines:
                d, (low, high) = line.difference, line.corrected or (None, None)
                own = {name: getattr(line, name) for name in names if name in Line.__dataclass_fields__}
                found = {"difference": d and d.value, "low": low, "high": high, "p": d and d.p}
                base = {"metric": one.metric, "data": one.data, "n": len(line.values), "p_holm": line.p}
                out.writerow({**own, **base, **found})


def write_json(found: dict[str, Any], path: Path) -> None:
    """JSON that any parser reads: nothing in it is not finite."""
    path.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")
