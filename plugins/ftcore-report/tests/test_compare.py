"""Which runs meet, which never do, and what is said of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftcore import UserError
from ftcore_report import Comparison, compare, find_runs
from ftcore_report._run_page import run_page
from ftcore_report._status import state
from ftcore_report._table import as_json, write_json

RNG = np.random.default_rng(3)


def right(share: float, rows: int = 60) -> np.ndarray:
    """Answers of one run, that many right in the mean."""
    return RNG.random(rows) < share


def compared(tmp: Path, **options: Any) -> list[Comparison]:
    runs, problems = find_runs([tmp / "runs"])
    assert not problems
    return compare(runs, **options)


def notes(one: Comparison) -> str:
    return "\n".join(one.notes)


def test_arms_are_what_differs_and_seeds_are_together(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    """Names, keys that change no weight, and seeds make no arm; the plugin-free arm is the baseline."""
    for seed in range(3):
        make_run(f"a{seed}", seed=seed, config={"name": f"n{seed}", "train.log_every": 5 + seed})
        make_run(f"b{seed}", seed=seed, plugins={"mixout": {"p": 0.7, "decay": 0.0}})
        make_run(f"c{seed}", seed=seed, plugins={"mixout": {"p": 0.9, "decay": 0.0}})
    (one,) = compared(tmp_path)
    assert [(x.arm, len(x.values)) for x in one.lines] == [
        ("no plugin", 3),
        ("mixout p=0.7", 3),
        ("mixout p=0.9", 3),
    ]
    assert one.baseline == "no plugin"
    assert (one.metric, one.sign) == ("test/accuracy", 1)


def test_a_clear_difference_is_called_and_no_other(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    """Seven seeds: one arm far above, one equal; direction and claim follow the metric."""
    for seed in range(7):
        make_run(f"a{seed}", seed=seed, answers=right(0.5, 300))
        make_run(f"b{seed}", seed=seed, answers=right(0.8, 300), plugins={"good": {}})
        make_run(f"c{seed}", seed=seed, answers=right(0.5, 300), plugins={"same": {}})
    lines = {x.arm: x for x in compared(tmp_path)[0].lines}
    assert lines["good"].is_called
    assert lines["good"].verdict == "better"
    assert not lines["same"].is_called
    assert lines["same"].verdict.startswith("not distinguishable")
    assert lines["good"].difference.paired
    assert lines["good"].difference.rows == 300
    (turned,) = compared(tmp_path, metric="-accuracy")
    assert {x.arm: x.verdict for x in turned.lines}["good"] == "worse"


def test_figures_of_an_arm(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    """Mean, sd over seeds, median, best by the direction, cost, failed and degenerate runs."""
    shares = [0.2, 0.5, 0.9]
    for seed, share in enumerate(shares):
        make_run(f"a{seed}", seed=seed, answers=np.arange(30) < 30 * share)
    make_run("a9", seed=9, finished=False)
    pruned = make_run("a8", seed=8, metrics={"eval/accuracy": 0.5}) / "result.json"
    pruned.write_text(pruned.read_text().replace('"finished"', '"pruned"'))  # no test figure, and no table
    ((line,),) = (one.lines for one in compared(tmp_path))
    assert (line.mean, line.median, line.best) == pytest.approx((np.mean(shares), 0.5, 0.9))
    assert line.sd == pytest.approx(np.std(shares, ddof=1))
    assert (line.failed, line.degenerate) == (1, 1)  # of three classes the commonest has a third
    assert line.memory_mb == 111
    assert (line.seconds, line.tokens_per_second) == pytest.approx((11, np.mean([120, 1200 / 11, 100])))
    (lower,) = compared(tmp_path, metric="-accuracy")
    assert lower.lines[0].best == pytest.approx(0.2)


def test_runs_of_other_data_are_compared_apart(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    """Two data sets: two comparisons; a run that crashed before it knew its data is counted by its config."""
    for name, data in (("x", "1111"), ("y", "2222")):
        for plugins in ({}, {"mixout": {}}):
            for seed in range(2):
                make_run(
                    f"{name}{len(plugins)}{seed}",
                    seed=seed,
                    data=data,
                    plugins=plugins,
                    config={"data.train": f"/data/{name}.jsonl"},
                )
    crashed = make_run("z", seed=7, finished=False, config={"data.train": "/data/y.jsonl"})
    (crashed / "run.json").unlink()
    found = {one.data: one for one in compared(tmp_path)}
    assert set(found) == {"1111", "2222"}
    assert all(len(x.values) == 2 for one in found.values() for x in one.lines)
    assert [x.arm for x in found["2222"].lines] == ["no plugin", "mixout"]
    assert str(crashed) in notes(found["2222"])
    assert str(crashed) not in notes(found["1111"])


def test_draws_of_data_are_paired_when_asked_for(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    """`over=data.train`: each draw is a unit of its own, paired between arms."""
    for draw in range(6):
        for plugins in ({}, {"scl": {}}):
            data = {"data.train": f"/data/{draw}.jsonl"}
            answers = right(0.4 + 0.05 * draw + 0.1 * len(plugins))
            make_run(f"{draw}{len(plugins)}", plugins=plugins, config=data, data=f"d{draw}", answers=answers)
    (one,) = compared(tmp_path, over=["data.train"])
    assert [len(x.values) for x in one.lines] == [6, 6]
    assert one.lines[1].difference.paired
    assert "averaged over data.train" in notes(one)
    assert len(compared(tmp_path)) == 6


def test_by_a_key_averages_over_the_others_and_says_so(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    """Two rates and two seeds: four units an arm, paired by both."""
    for lr in (0.1, 0.01):
        for seed in range(2):
            for plugins in ({}, {"mixout": {"p": 0.5}}):
                make_run(f"{lr}{seed}{len(plugins)}", seed=seed, plugins=plugins, config={"optim.lr": lr})
    (one,) = compared(tmp_path, by=["plugin"])
    assert [(x.arm, len(x.values)) for x in one.lines] == [("no plugin", 4), ("mixout", 4)]
    assert one.lines[1].difference.paired
    assert "averaged over optim.lr" in notes(one)
    (all_keys,) = compared(tmp_path)
    assert all_keys.baseline is None
    assert "2 arms have no plugin" in notes(all_keys)
    with pytest.raises(UserError, match=r"no config key 'plugins'.*did you mean 'plugin'"):
        compared(tmp_path, by=["plugins"])


def test_other_training_rows_of_a_plugin_are_arms(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    """A plugin's own data: what was evaluated is the same, so the arms meet, with numbers in their order."""
    for count in (160, 9, 40):
        options = {"instruct": {"num_tasks": count}}
        path = make_run(f"{count}", plugins=options, data=f"mixture of {count}")
        about = json.loads((path / "run.json").read_text())
        splits = {"train": {"sha256": f"rows of {count}"}, "test": {"sha256": "one and the same"}}
        about["data"] |= {"from_files": False, "splits": splits}
        (path / "run.json").write_text(json.dumps(about))
    (one,) = compared(tmp_path)
    assert [x.arm for x in one.lines] == [f"instruct.num_tasks={n}" for n in (9, 40, 160)]
    assert "no baseline: 3 arms have instruct alone" in notes(one)


