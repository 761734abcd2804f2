"""Predictions as tables: names for indices, probabilities by name, whole in every format."""

import csv
import json
import math
from pathlib import Path

import pyarrow.parquet
import pytest

from ftcore import UserError
from ftcore.predictions import tabulate, write_table

ANSWERS = {
    "label": [1, 0],
    "prediction": [1, 1],
    "scores": [[math.log(0.25), math.log(0.75)], [math.log(0.4), math.log(0.6)]],
    "group": ["a", "b"],
}


def test_indices_become_names_and_log_probabilities_chances() -> None:
    """By the order of the labels; other columns and the rows' numbers are as they were given."""
    table = tabulate(ANSWERS, ["no", "yes, sir"], [4, 7])
    assert table.column_names == ["row", "label", "prediction", "scores", "group"]
    first = table.to_pylist()[0]
    assert (first["row"], first["label"], first["prediction"], first["group"]) == (
        4,
        "yes, sir",
        "yes, sir",
        "a",
    )
    assert first["scores"] == pytest.approx({"no": 0.25, "yes, sir": 0.75}, rel=1e-15)
    assert [row["label"] for row in table.to_pylist()] == ["yes, sir", "no"]


def test_without_class_names_values_stay() -> None:
    """A text is a text, and what has no one type is JSON."""
    table = tabulate({"prediction": ["é", "b"], "nll": [0.5, 1.5], "odd": [1, "x"]}, [], [0, 1])
    assert table.to_pylist()[0] == {"row": 0, "prediction": "é", "nll": 0.5, "odd": "1"}


def test_every_format_holds_the_same(tmp_path: Path) -> None:
    """parquet and JSON lines give the table back; CSV has a column for each class."""
    table = tabulate(ANSWERS, ["no", "yes"], [4, 7])
    for suffix in ("parquet", "jsonl", "csv"):
        write_table(table, tmp_path / "new" / f"a.{suffix}")
    folder = tmp_path / "new"
    assert pyarrow.parquet.read_table(folder / "a.parquet").equals(table)
    lines = (folder / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == table.to_pylist()
    with (folder / "a.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[1]["scores.yes"]) == table.to_pylist()[1]["scores"]["yes"]
    assert sorted(f.name for f in folder.iterdir()) == ["a.csv", "a.jsonl", "a.parquet"]


def test_unknown_suffix_is_an_error(tmp_path: Path) -> None:
    """It names those there are, and writes nothing."""
    with pytest.raises(UserError, match=r"can't write '\.txt' files .*\.parquet, \.jsonl, \.csv"):
        write_table(tabulate(ANSWERS, ["no", "yes"], [0, 1]), tmp_path / "a.txt")
    assert list(tmp_path.iterdir()) == []
