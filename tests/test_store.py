"""Formatted rows on disk: every kind of column comes back as it went in, or its row and column are named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftcore import UserError
from ftcore.store import Rows, write_rows

INT32 = st.integers(-(2**31), 2**31 - 1)
ROW = st.fixed_dictionaries(
    {
        "input_ids": st.lists(INT32, max_size=5),
        "weights": st.lists(st.floats(width=32, allow_nan=False), max_size=3),
        "target": st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        "labels": st.integers(-(2**63), 2**63 - 1),
        "score": st.floats(allow_nan=False),
    }
)


def plain(rows: Rows) -> list[dict[str, Any]]:
    """Rows as Python values."""
    found = [rows[i] for i in range(len(rows))]
    return [{k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in row.items()} for row in found]


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(ROW, min_size=1, max_size=6))
def test_rows_come_back_as_they_went_in(tmp_path_factory: Any, rows: list[dict[str, Any]]) -> None:
    """Lists (empty ones too), numbers and any text survive exactly, in order, with their index."""
    rows[0]["weights"] = rows[0]["weights"] or [0.5]  # the first row says what a column is
    directory = tmp_path_factory.mktemp("store") / "rows"
    assert write_rows(iter(rows), directory) == len(rows)
    stored = Rows(directory)
    assert plain(stored) == [{"row": i, **row} for i, row in enumerate(rows)]
    assert stored.lengths.tolist() == [len(row["input_ids"]) for row in rows]
    assert stored.column("target") == [row["target"] for row in rows]


def test_kinds_are_told_from_the_first_row(tmp_path: Path) -> None:
    """numpy values count as the plain ones, a bool as a number, an empty list as whole numbers."""
    row = {"a": np.int64(3), "b": np.float32(0.5), "c": np.arange(2), "d": True, "e": [], "f": "é"}
    write_rows([row], tmp_path / "rows")
    kinds = {"a": "int", "b": "float", "c": "ints", "d": "int", "e": "ints", "f": "text"}
    assert Rows(tmp_path / "rows").columns == kinds


def test_column_of_empty_values_only(tmp_path: Path) -> None:
    """Files without a byte, which can't be memory-mapped, read as empty."""
    write_rows([{"input_ids": [], "target": ""}] * 2, tmp_path / "rows")
    assert plain(Rows(tmp_path / "rows")) == [{"row": i, "input_ids": [], "target": ""} for i in (0, 1)]


def test_ids_of_a_large_vocabulary_survive(tmp_path: Path) -> None:
    """Token ids above 65535, and both ends of int32, are kept as they are."""
    ids = [65535, 65536, 128000, 2**31 - 1, -(2**31)]
    write_rows([{"input_ids": [1]}, {"input_ids": ids}], tmp_path / "rows")
    assert Rows(tmp_path / "rows")[1]["input_ids"].tolist() == ids


def test_row_with_other_columns_is_an_error(tmp_path: Path) -> None:
    """The row's number and both lists of columns are named."""
    rows = [{"input_ids": [1], "labels": 0}, {"input_ids": [1]}]
    with pytest.raises(UserError, match=r"row 2 has columns \['input_ids'\].*\['input_ids', 'labels'\]"):
        write_rows(rows, tmp_path / "rows")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([1, 2], [0.5]),
        ([1, 2], ["a"]),
        ([1, 2], "text"),
        ([1, 2], [[1], [2, 3]]),
        ([1, 2], [[1, 2], [3, 4]]),
        ([1, 2], [2**31]),  # one more than int32 holds: must not wrap around
        ([0.5], ["a"]),
        ([0.5], [None]),
        ([0.5], [{}]),
        (1, 1.5),
        (1, "1"),
        (1, [1, 2]),  # two numbers would shift every later row
        (1, None),
        (0.5, [0.5, 0.5]),
        ("text", 1),
        ("text", None),
    ],
)
def test_value_of_another_kind_is_an_error(tmp_path: Path, first: Any, second: Any) -> None:
    """The row and the column of a value that does not fit the first row's are named."""
    with pytest.raises(UserError, match=r"'column' of row 2 must (be|fit) "):
        write_rows([{"column": first}, {"column": second}], tmp_path / "rows")
