"""What a run shows: a header, one live line, evaluations, a final table and what to do next.

On a terminal the line is alive; elsewhere it is printed every 30 seconds. Other ranks show nothing.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

__all__ = ["Screen"]

QUIET_SECONDS = 30.0


class _Output(Console):
    """A console whose reader may go away (`| head`): it falls silent and says so, once."""

    def __init__(self, on_lost: Callable[[], None], **options: Any) -> None:
        super().__init__(**options)
        self._on_lost = on_lost

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), (sys.stderr if self.stderr else sys.stdout).fileno())
        self._on_lost()


class Screen:
    """Everything a run prints goes through here; `shown` is False on all ranks but the first.

    `on_lost` is called when nobody reads the output any more.
    """

    def __init__(self, shown: bool, *, stderr: bool = False) -> None:
        self.on_lost: Callable[[], None] = lambda: None
        self.console = _Output(
            lambda: self.on_lost(), quiet=not shown, highlight=False, soft_wrap=True, stderr=stderr
        )
        self._progress: Progress | None = None
        self._first, self._total, self._text = 0, 0, ""
        self._started = time.monotonic()
        self._last_line = time.monotonic()

    def header(self, lines: Sequence[tuple[str, str]]) -> None:
        """Name and value of what is about to run, a line each."""
        width = max(len(name) for name, _ in lines) + 2
        for name, value in lines:
            self.console.print(Text(f"{name:<{width}}", "bold") + Text(value))

    def line(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False)

    def start(self, step: int, total: int) -> None:
        """Training begins at `step`."""
        self._first, self._total, self._started = step, total, time.monotonic()
        if self.console.is_terminal and not self.console.quiet:
            self._progress = Progress(
                BarColumn(bar_width=12),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
                TimeRemainingColumn(compact=True),
                console=self.console,
                transient=True,
            )
            self._progress.start()
            self._task = self._progress.add_task("train", total=total, completed=step, text="")

    def step(self, record: Mapping[str, Any]) -> None:
        """A training record."""
        terms = [
            f"{k.removeprefix('loss/')} {v:.3f}"
            for k, v in record.items()
            if k.startswith("loss/") and v is not None
        ]
        several = f" ({', '.join(terms)})" if len(terms) > 1 else ""
        self._text = (
            f"loss {record['loss']:.4f}{several}  grad {record['grad_norm']:.3g}"
            f"  lr {record['lr']:.2e}  {record['tokens_per_second']:.0f} tok/s"
            f"  {record['memory_mb'] / 1000:.1f} GB"
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=record["step"], text=self._text)
        elif record["step"] == 1:
            self._plain(f"step {record['step']}/{self._total}  {self._text}{self._left(record['step'])}")
        else:
            self.tick(f"step {record['step']}/{self._total}", self._text + self._left(record["step"]))

    def _left(self, step: int) -> str:
        """About how long the rest takes, evaluations included, going by what is done."""
        done = max(1, step - self._first)
        seconds = (time.monotonic() - self._started) / done * (self._total - step)
        return f"  about {_duration(seconds)} left"

    def tick(self, where: str, text: str = "") -> None:
        """Something is going on: shown in the live line, or as a line where 30 s have passed."""
        if self._progress is not None:
            self._progress.update(self._task, text=text or f"{self._text}  {where}")
        elif time.monotonic() - self._last_line >= QUIET_SECONDS:
            self._plain(f"{where}  {text}".rstrip())

    def _plain(self, text: str) -> None:
        self._last_line = time.monotonic()
        self.line(text)

    def evaluation(self, step: int, metrics: Mapping[str, float], is_best: bool) -> None:
        """An evaluation, as a line that stays."""
        shown = {k.removeprefix("eval/"): v for k, v in metrics.items() if "group/" not in k}
        text = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
        self._plain(f"step {step:>6}  {text}{'  (best)' if is_best else ''}")
        if self._progress is not None:
            self._progress.update(self._task, text=self._text)

    def stop(self) -> None:
        """Take the live line away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def table(self, metrics: Mapping[str, float]) -> None:
        """Metrics, a column per split."""
        columns: dict[str, dict[str, float]] = {}
        for key, value in metrics.items():
            split, _, name = key.partition("/")
            columns.setdefault({"eval": "validation"}.get(split, split), {})[name] = value
        names = list(dict.fromkeys(name for column in columns.values() for name in column))
        table = Table("metric", *columns)
        for name in names:
            cells = [f"{c[name]:.4f}" if name in c else "" for c in columns.values()]
            table.add_row(name, *cells)
        if names:
            self.console.print(table)

    def result(self, result: Mapping[str, Any], run_dir: str) -> None:
        """The final table, and where the result is."""
        self.stop()
        self.table(result["metrics"])
        self.line(
            f"{result['steps']} steps, {result['examples']} examples, {result['seconds']:.1f} s"
            f"  ->  {run_dir}"
        )
        if skipped := result.get("skipped_fp16_overflow"):
            self.line(f"{skipped} of the steps changed nothing: their gradients overflowed in fp16")
        costs = [
            f"{name} {cost['ms_per_step']:.2f} ms a step ({cost['share_of_step']:.0%})"
            for name, cost in result.get("plugin_cost", {}).items()  # an earlier ftcore's result has none
        ]
        if costs:
            self.line(f"in the hooks of plugins (backward passes not counted): {', '.join(costs)}")
        run = shlex.quote(_short(run_dir))
        if result.get("status") != "pruned":
            self.line(
                f"next: ftcore predict {run} FILE   ftcore evaluate {run}   ftcore export {run} --to DIR"
            )


def _short(path: str) -> str:
    """A path as it is shortest to type from here; `runs/latest` where that is it and the path is long."""
    relative = os.path.relpath(path, Path.cwd())
    near = path if relative.startswith("..") else relative
    latest = Path("runs", "latest")
    is_latest = latest.is_dir() and latest.resolve() == Path(path).resolve()
    return str(latest) if is_latest and len(near) > 40 else near


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
