"""By the command line: ranks, company, the experiments with two draws, and what a mistake looks like."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli import run

from .conftest import ROWS


def ftcore(tmp: Path, *arguments: str, code: int = 0, ranks: int = 1) -> str:
    """`ftcore ARGUMENTS` to its end; what it printed."""
    ended = run(arguments, tmp, ranks=ranks)
    assert ended.returncode == code, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """The arguments of tiny data for a tiny model; 22 rows in steps of 16: the last is short."""
    found = []
    for split in ("train", "validation", "test"):
        path = tmp_path / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        found.append(f"data.{split}={path}")
    return ["model=tiny_bert", "data=files", *found]


def records(run_dir: Path) -> list[Any]:
    """Loss, its contrastive term and gradient norm of each step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    keys = ("loss", "loss/contrastive", "grad_norm")
    return [line[key] for line in lines if "loss" in line for key in keys]


def test_two_ranks_train_as_one_beside_mixout(tmp_path: Path, data: list[str]) -> None:
    """Both kinds of batch, weights of both kinds in the loss, and a step in which a rank has a filler."""
    common = ["-m", *data, "+plugin=[mixout,contrastive]", "plugin.contrastive.batch=micro,global"]
    common += ["hydra.sweep.subdir=${plugin.contrastive.batch}", "model.dropout=0", "train.log_every=1"]
    common += ["train.steps=3", "optim.lr=1e-3"]
    one = ftcore(tmp_path, *common, "hydra.sweep.dir=one", "train.micro_batch_size=8")
    two = ["hydra.sweep.dir=two", "trainer=ddp", "trainer.device=cpu", "train.micro_batch_size=4"]
    told = ftcore(tmp_path, *common, *two, ranks=2)
    for batch in ("micro", "global"):
        found = records(tmp_path / "one" / batch)
        assert len(found) == 9, one
        assert records(tmp_path / "two" / batch) == pytest.approx(found, rel=1e-5, abs=0), told
    assert records(tmp_path / "one/micro") != pytest.approx(records(tmp_path / "one/global"), rel=1e-3)


def test_the_few_shot_experiment_with_two_draws(tmp_path: Path, data: list[str]) -> None:
    """Both losses on the same draws; the report has every draw."""
    cut = ["data.limit.train=12", "data.split_seed=0,1", "train.steps=3", "train.eval_every=2"]
    output = ftcore(tmp_path, "-m", "experiment=scl_fewshot", *data, *cut)
    runs = sorted((tmp_path / "runs/scl_fewshot").glob("*/run.json"))
    configs = [json.loads(path.read_text()) for path in runs]
    assert sorted(c["plugins"][0]["options"]["weight"] for c in configs) == [0, 0, 0.9, 0.9], output
    assert len({c["data"]["fingerprint"] for c in configs}) == 2
    report = ftcore(tmp_path, "scl-report", "runs/scl_fewshot")
    assert [line.split()[:3] for line in report.splitlines()[2:]] == [
        ["12", "none", "CE"],
        ["12", "none", "CE+SCL"],
    ]
    assert all(line.count("(2)") == 2 for line in report.splitlines()[2:])
    assert ftcore(tmp_path, "scl-report", "nowhere", code=2).startswith("ftcore: error: no finished run")


def test_the_noise_experiment_disturbs_training_texts_alone(tmp_path: Path, data: list[str]) -> None:
    """Each kind and strength makes other training data; a run's validation data stays."""
    cut = ["data.limit.train=12", "data.split_seed=0", "train.steps=1", "plugin.contrastive.weight=0.9"]
    cut += ["plugin.text_noise.kind=typo,swap", "plugin.text_noise.strength=0.4"]
    ftcore(tmp_path, "-m", "experiment=scl_noise", *data, *cut)
    runs = [json.loads(path.read_text()) for path in (tmp_path / "runs/scl_noise").glob("*/run.json")]
    assert len({run["data"]["fingerprint"] for run in runs}) == 2
    assert len({json.dumps(run["data"]["splits"]["validation"]) for run in runs}) == 1
    assert [p["name"] for p in runs[0]["plugins"]] == ["contrastive", "text_noise"]


def test_a_warning_is_one_line_on_the_screen(tmp_path: Path, data: list[str]) -> None:
    """Where anchors have no positives; and a refusal is one line too."""
    line = ["+plugin=contrastive", "train.batch_size=2", "train.steps=12", "data.validation=null"]
    output = ftcore(tmp_path, *data, *line)
    assert output.count("warning: contrastive: ") == 1
    assert "of the rows so far had no other row of their class to be pulled to" in output
    output = ftcore(tmp_path, *data, "+plugin=contrastive", "task=causal_lm", "model=tiny_llama", code=2)
    assert output.startswith("ftcore: error: contrastive needs one label a row, task=causal_lm has")
    assert output.count("\n") == 1
    plan = json.loads(ftcore(tmp_path, "plan", "--json", *data, "+plugin=contrastive"))
    assert plan["plugins"][0]["describes"]["representation"] == "first_token"
