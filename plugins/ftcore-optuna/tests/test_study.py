"""Studies by the command line: techniques and options in one space, pruning, crashes, and going on."""

import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from tests import cli

ROWS = [{"text": f"{'good' if i % 2 else 'bad'} {i}", "label": "yes" if i % 2 else "no"} for i in range(40)]
SPACE = ["+plugin=[],mixout", "plugin.mixout.p=interval(0.1,0.9)", "optim.lr=tag(log,interval(1e-5,1e-3))"]


def command(tmp: Path, *more: str, validation: bool = True) -> list[str]:
    """A study of a tiny model in `tmp/runs/default`."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    for split in ("train", "validation", "test"):
        (tmp / f"{split}.jsonl").write_text(lines)
    splits = ("train", "validation", "test") if validation else ("train", "test")
    data = ["data=files", *(f"data.{split}={tmp / split}.jsonl" for split in splits)]
    tiny = ["model=tiny_bert", "train.steps=8", "train.eval_every=2", "train.save_every=2"]
    return ["-m", "hydra/sweeper=optuna", *data, *tiny, *more]


def run(tmp: Path, line: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """The command to its end."""
    return cli.run(line, tmp)


def study(tmp: Path, name: str = "default") -> optuna.Study:
    path = tmp / "runs" / name / "study.journal"
    path.parent.mkdir(parents=True, exist_ok=True)
    storage = JournalStorage(JournalFileBackend(str(path)))
    return optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)


def results(tmp: Path) -> dict[Path, Any]:
    return {f.parent: json.loads(f.read_text()) for f in (tmp / "runs").glob("default/*/result.json")}


def is_in_the_middle(tmp: Path) -> bool:
    """Whether some run has saved a checkpoint after its first evaluation and has no result yet."""
    steps = (tmp / "runs").glob("default/*/checkpoints/step-*")
    saved = {f.parent.parent for f in steps if int(f.name.removeprefix("step-")) >= 50}
    return bool(saved - set(results(tmp)))


def test_trials_are_runs_and_the_study_goes_on(tmp_path: Path) -> None:
    """Each trial has a run of its own whose figure it was told; more trials are added by the same command."""
    first = run(tmp_path, command(tmp_path, "hydra.sweeper.n_trials=3", *SPACE))
    assert first.returncode == 0, first.stderr
    assert "study default: 3 trials, 3 finished" in first.stdout
    assert "3 jobs: 3 finished" in first.stdout
    found = results(tmp_path)
    trials = study(tmp_path).trials
    assert len(found) == len(trials) == 3
    for trial in trials:
        told = found[Path(trial.user_attrs["directory"])]
        assert trial.value == told["metric"]["value"]
        assert told["metric"]["name"] == "eval/accuracy"
        assert list(told["plugins"]) == (["mixout"] if trial.params["+plugin"] == "mixout" else [])
        assert ("plugin.mixout.p" in trial.params) == (trial.params["+plugin"] == "mixout")

    again = run(tmp_path, command(tmp_path, "hydra.sweeper.n_trials=3", *SPACE))
    assert again.returncode == 0, again.stderr
    assert "study default: 3 trials, 3 finished" in again.stdout
    assert results(tmp_path) == found

    more = run(tmp_path, command(tmp_path, "hydra.sweeper.n_trials=5", *SPACE))
    assert more.returncode == 0, more.stderr
    assert "study default: 5 trials" in more.stdout
    assert len(results(tmp_path)) == 5, "the draws of the first command came again"
    assert results(tmp_path).items() >= found.items()


def test_a_study_of_something_else_is_refused(tmp_path: Path) -> None:
    """Another space, setting, direction, place or data; what changes no run is not asked about."""
    storage = ["hydra.sweeper.storage=sqlite:///study.db", "hydra.sweeper.study=one"]
    own = [*storage, "hydra.sweeper.n_trials=1"]
    assert run(tmp_path, command(tmp_path, *own, "optim.lr=1e-4,1e-3")).returncode == 0
    quiet = run(tmp_path, command(tmp_path, *own, "optim.lr=1e-4,1e-3", "train.log_every=3"))
    assert "1 trials, 1 finished" in quiet.stdout, quiet.stderr
    lr = "optim.lr=1e-4,1e-3"
    for more, message in (
        (["optim.lr=1e-4,1e-2"], "study 'one' was begun with optim.lr=Categorical"),
        ([lr, "train.steps=9"], "begun with train.steps=8, now 9; set another hydra.sweeper.study="),
        ([lr, "hydra.sweeper.direction=minimize"], "begun with direction=maximize, now minimize"),
        ([lr, "name=b"], f"begun with hydra.sweep.dir={tmp_path}/runs/default, now {tmp_path}/runs/b"),
    ):
        other = run(tmp_path, command(tmp_path, *storage, *more))
        assert other.returncode == 2
        assert message in other.stderr
    line = command(tmp_path, *storage, lr)
    (tmp_path / "train.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    changed = run(tmp_path, line)
    assert changed.returncode == 2
    assert "study 'one' can't go on: the data files have changed since" in changed.stderr


@pytest.mark.parametrize("trainer", ["single", "ddp"])
def test_a_run_that_leads_nowhere_is_pruned(tmp_path: Path, trainer: str) -> None:
    """The second trial hardly learns, and is below the median of the first: no test, no model, one run."""
    begun = study(tmp_path)
    begun.enqueue_trial({"optim.lr": "0.01"})
    begun.enqueue_trial({"optim.lr": "1e-09"})
    more = ["trainer=ddp", "trainer.devices=2"] if trainer == "ddp" else []
    pruner = ["hydra.sweeper.pruner=median", "hydra.sweeper.startup=1", "hydra.sweeper.n_trials=2"]
    line = command(
        tmp_path, *pruner, *more, "optim.lr=1e-2,1e-9", "optim.schedule=constant", "train.steps=40"
    )
    ended = run(tmp_path, [a.replace("eval_every=2", "eval_every=10") for a in line])
    assert ended.returncode == 0, ended.stdout + ended.stderr
    good, bad = study(tmp_path).trials
    assert good.state == TrialState.COMPLETE
    assert bad.state == TrialState.PRUNED, ended.stdout
    assert sorted(good.intermediate_values) == [10, 20, 30], "the last evaluation is not asked about"
    directory = Path(bad.user_attrs["directory"])
    result = results(tmp_path)[directory]
    assert result["status"] == "pruned"
    assert "the pruner gives up trial 1" in result["reason"]
    assert result["steps"] == max(bad.intermediate_values) < 40
    assert not any(key.startswith("test/") for key in result["metrics"])
    answered = run(tmp_path, ["evaluate", str(directory)])
    assert answered.returncode == 2
    assert "has no model/: it was pruned (the pruner gives up trial 1" in answered.stderr
    assert "2 jobs: 1 finished, 1 pruned" in ended.stdout
    assert "study default: 2 trials, 1 finished, 1 pruned" in ended.stdout


def test_killed_and_given_again_it_ends_complete(tmp_path: Path) -> None:
    """SIGKILL in a trial: the same command resumes that trial, and makes those that it would have made."""
    space = ["hydra.sweeper.n_trials=3", "optim.lr=interval(1e-4,1e-3)"]
    pruner = ["hydra.sweeper.pruner=median", "hydra.sweeper.startup=100"]
    line = command(tmp_path, *space, *pruner, "train.steps=200", "train.eval_every=40", "train.save_every=5")
    process = cli.start(line, tmp_path)
    deadline = time.monotonic() + 120
    while not (results(tmp_path) and is_in_the_middle(tmp_path)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = results(tmp_path)
    ended = run(tmp_path, line)
    assert ended.returncode == 0, ended.stderr
    assert "study default: 3 trials, 3 finished" in ended.stdout
    assert "resuming at step" in ended.stdout
    assert len(results(tmp_path)) == 3
    assert results(tmp_path).items() >= before.items()
    done = [t for t in study(tmp_path).trials if t.state == TrialState.COMPLETE]
    assert all(sorted(t.intermediate_values) == [40, 80, 120, 160] for t in done), "told before the kill"
    whole = run(tmp_path, command(tmp_path, *space, "train.steps=1", "name=whole"))
    assert whole.returncode == 0, whole.stderr
    assert [t.params for t in done] == [t.params for t in study(tmp_path, "whole").trials]


def test_a_metric_that_is_no_number_is_a_failure(tmp_path: Path) -> None:
    """NaN, and infinity on the better side; the best trial's command runs as printed."""
    odd = tmp_path / "odd.py"
    odd.write_text(
        "from ftcore import hookimpl, plugin\n\n@plugin(api=1)\nclass Odd:\n    x: str = ''\n"
        "    @hookimpl\n    def evaluate(self):\n        return {'odd': float(self.x)}\n"
    )
    begun = study(tmp_path)
    for x in ("nan", "inf", "3 "):
        begun.enqueue_trial({"plugin.odd.x": f"'{x}'"})
    space = ["--plugin-file", str(odd), "+plugin=odd", "task.metric=odd", "plugin.odd.x='nan','inf','3 '"]
    late = ["hydra.sweeper.n_trials=3", "hydra.sweeper.pruner=median", "train.eval_every=8"]
    ended = run(tmp_path, command(tmp_path, *late, *space))
    assert "trial 0: failed: eval/odd is nan" in ended.stdout, ended.stderr
    assert "trial 1: failed: eval/odd is inf" in ended.stdout
    assert "study default: 3 trials, 1 finished, 2 failed" in ended.stdout
    assert "note: the pruner was never asked" in ended.stdout
    assert "Traceback" not in ended.stderr
    (printed,) = re.findall(r"^  ftcore (.*)$", ended.stdout, re.M)
    alone = run(tmp_path, shlex.split(printed))
    assert alone.returncode == 0, alone.stderr
    assert "odd 3.0000" in alone.stdout


