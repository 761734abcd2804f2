"""The state of every run below a directory: done, running, failed, and the time left."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ftcore_report._runs import Run, is_number, read_records

__all__ = ["State", "show", "state"]


@dataclass(frozen=True, kw_only=True)
class State:
    """One run's.

    Attributes:
        step, total: optimiser steps; None where not known yet.
        seconds_left: of a run that is going on, at the pace of its last checkpoint, or since it started.
        note: the metric of a finished run; the error of a failed one, where it left one.
    """

    run: Run
    step: int | None
    total: int | None
    seconds_left: float | None
    note: str


def state(run: Run) -> State:
    """Read off what a run has written so far."""
    records = read_records(run.path)
    step = int(records[-1]["step"]) if records else None
    total = _total(run, records)
    if run.state in ("finished", "pruned"):
        metric = run.result.get("metric") or {}
        value = metric.get("value")
        shown = f"{metric.get('name')} {value:.4f}" if is_number(value) else ""
        steps = run.result.get("steps", step)
        reason = run.result.get("reason") if run.state == "pruned" else None
        note = ": ".join(filter(None, (shown, str(reason or ""))))
        return State(run=run, step=steps, total=steps, seconds_left=None, note=note)
    left = None
    if run.state == "running" and step and total:
        pace = _pace(run.path, step)
        left = None if pace is None else max(0, total - step) * pace
    return State(run=run, step=step, total=total, seconds_left=left, note=_why(run))


def _total(run: Run, records: Sequence[dict[str, Any]]) -> int | None:
    """Steps of the whole run: as set, or by the share of its epochs that its last record gives."""
    if isinstance(steps := run.config.get("train.steps"), int):
        return steps
    epochs = run.config.get("train.epochs")
    for record in reversed(records):
        if is_number(record.get("epoch")) and record["epoch"] > 0 and isinstance(epochs, int | float):
            return round(float(record["step"]) * epochs / float(record["epoch"]))
    return None


def _pace(path: Path, step: int) -> float | None:
    """Seconds a step: of the newest checkpoint, which knows of resumes, else since the run started."""
    saved = sorted(path.glob("checkpoints/step-*/state.json"), key=lambda f: f.stat().st_mtime)
    try:
        known = json.loads(saved[-1].read_text()) if saved else {}
        if known.get("step") and known.get("seconds"):
            return float(known["seconds"]) / int(known["step"])
        return (time.time() - (path / "run.json").stat().st_mtime) / step
    except (OSError, ValueError, AttributeError, TypeError):
        return None


def _why(run: Run) -> str:
    if run.state != "failed":
        return ""
    if run.error:
        return run.error
    resumable = any((run.path / "checkpoints").glob("step-*"))
    return "stopped without a result" + ("; has a checkpoint to resume from" if resumable else "")


def show(states: Sequence[State], notes: Iterable[str], root: Path, console: Console) -> None:
    """A line for each run, unfinished ones last, and the sum."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("state", "step", "left", "run", ""):
        right = name in ("step", "left")
        table.add_column(name, justify="right" if right else "left", no_wrap=right, overflow="fold")
    order = {"finished": 0, "pruned": 1, "running": 2, "failed": 3}
    for one in sorted(states, key=lambda s: order[s.run.state]):
        step = "-" if one.step is None else f"{one.step}/{'?' if one.total is None else one.total}"
        path = one.run.path
        shown = str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
        cells = (one.run.state, step, clock(one.seconds_left), shown, one.note)
        table.add_row(*map(escape, cells))
    console.print(table)
    counts = {s: sum(one.run.state == s for one in states) for s in order}
    if not counts["pruned"]:
        del counts["pruned"]
    left = [one.seconds_left for one in states if one.seconds_left is not None]
    rest = f"; about {clock(max(left))} left for those that run" if left else ""
    console.print(", ".join(f"{n} {s}" for s, n in counts.items()) + rest)
    for note in notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)


def clock(seconds: float | None) -> str:
    """`1:02:03`, or a dash."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
