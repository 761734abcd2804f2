"""The report of a sweep: all draws, the best three by validation, and what can't be reported."""

import json
from pathlib import Path

import pytest

from ftcore import UserError
from ftcore_contrastive._report import Draw, read, table


def leave_run(
    folder: Path, draw: int, weight: float, scores: tuple[float, float] | None, rows: int = 20
) -> None:
    """What `read` reads of a run; without scores it has not finished."""
    folder.mkdir(parents=True)
    config = {
        "data": {"limit": {"train": 20}, "split_seed": draw},
        "plugin": {"contrastive": {"weight": weight}},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    if scores:
        metrics = {"eval/accuracy": scores[0], "test/accuracy": scores[1]}
        result = {"metric": {"name": "eval/accuracy"}, "metrics": metrics}
        (folder / "result.json").write_text(json.dumps(result))


def test_the_top_three_are_chosen_by_validation_not_by_test() -> None:
    """Mean and deviation of all and of three; every draw is shown, in order."""
    draws = [
        Draw(arm=(20, "", 0.0, 0.9), draw=i, validation=v, test=t)
        for i, (v, t) in enumerate([(0.9, 0.5), (0.8, 0.6), (0.7, 0.7), (0.1, 1.0)])
    ]
    line = table(draws).splitlines()[1]
    assert line.split()[:4] == ["20", "none", "CE+SCL", "0.9"]
    assert "0.7000 ± 0.2160 (4)" in line
    assert line.endswith("0.6000 ± 0.1000 (3)   0.500 0.600 0.700 1.000")


def test_unfinished_runs_are_named_and_doubles_refused(tmp_path: Path) -> None:
    """Nothing is left out or mixed in silence."""
    leave_run(tmp_path / "a", 0, 0.0, (0.5, 0.4))
    leave_run(tmp_path / "b", 1, 0.0, None)
    name, draws, unfinished = read(tmp_path)
    assert (name, [d.test for d in draws], unfinished) == ("accuracy", [0.4], ["b"])
    leave_run(tmp_path / "c", 0, 0.0, (0.5, 0.6))
    with pytest.raises(UserError, match="several runs of one arm and draw"):
        read(tmp_path)