def test_one_seed_claims_nothing(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    """A difference, but neither interval nor p."""
    make_run("a")
    make_run("b", plugins={"mixout": {}}, answers=right(0.9))
    line = compared(tmp_path)[0].lines[1]
    assert (line.p, line.corrected, line.is_called) == (None, None, False)
    assert line.verdict == "one seed: nothing can be said"


def test_a_metric_that_some_runs_lack(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    """They are named and left out; where no run has it, that is an error with the nearest."""
    for seed in range(3):
        make_run(f"a{seed}", seed=seed, metrics={"test/accuracy": 0.5, **({"test/f1": 0.4} if seed else {})})
    (one,) = compared(tmp_path, metric="f1")
    assert len(one.lines[0].values) == 2
    assert f"1 without test/f1: {tmp_path / 'runs/a0'}" in notes(one)
    with pytest.raises(UserError, match=r"no run has the metric 'accurracy'.*test/accuracy"):
        compared(tmp_path, metric="accurracy")


def test_metrics_that_are_no_mean_resample_seeds_only(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    """Also where the predictions' mean is not the recorded metric, or a run has no predictions."""
    for seed in range(3):
        for plugins in ({}, {"mixout": {}}):
            metrics = {"test/accuracy": 0.123 * (seed + 1), "test/macro_f1": 0.5 + 0.1 * seed}
            make_run(f"{seed}{len(plugins)}", seed=seed, plugins=plugins, metrics=metrics)
    for metric in ("macro_f1", "accuracy"):
        (one,) = compared(tmp_path, metric=metric)
        assert one.lines[1].difference.rows == 0
        assert f"intervals resample seeds only: {metric} is no mean over rows" in notes(one)


def test_nll_is_a_mean_over_rows(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    """Read off the probabilities of the rows' labels; smaller is better."""
    for seed in range(2):
        for share, plugins in ((0.5, {}), (0.9, {"mixout": {}})):
            answers = np.arange(30) < 30 * share
            nll = float(-np.where(answers, np.log(0.8), np.log(0.1)).mean())
            make_run(f"{seed}{share}", seed=seed, plugins=plugins, answers=answers, metrics={"test/nll": nll})
    (one,) = compared(tmp_path, metric="nll")
    assert one.sign == -1
    assert one.lines[1].difference.rows == 30
    assert one.lines[1].best < one.lines[0].best


def test_a_baseline_is_named_or_not_guessed(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    """By its label or parts of it; none and several are errors that list the arms."""
    for p in (0.5, 0.9):
        make_run(f"{p}", plugins={"mixout": {"p": p}})
    (one,) = compared(tmp_path)
    assert one.baseline is None
    assert "no baseline" in notes(one)
    assert all(x.difference is None for x in one.lines)
    assert compared(tmp_path, baseline="mixout.p=0.5")[0].baseline == "mixout.p=0.5"
    with pytest.raises(UserError, match=re.escape("no arm 'p=0.7'; there are: mixout.p=0.5; mixout.p=0.9")):
        compared(tmp_path, baseline="p=0.7")


def test_the_same_run_twice_counts_once(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    """A copy of a run is no second seed; it is named."""
    make_run("a", seed=1)
    make_run("copy", seed=1, config={"name": "copy"})
    (one,) = compared(tmp_path)
    assert len(one.lines[0].values) == 1
    assert "repeats" in notes(one)


def test_other_code_in_one_comparison_is_said(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    """Two versions of ftcore, or two sources of a plugin, would be taken for one."""
    for seed, source in enumerate(("aaaaaaaaaa", "bbbbbbbbbb")):
        path = make_run(f"a{seed}", seed=seed, plugins={"mixout": {}}) / "run.json"
        about = json.loads(path.read_text()) | {"ftcore": f"0.{seed}.0"}
        about["plugins"][0]["source"] = source
        path.write_text(json.dumps(about))
    (one,) = compared(tmp_path)
    assert "several versions of ftcore: 0.0.0, 0.1.0" in notes(one)
    assert "several versions of mixout: 0.1.0 (aaaaaaaa), 0.1.0 (bbbbbbbb)" in notes(one)
    make_run("b", seed=2)
    assert "mixout: 0.1.0 (aaaaaaaa), 0.1.0 (bbbbbbbb)" in notes(compared(tmp_path)[0])


def test_other_test_rows_are_not_paired(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    """Runs that were scored on other rows: seeds only, and which run it is."""
    for seed in range(2):
        make_run(f"a{seed}", seed=seed)
        make_run(f"b{seed}", seed=seed, plugins={"mixout": {}}, answers=right(0.5, 29))
    (one,) = compared(tmp_path)
    assert one.lines[1].difference.rows == 0
    assert "not scored on the same test rows" in notes(one)


@pytest.mark.parametrize(
    ("file", "content", "why"),
    [
        ("config.yaml", b"model: {path: x", "config.yaml can't be read"),
        ("config.yaml", b"\xff\xfe\x00", "config.yaml can't be read"),
        ("config.yaml", b"services: [db]\n", "config.yaml is not ftcore's"),
        ("config.yaml", b"", "config.yaml is not ftcore's"),
        ("result.json", b'{"status": "fini', "result.json can't be read"),
        ("result.json", b"[1, 2]", "result.json holds no object"),
        ("result.json", b'{"metrics": [1], "status": "finished"}', "result.json is no result of ftcore"),
        ("result.json", b'{"metric": ["x"], "status": "finished"}', "result.json is no result of ftcore"),
        (
            "result.json",
            b'{"plugin_cost": {"a": 1}, "status": "pruned"}',
            "result.json is no result of ftcore",
        ),
        ("run.json", b'{"data": 3}', "run.json is no description by ftcore"),
        ("run.json", b"\x00\x01", "run.json can't be read"),
    ],
)
def test_damaged_and_foreign_directories_are_named(
    tmp_path: Path, make_run: Callable[..., Path], file: str, content: bytes, why: str
) -> None:
    """Left out with the reason; the others are compared."""
    make_run("good")
    (make_run("bad") / file).write_bytes(content)
    runs, problems = find_runs([tmp_path / "runs"])
    assert [run.path.name for run in runs] == ["good"]
    assert [p.path.name for p in problems] == ["bad"]
    assert problems[0].why.startswith(why)
    assert "\n" not in problems[0].why


def test_a_list_of_plugins_is_no_config_of_ftcore(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    """A run edited by hand costs no other run its comparison."""
    make_run("good")
    make_run("bad", config={"plugin": [1]})
    _, problems = find_runs([tmp_path / "runs"])
    assert [p.why for p in problems] == ["config.yaml is not ftcore's, or is half written"]


def test_a_directory_named_twice_is_there_once(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    """By a link, too: an unfinished run is counted once, and a finished one repeats nothing."""
    make_run("a")
    make_run("b", seed=1, finished=False)
    (tmp_path / "latest").symlink_to(tmp_path / "runs/b")
    runs, _ = find_runs([tmp_path / "latest", tmp_path / "runs", tmp_path / "runs/a/../a"])
    assert [run.path for run in runs] == [tmp_path / "latest", tmp_path / "runs/a"]


def test_odd_values_in_a_result_harm_nothing(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    """Metrics that are not finite or no numbers are not there; a torn predictions file is none."""
    path = make_run("a", metrics={"test/accuracy": 0.5, "test/nan": float("nan"), "test/text": "x"})
    (path / "predictions/test.parquet").write_bytes(b"PAR1 torn")
    (path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss"\n[]\n{"step": "x"}\n{"step": NaN}\n\xff\n')
    make_run("b", seed=1)
    (one,) = compared(tmp_path)
    assert len(one.lines[0].values) == 2
    assert one.lines[0].degenerate is None
    result = json.loads((path / "result.json").read_text())
    cost = {"plugin_cost": {"mixout": {"ms_per_step": "odd"}}}
    huge = {"metrics": {"test/accuracy": 1e308}}  # its square is none
    odd = [{key: ["odd"]} for key in ("seconds", "tokens", "seed")]
    for edit in (*odd, cost, huge, {"metric": {}}, {"metric": {"name": "x"}}, {"seconds": float("nan")}):
        (path / "result.json").write_text(json.dumps(result | edit))
        write_json(as_json(compared(tmp_path), ()), tmp_path / "c.json")
        state(run := find_runs([path])[0][0])
        run_page(run)