def test_a_failed_trial_is_tried_again(tmp_path: Path) -> None:
    line = command(tmp_path, "hydra.sweeper.n_trials=2", "optim.lr=1e-3,1e-4")
    (tmp_path / "train.jsonl").write_text('{"text": "no label"}\n')
    failed = run(tmp_path, line)
    assert failed.returncode == 1
    assert "study default: 2 trials, 2 failed" in failed.stdout
    line = command(tmp_path, "hydra.sweeper.n_trials=2", "optim.lr=1e-3,1e-4")
    ended = run(tmp_path, line)
    assert ended.returncode == 0, ended.stderr
    assert "study default: 2 trials, 2 finished" in ended.stdout


def test_joblib_gets_several_trials_at_once(tmp_path: Path) -> None:
    """Each reports to its own trial; of two with the same values one is run."""
    for lr in ("0.001", "0.0001", "0.001"):
        study(tmp_path).enqueue_trial({"optim.lr": lr})
    more = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweeper.n_jobs=3"]
    pruner = ["hydra.sweeper.pruner=median", "hydra.sweeper.startup=100", "hydra.sweeper.n_trials=3"]
    ended = run(tmp_path, command(tmp_path, *more, *pruner, "optim.lr=1e-3,1e-4"))
    assert ended.returncode == 0, ended.stderr
    assert "2 jobs: 2 finished" in ended.stdout
    trials = study(tmp_path).trials
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 3
    assert all(sorted(t.intermediate_values) == [2, 4, 6] for t in trials), (
        "each job reported to its own trial"
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["optim.lr=1e-3"], "nothing to search"),
        (["plugin.mixout.p=0.1,0.2", "+plugin=[],neftune"], "'plugin.mixout.p' has no effect"),
        (["optim.lr=1,2", "hydra.sweeper.pruner=medain"], "did you mean 'median'?"),
        (["optim.lr=1,2", "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials=0: must be 1 or more"),
        (["optim.lrr=1,2"], "no config key 'optim.lrr'; did you mean 'optim.lr'?"),
        (["optim.lr=1,x"], "optim.lr: wrong type"),
        (["+plugin=[],mixout", "plugin.mixout.pp=1,2"], "plugin mixout has no option 'pp'"),
        (["optim.lr=1,2", "hydra.sweeper.n_jobs=2"], "n_jobs=2: this launcher runs one at a time; add"),
        (
            ["optim.lr=1,2", "hydra.sweeper.storage=train.jsonl"],
            "can't be opened: it is no journal of Optuna's",
        ),
        (["optim.lr=1,2", "hydra.sweeper.startup=-1"], "hydra.sweeper.startup=-1: must be 0 or more"),
        (["optim.lr=1,2", "hydra.sweeper.seed=-1"], "hydra.sweeper.seed=-1: must be 0 to 2,147,483,648"),
        (["optim.lr=1,2", "hydra.sweeper.storage=/no/x"], "storage=/no/x can't be opened: [Errno 2] No such"),
        (["optim.lr=1,2", "hydra.sweeper.storage=no://x/y"], "storage=no://x/y can't be opened: "),
        (
            ["optim.lr=interval(1, 2)", "hydra/sweeper=basic"],
            "write a,b or range(1,3), or add hydra/sweeper=optuna",
        ),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, more: list[str], message: str) -> None:
    ended = run(tmp_path, command(tmp_path, *more))
    assert ended.returncode == 2, ended.stderr
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not list((tmp_path / "runs").rglob("study.journal")), "a mistake begins no study"


def test_a_search_by_test_data_is_refused(tmp_path: Path) -> None:
    line = command(tmp_path, "hydra.sweeper.n_trials=3", "optim.lr=1e-3,1e-4", validation=False)
    ended = run(tmp_path, line)
    assert ended.returncode == 2, ended.stderr
    assert "a search by test/accuracy would fit the test data" in ended.stderr


def test_the_pruner_outside_a_study_is_an_error(tmp_path: Path) -> None:
    line = [a for a in command(tmp_path, "+plugin=optuna") if a not in ("-m", "hydra/sweeper=optuna")]
    ended = run(tmp_path, line)
    assert ended.returncode == 2, ended.stderr
    assert "plugin optuna works in a study alone" in ended.stderr
