"""By the command line: one rank and two, the experiment, and what a mistake looks like."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli import run

from .conftest import ROWS


def ftcore(tmp: Path, *arguments: str, ranks: int = 1) -> str:
    """`ftcore ARGUMENTS` to its end; what it printed."""
    ended = run(arguments, tmp, ranks=ranks)
    assert ended.returncode in (0, 2), ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """The arguments of tiny data for a tiny model; 32 rows in steps of 12: the last is short."""
    found = []
    for split in ("train", "validation"):
        path = tmp_path / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        found.append(f"data.{split}={path}")
    return ["model=tiny_bert", "data=files", *found, "train.batch_size=12"]


def records(run_dir: Path) -> list[Any]:
    """Loss and gradient norm of each step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if "loss" in line for key in ("loss", "grad_norm")]


def test_two_ranks_train_as_one(tmp_path: Path, data: list[str]) -> None:
    """Both scopes of the mask, decay, and a last step in which one rank has nothing to do."""
    name = "hydra.sweep.subdir=${plugin.mixout.mask_scope}"
    common = ["-m", *data, "+plugin=mixout", "plugin.mixout.mask_scope=step,micro_batch", name]
    common += ["plugin.mixout.decay=0.1", "train.micro_batch_size=4", "train.steps=3", "train.log_every=1"]
    common += ["model.dropout=0", "optim.lr=1e-2"]
    one = ftcore(tmp_path, *common, "hydra.sweep.dir=one")
    two = ftcore(tmp_path, *common, "hydra.sweep.dir=two", "trainer=ddp", "trainer.device=cpu", ranks=2)
    for scope in ("step", "micro_batch"):
        found = records(tmp_path / "one" / scope)
        assert len(found) == 6, one
        assert records(tmp_path / "two" / scope) == pytest.approx(found, rel=1e-5, abs=0), two
    assert records(tmp_path / "one/step") != pytest.approx(records(tmp_path / "one/micro_batch"), rel=1e-3)


def test_the_experiment_runs_with_two_seeds(tmp_path: Path, data: list[str]) -> None:
    """Three strengths, their controls and the baseline; seeds and length cut to a smoke test."""
    output = ftcore(tmp_path, "-m", "experiment=mixout_stability", *data, "seed=0,1", "train.steps=2")
    runs = sorted((tmp_path / "runs/mixout_stability").glob("*/run.json"))
    found = [json.loads(path.read_text())["plugins"][0]["options"] for path in runs]
    arms = [(p, control) for p in (0, 0.5, 0.7, 0.9) for control in (False, True)]
    assert sorted((o["p"], o["control"]) for o in found) == sorted(arms * 2), output
    assert all((path.parent / "result.json").is_file() for path in runs)


def test_the_plan_says_what_a_run_mixes(tmp_path: Path, data: list[str]) -> None:
    """`ftcore plan`, without weights, and run.json, with them, list the same."""
    plan = json.loads(ftcore(tmp_path, "plan", "--json", *data, "+plugin=mixout"))
    ftcore(tmp_path, *data, "+plugin=mixout", "train.steps=1", "hydra.run.dir=run")
    about = json.loads((tmp_path / "run/run.json").read_text())
    assert plan["plugins"][0]["describes"] == about["plugins"][0]["describes"]
    assert len(about["plugins"][0]["describes"]["mixed"]) > 5


def test_a_mistake_is_one_line(tmp_path: Path, data: list[str]) -> None:
    """An option out of range, before any weights are read."""
    output = ftcore(tmp_path, *data, "+plugin=mixout", "plugin.mixout.p=1.5")
    assert output == "ftcore: error: plugin.mixout: p must be in [0, 1), got 1.5\n"
