"""Predictions as a table, a line per row of the data: made here, written as parquet, JSON lines or CSV.

`row` is the row's number in its split (0-based, of the data as it was read), so that two runs on the
same data can be compared row by row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ftcore.errors import UserError

__all__ = ["SUFFIXES", "tabulate", "write_lines", "write_table"]

SUFFIXES = (".parquet", ".jsonl", ".csv")


def tabulate(predictions: Mapping[str, Sequence[Any]], labels: Sequence[str], rows: Sequence[int]) -> Any:
    """A pyarrow table of the columns that `predict` gave, with `row` before them.

    Where there are class names, indices under `label` and `prediction` become names, and `scores`
    (log-probabilities, [rows, classes]) a struct of probabilities by class name.
    """
    import pyarrow as pa

    columns: dict[str, Any] = {"row": pa.array([int(row) for row in rows], pa.int64())}
    for name, values in predictions.items():
        if labels and name in ("label", "prediction"):
            columns[name] = pa.array([labels[i] for i in values], pa.string())
        elif labels and name == "scores":
            chances = np.exp(np.asarray(values, dtype=np.float64)).T
            columns[name] = pa.StructArray.from_arrays([pa.array(c) for c in chances], names=list(labels))
        else:
            columns[name] = _column(list(values))
    return pa.table(columns)


def _column(values: list[Any]) -> Any:
    """An array of plain values; what has no one type (of a plugin's making) as JSON."""
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([json.dumps(value, default=str) for value in values])


def write_table(table: Any, path: Path) -> None:
    """Write a table by its suffix, so that the file is whole or not there.

    Raises:
        UserError: a suffix that is not known, or a disk that refuses.
    """
    import pyarrow.csv
    import pyarrow.parquet

    if path.suffix not in SUFFIXES:
        raise UserError(f"can't write '{path.suffix}' files ({path}); known: {', '.join(SUFFIXES)}")
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(table, scratch)
        elif path.suffix == ".csv":
            pyarrow.csv.write_csv(table.flatten(), scratch)
        else:
            with scratch.open("w", encoding="utf-8") as file:
                write_lines(table, file)
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror or error}") from error
    finally:
        scratch.unlink(missing_ok=True)


def write_lines(table: Any, file: TextIO) -> None:
    """JSON lines, one a row."""
    for batch in table.to_batches(1000):
        for row in batch.to_pylist():
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
