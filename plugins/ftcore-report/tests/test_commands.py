"""The commands: what they print, what they write, and what a mistake looks like."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ftcore import UserError
from ftcore.lease import lease
from ftcore_report import commands
from tests.cli import run

ROWS = [{"text": f"row {i} " + "ab" * (i % 7), "label": "yes" if i % 3 else "no"} for i in range(32)]


@pytest.fixture
def sweep(tmp_path: Path, make_run: Callable[..., Path]) -> Path:
    """Seven seeds of two arms, one of them better on every row."""
    for seed in range(7):
        answers = (np.arange(60) + seed) % 4 > 0
        make_run(f"a{seed}", seed=seed, answers=answers & (np.arange(60) % 5 > 0))
        make_run(f"b{seed}", seed=seed, answers=answers, plugins={"mixout": {"p": 0.7}})
    return tmp_path / "runs"


def test_table_csv_and_json_agree(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One comparison in four forms."""
    table, found, page = (tmp_path / f"c.{kind}" for kind in ("csv", "json", "html"))
    assert commands.compare([str(sweep), "--csv", str(table), "--json", str(found), "--html", str(page)]) == 0
    said = capsys.readouterr().out
    (one,) = json.loads(found.read_text())["comparisons"]
    base, arm = one["arms"]
    assert (base["verdict"], arm["verdict"], one["baseline"]) == ("baseline", "better", "no plugin")
    d = arm["difference"]
    assert d["paired_by_seed"]
    assert d["p"] == d["p_holm"] == 2 / 2**7
    assert d["interval_corrected"] == d["interval"]  # of a single comparison
    assert f"[{d['interval'][0]:+.4f}, {d['interval'][1]:+.4f}]" in said
    assert f"{arm['mean']:.4f}" in said
    lines = list(csv.DictReader(table.read_text().splitlines()))
    assert [(x["arm"], x["n"], x["verdict"]) for x in lines] == [
        ("no plugin", "7", "baseline"),
        ("mixout", "7", "better"),
    ]
    assert float(lines[1]["difference"]) == d["value"]
    assert page.read_text().startswith("<!doctype html>")


def test_what_is_left_out_is_said(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another program's directory, and a damaged run."""
    (sweep / "other").mkdir()
    (sweep / "other/config.yaml").write_text("services: [db]\n")
    (sweep / "a1/result.json").write_text("{")
    assert commands.compare([str(sweep)]) == 0
    said = capsys.readouterr().out
    assert f"left out: {sweep}/other: config.yaml is not ftcore's" in said
    assert f"left out: {sweep}/a1: result.json can't be read" in said
    assert "paired by seed, without 1 run(s) whose seed only one arm has: 1" in said


def test_mistakes_are_one_line(sweep: Path, tmp_path: Path) -> None:
    """No such directory, nothing in it, an unknown arm, a place that can't be written."""
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([str(tmp_path / "nope")], "no directory"),
        ([str(tmp_path / "empty")], "no runs in"),
        ([str(sweep), "--baseline", "x"], "no arm 'x'; there are: no plugin; mixout"),
        ([str(sweep), "--csv", str(tmp_path / "no/where.csv")], "can't write"),
        ([str(sweep), "--nonsense"], "unrecognized arguments"),
    ):
        with pytest.raises(UserError, match=message) as error:
            commands.compare(arguments)
        assert "\n" not in str(error.value)
    (tmp_path / "half").mkdir()
    (tmp_path / "half/run.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.yaml is missing"):
        commands.report([str(tmp_path / "half")])


def test_status_says_done_running_failed_and_time_left(
    tmp_path: Path, make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished run, one whose lease is held, half done, one that is gone, and one with an error."""
    make_run("done")
    going = make_run("going", seed=1, finished=False)
    state = going / "checkpoints/step-10/state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"step": 10, "seconds": 50.0}))
    (going / "metrics.jsonl").write_text(json.dumps({"step": 12, "epoch": 1.0, "loss": 0.1}) + "\n")
    quiet = make_run("quiet", seed=2, finished=False)
    (quiet / "checkpoints/step-6").mkdir(parents=True)
    failed = make_run("failed", seed=3, finished=False)
    (failed / "failed.json").write_text(json.dumps({"error": "out of memory"}))
    with lease(going):
        assert commands.status([str(tmp_path / "runs")]) == 0
    lines = capsys.readouterr().out.splitlines()
    said = {
        name: next(line for line in lines if f" {name} " in line) for name in ("going", "quiet", "failed")
    }
    assert "running" in said["going"]
    assert "12/24" in said["going"]
    assert "1:00" in said["going"]  # 12 steps of 5 s
    assert "has a checkpoint to resume from" in said["quiet"]
    assert "out of memory" in said["failed"]
    assert "1 finished, 1 running, 2 failed; about 1:00 left for those that run" in lines


def test_help_imports_no_report() -> None:
    """`ftcore --help` lists the commands without importing the package, or anything heavy of it."""
    code = "import sys; from ftcore.cli import main; main(['--help']);"
    code += "print([m for m in sys.modules if m.startswith(('ftcore_report', 'scipy', 'pyarrow', 'torch'))])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"
    assert "compare" in ended.stdout


def test_a_real_sweep_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs by ftcore itself: compared, watched and reported by the command line."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    files = [f"data.{split}={path}" for split in ("train", "validation", "test")]
    jobs = ["-m", "optim.lr=1e-3,1e-2", "seed=0,1", "model=tiny_bert", "data=files", *files, "train.steps=3"]
    ended = run([*jobs, "hydra.sweep.dir=sweep"], tmp_path)
    assert ended.returncode == 0, ended.stderr
    line = ["compare", "sweep", "--baseline", "optim.lr=0.001", "--json", "c.json"]
    compared = run(line, tmp_path)
    assert compared.returncode == 0, compared.stderr
    (one,) = json.loads((tmp_path / "c.json").read_text())["comparisons"]
    assert (one["metric"], one["baseline"]) == ("test/accuracy", "optim.lr=0.001")
    assert [arm["n"] for arm in one["arms"]] == [2, 2]
    assert [arm["failed"] for arm in one["arms"]] == [0, 0]
    first = sorted((tmp_path / "sweep").glob("*/result.json"))[0].parent
    assert commands.report([str(first)]) == 0
    assert commands.status([str(tmp_path / "sweep")]) == 0
    said = capsys.readouterr().out
    assert str(first / "report.html") in said
    assert "4 finished, 0 running, 0 failed" in said
