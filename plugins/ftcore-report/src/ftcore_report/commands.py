"""`ftcore compare`, `ftcore status`, `ftcore report`. Imported when one of them is asked for, not before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ftcore.commands import Parser
from ftcore.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["compare", "report", "status"]


def compare(arguments: Sequence[str]) -> int:
    """Compare runs by what differs between them; returns the exit code."""
    parser = Parser(
        prog="ftcore compare",
        description="Compare runs: arms by what differs in their configs, seeds together, with error bars.",
    )
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="runs, at any depth")
    parser.add_argument(
        "--by", action="append", default=[], metavar="KEY", help="config key (or group) that makes an arm"
    )
    parser.add_argument(
        "--over", action="append", default=[], metavar="KEY", help="config key to average over, like the seed"
    )
    parser.add_argument(
        "--metric", default="", help="accuracy, test/nll, ...; --metric=-NAME where lower is better"
    )
    parser.add_argument("--baseline", default="", metavar="ARM", help="the arm to compare with")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--html", type=Path, metavar="FILE", help="one page with charts, no network needed")
    options = parser.parse_args(arguments)
    from ftcore_report import _compare, _table
    from ftcore_report._runs import find_runs

    runs, problems = find_runs(options.directories)
    notes = [f"left out: {p.path}: {p.why}" for p in problems]
    if not runs:
        raise UserError("; ".join([f"no runs in {', '.join(map(str, options.directories))}", *notes]))
    by, over = (_keys(given) for given in (options.by, options.over))
    found = _compare.compare(runs, by=by, over=over, metric=options.metric, baseline=options.baseline)
    _table.show(found, notes, _screen())
    with _writing():
        if options.csv:
            _table.write_csv(found, options.csv)
        if options.json:
            _table.write_json(_table.as_json(found, notes), options.json)
        if options.html:
            from ftcore_report._pages import comparison_page

            options.html.write_text(comparison_page(found, notes), encoding="utf-8")
    return 0


def status(arguments: Sequence[str]) -> int:
    """Say which runs are done, which run, which failed, and how long the rest takes."""
    parser = Parser(prog="ftcore status", description="Runs below a directory: done, running, failed.")
    parser.add_argument("directory", type=Path, metavar="DIR", help="runs, at any depth")
    options = parser.parse_args(arguments)
    from ftcore_report import _status
    from ftcore_report._runs import find_runs

    runs, problems = find_runs([options.directory])
    notes = [f"no run: {p.path}: {p.why}" for p in problems]
    if not runs:
        raise UserError("; ".join([f"no runs in {options.directory}", *notes]))
    _status.show([_status.state(run) for run in runs], notes, options.directory, _screen())
    return 0


def report(arguments: Sequence[str]) -> int:
    """Write one page about one run."""
    parser = Parser(prog="ftcore report", description="Write one self-contained page about a run.")
    parser.add_argument("run", type=Path, metavar="RUN", help="its directory (runs/latest is the newest)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="where to; default RUN/report.html")
    options = parser.parse_args(arguments)
    from ftcore_report._run_page import run_page
    from ftcore_report._runs import find_runs

    directory = options.run.resolve()
    runs, problems = find_runs([directory])
    if not (found := [run for run in runs if run.path == directory]):
        why = next((p.why for p in problems if p.path == directory), "no run")
        raise UserError(f"{options.run}: {why}")
    path = options.html or directory / "report.html"
    with _writing():
        path.write_text(run_page(found[0]), encoding="utf-8")
    print(path)
    return 0


def _screen() -> Console:
    """The terminal; a log or a pipe has no edge to fold at."""
    from rich.console import Console

    screen = Console(highlight=False)
    if not screen.is_terminal:
        screen.width = max(screen.width, 120)
    return screen


def _keys(given: Sequence[str]) -> list[str]:
    """Keys of an option that may be repeated, and hold several with commas between."""
    return [key for one in given for key in one.split(",") if key]


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"can't write {error.filename}: {error.strerror or error}") from error
