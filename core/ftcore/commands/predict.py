"""`ftcore predict`: a trained model's answers for the rows of a file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore.commands import Parser
from ftcore.errors import UserError

if TYPE_CHECKING:
    from ftcore.job import Job

__all__ = ["main"]


def main(arguments: Sequence[str]) -> int:
    """Write one answer per row of the file: JSON lines on stdout, or a file."""
    parser = Parser(
        prog="ftcore predict",
        description="Answer for every row of a file: row number, prediction, probabilities.",
    )
    parser.add_argument("model", metavar="RUN_OR_MODEL", help="a run's directory, a model's, or a hub id")
    parser.add_argument("file", help="the rows; labels are not needed")
    parser.add_argument(
        "settings", nargs="*", default=[], help="data.columns.text=NAME, data.max_length=N, ..."
    )
    parser.add_argument("--to", type=Path, metavar="FILE", help=".jsonl, .parquet or .csv; else stdout")
    options = parser.parse_args(arguments)
    from ftcore.predictions import SUFFIXES, write_lines, write_table
    from ftcore.saved import open_saved, ready
    from ftcore.screen import Screen

    if options.to and options.to.suffix not in SUFFIXES:
        raise UserError(f"--to {options.to}: the name must end in one of {', '.join(SUFFIXES)}")
    screen = Screen(shown=True, stderr=True)
    saved = open_saved(options.model, options.settings)
    saved.cfg.data.max_truncated = saved.cfg.data.max_dropped = 1.0  # each row gets its answer, or null
    job = ready(saved, screen, options.file, "predict")
    _notes(job)
    answers = _answers(job)
    if options.to:
        write_table(answers, options.to)
        screen.line(f"{answers.num_rows} rows  ->  {options.to}")
    else:
        write_lines(answers, sys.stdout)
    return 0


def _answers(job: Job) -> Any:
    """A table with a line for every example, in order; null where it was unusable.

    A long text of language modelling has several rows; their sums are added up.
    """
    import pyarrow as pa

    from ftcore.evaluation import predict
    from ftcore.predictions import tabulate
    from ftcore.tasks import TASKS

    examples = job.prepared.splits["predict"].examples.tolist()
    found = predict(job, "predict") or {}
    unknown = TASKS[job.cfg.task.name].ANSWERS
    columns = {name: values for name, values in found.items() if name not in unknown}
    table = tabulate(columns, job.prepared.labels, examples)
    if len(set(examples)) < len(examples) and job.cfg.task.name == "causal_lm":
        sums = table.group_by("row", use_threads=False).aggregate([(c, "sum") for c in columns])
        table = sums.rename_columns(["row", *columns])
    places: dict[int, list[int]] = {}
    for place, row in enumerate(table["row"].to_pylist()):
        places.setdefault(row, []).append(place)
    count = job.prepared.audits["predict"].examples
    numbers = [row for row in range(count) for _ in places.get(row, [0])]
    taken = table.take(pa.array([p for row in range(count) for p in places.get(row, [None])], pa.int64()))
    return taken.set_column(0, "row", pa.array(numbers, pa.int64()))


def _notes(job: Job) -> None:
    """Say which rows were cut, and which have no answer."""
    audit = job.prepared.audits["predict"]
    if audit.truncated:
        job.screen.line(
            f"warning: {audit.truncated} of {audit.rows} rows are cut to data.max_length="
            f"{job.cfg.data.max_length} tokens (rows {audit.cut}, 0-based)"
        )
    if audit.dropped:
        why = f"have an empty text (rows {audit.unusable}, 0-based)" if not audit.reasons else audit.why()
        job.screen.line(f"warning: {audit.dropped} of {audit.examples} rows {why}; their answer is null")
