"""One gradient, however a step is split: over micro-batches, over ranks, with dropout on and off."""

from pathlib import Path
from typing import Any

import pytest

from .cli import evaluations, make_data, result, run, steps

ROWS = 41  # in steps of 16: the last step of the epoch has 9
NAMES = "hydra.sweep.subdir=micro-${train.micro_batch_size}-dropout-${model.dropout}"


@pytest.fixture(scope="module", params=["classify", "causal_lm", "seq2seq"])
def split(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same three steps in several splits; one sweep on one rank and one on two."""
    tmp, dropout = tmp_path_factory.mktemp(request.param), "0,0.2" if request.param == "classify" else "0"
    common = make_data(tmp, request.param, train=ROWS)
    common += ["train.batch_size=16", "train.steps=3", "train.log_every=1", "optim.lr=1e-2", "seed=1", NAMES]
    one = ["train.micro_batch_size=16,4,1", "model.dropout=0,0.2", "hydra.sweep.dir=one"]
    two = ["train.micro_batch_size=4", f"model.dropout={dropout}", "hydra.sweep.dir=two"]
    for ended in (
        run(["-m", *common, *one], tmp),
        run(["-m", *common, *two, "trainer=ddp", "trainer.device=cpu"], tmp, ranks=2),
    ):
        assert ended.returncode == 0, ended.stderr
    return tmp


def numbers(run_dir: Path) -> list[Any]:
    """Loss and gradient norm of each step."""
    found = [r[key] for r in steps(run_dir) for key in ("loss", "loss/task", "grad_norm")]
    assert len(found) == 9
    return found


@pytest.mark.parametrize("other", ["one/micro-4", "one/micro-1", "two/micro-4"])
def test_the_split_of_a_step_changes_no_gradient(split: Path, other: str) -> None:
    """Without dropout, losses and gradient norms are those of one micro-batch of 16."""
    whole = numbers(split / "one/micro-16-dropout-0.0")
    assert numbers(split / f"{other}-dropout-0.0") == pytest.approx(whole, rel=1e-5, abs=0)
    assert len({r["grad_norm"] for r in steps(split / "one/micro-16-dropout-0.0")}) == 3


def test_the_short_last_step_is_among_them(split: Path) -> None:
    """Three steps of 16 use every one of the 41 rows once: one step has 9."""
    for run_dir in ("one/micro-4-dropout-0.0", "two/micro-4-dropout-0.0"):
        assert result(split / run_dir)["examples"] == ROWS
        assert result(split / run_dir)["steps"] == 3


@pytest.mark.parametrize("split", ["classify"], indirect=True)
def test_dropout_draws_by_micro_batch_not_by_rank(split: Path) -> None:
    """With dropout, two ranks drop what one rank drops with the same micro-batches."""
    one, two = (numbers(split / f"{ranks}/micro-4-dropout-0.2") for ranks in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5, abs=0)


def test_dropout_is_on_in_the_runs_that_ask_for_it(split: Path) -> None:
    """`model.dropout` 0.2 and 0 give different gradients, as do other micro-batches under dropout."""
    with_it, without = (steps(split / f"one/micro-4-dropout-{p}")[0] for p in ("0.2", "0.0"))
    assert with_it["grad_norm"] != pytest.approx(without["grad_norm"], rel=1e-4)
    other = steps(split / "one/micro-1-dropout-0.2")[0]
    assert with_it["grad_norm"] != pytest.approx(other["grad_norm"], rel=1e-4)


def test_evaluation_does_not_depend_on_the_ranks(split: Path) -> None:
    """Two ranks share out an evaluation and get the metrics, and the units, of one."""
    one, two = split / "one/micro-4-dropout-0.0", split / "two/micro-4-dropout-0.0"
    assert result(two)["metrics"] == pytest.approx(result(one)["metrics"], rel=1e-5)
    assert result(two)["tokens"] == result(one)["tokens"] > ROWS
    assert [r["step"] for r in evaluations(two)] == [3]
