"""Formatted rows on disk: flat arrays and offsets, memory-mapped, read in microseconds.

A list column is one flat array with the offsets of its rows; a string column is its UTF-8 bytes.
No pickle: raw little-endian numbers, and one JSON that names the columns.
"""

import json
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ftcore.errors import UserError

__all__ = ["Rows", "write_examples", "write_rows"]

Array = npt.NDArray[Any]

DTYPES = {"ints": "<i4", "floats": "<f4", "text": "|u1", "int": "<i8", "float": "<f8"}
"""A column's kind, and how it is stored; int32 holds every vocabulary."""

LISTS = ("ints", "floats", "text")
EXAMPLES = "examples-of-rows"


class Rows:
    """The formatted rows of one split.

    `rows[i]` is a dict of column to a 1-D array, a number or a string, and `row`, its index.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        meta = json.loads((directory / "columns.json").read_text())
        self._length: int = meta["rows"]
        self.columns: dict[str, str] = meta["columns"]
        self._data = {c: _open(directory / f"{c}.bin", DTYPES[k]) for c, k in self.columns.items()}
        self._offsets = {
            c: _open(directory / f"{c}.offsets", "<i8") for c, kind in self.columns.items() if kind in LISTS
        }

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"row": index, **{name: self._value(name, index) for name in self.columns}}

    def _value(self, name: str, index: int) -> Any:
        kind, data = self.columns[name], self._data[name]
        if kind not in LISTS:
            return data[index].item()
        offsets = self._offsets[name]
        part = data[offsets[index] : offsets[index + 1]]
        return part.tobytes().decode() if kind == "text" else part

    @property
    def lengths(self) -> Array:
        """Tokens of each row: the length of `input_ids`, int64."""
        return self.sizes("input_ids")

    def sizes(self, name: str) -> Array:
        """Entries of a list column in each row, int64."""
        return np.diff(self._offsets[name])

    @property
    def examples(self) -> Array:
        """The example of the split (0-based) that each row was made of, int64."""
        return np.fromfile(self.directory / EXAMPLES, dtype="<i8")

    def numbers(self, name: str) -> Array:
        """One whole column of numbers, mapped into memory: int64 or float64."""
        return self._data[name]

    def column(self, name: str) -> list[Any]:
        """One whole column, as plain Python values."""
        if self.columns[name] not in LISTS:
            numbers: list[Any] = self.numbers(name).tolist()
            return numbers
        return [self._value(name, i) for i in range(len(self))]


def write_rows(rows: Iterable[Mapping[str, Any]], directory: Path) -> int:
    """Write rows as they come; returns their number. All have the same columns, of one kind each.

    Raises:
        UserError: a row with other columns than the first, or a value of another kind.
    """
    directory.mkdir(parents=True)
    columns: dict[str, str] = {}
    files: dict[str, BinaryIO] = {}
    ends: dict[str, int] = {}  # of list columns, so far
    count = 0
    try:
        for row in rows:
            count += 1
            if not columns:
                columns = {name: _kind(value) for name, value in row.items()}
                if "none" in columns.values():
                    raise UserError(
                        f"format_examples: numbers, strings or flat lists are wanted, got {row!r:.200}"
                    )
                ends = {c: 0 for c, k in columns.items() if k in LISTS}
                files = {c: (directory / f"{c}.bin").open("wb") for c in columns}
                files |= {f"{c}.offsets": (directory / f"{c}.offsets").open("wb") for c in ends}
                for c in ends:
                    files[f"{c}.offsets"].write(bytes(8))
            if row.keys() != columns.keys():
                raise UserError(
                    f"format_examples: row {count} has columns {sorted(row)}, the first {sorted(columns)}"
                )
            for name, value in row.items():
                data = _encode(value, columns[name], f"format_examples: '{name}' of row {count}")
                files[name].write(data.tobytes())
                if name in ends:
                    ends[name] += data.size
                    files[f"{name}.offsets"].write(ends[name].to_bytes(8, "little"))
    finally:
        for file in files.values():
            file.close()
    (directory / "columns.json").write_text(json.dumps({"rows": count, "columns": columns}))
    return count


def write_examples(examples: "array[int]", directory: Path) -> None:
    """Write beside the rows the example that each was made of."""
    np.asarray(examples, dtype="<i8").tofile(directory / EXAMPLES)


def _open(path: Path, dtype: str) -> Array:
    """Memory-map a file, as a plain array, whose slices are cheap; an empty one can't be mapped."""
    return np.asarray(np.memmap(path, dtype=dtype, mode="r")) if path.stat().st_size else np.empty(0, dtype)


def _kind(value: Any) -> str:
    """The column kind that fits a value; `none` where it is no number, string, or flat list of numbers."""
    if isinstance(value, str):
        return "text"
    try:
        data = np.asarray(value)
    except ValueError:  # a ragged list of lists
        return "none"
    if data.ndim > 1 or data.dtype.kind not in "iubf":
        return "none"
    is_float = data.dtype.kind == "f" and data.size > 0
    return ("float" if is_float else "int") + ("s" if data.ndim else "")


def _encode(value: Any, kind: str, where: str) -> Array:
    found = _kind(value)
    fits = found == kind or (found.startswith("int") and kind == found.replace("int", "float"))
    if not fits or kind == "none":
        raise UserError(f"{where} must be {kind} like the first row's, got {value!r:.80}")
    if kind == "text":
        return np.frombuffer(value.encode(), dtype=np.uint8)
    data, dtype = np.atleast_1d(np.asarray(value)), np.dtype(DTYPES[kind])
    if data.dtype == dtype:
        return data
    if dtype.kind == "i" and data.size and not _in_range(data, np.iinfo(dtype)):
        raise UserError(f"{where} must be in the range of {dtype.name}, got {data.min()} to {data.max()}")
    return data.astype(dtype)


def _in_range(data: Array, info: "np.iinfo[Any]") -> bool:
    return bool(info.min <= int(data.min()) and int(data.max()) <= info.max)
