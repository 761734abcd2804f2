"""A multirun goes on over failures, crashes and other commands, and runs no job twice."""

import json
import os
import random
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from .cli import is_alive, make_data, make_plugin, records, run, runs, start, steps, weights

SHORT = ["train.steps=6", "train.save_every=2", "train.log_every=1", "train.batch_size=8"]


def command(tmp: Path, *more: str) -> list[str]:
    return ["-m", *make_data(tmp, "classify"), *SHORT, "hydra.sweep.dir=sweep", *more]


def results(tmp: Path) -> dict[str, int]:
    """When each job of the sweep wrote its result."""
    return {f.parent.name: f.stat().st_mtime_ns for f in (tmp / "sweep").glob("*/result.json")}


def test_a_failed_job_is_named_and_the_others_run(tmp_path: Path) -> None:
    line = command(tmp_path, "seed=0,1", "optim.lr=1e-3,-1")
    first = run(line, tmp_path)
    assert first.returncode == 1, first.stderr
    assert "4 jobs: 2 finished, 2 failed" in first.stdout
    assert first.stdout.count("  failed: ") == 2
    assert "2 of 4 jobs failed; the same command again runs only what is unfinished" in first.stderr
    assert "Traceback" not in first.stderr
    before = results(tmp_path)
    assert len(before) == 2

    again = run(line, tmp_path)
    assert again.stdout.count("already finished") == 2
    assert results(tmp_path) == before


def test_a_crash_inside_a_job_is_one_failed_job(tmp_path: Path) -> None:
    """An exception that nobody foresaw shows its traceback, and the next job runs."""
    source = (
        "import ftcore\n\n@ftcore.plugin()\nclass Plugin:\n    '''Breaks.'''\n    at: int = 1\n\n"
        "    @ftcore.hookimpl\n    def on_step_end(self, state):\n"
        "        if state.step == self.at:\n            raise RuntimeError('it broke')\n"
    )
    make_plugin(tmp_path / "site", "breaker", source, "at: 1")
    line = command(tmp_path, "+plugin=breaker", "plugin.breaker.at=3,100")
    ended = run(line, tmp_path, {"PYTHONPATH": str(tmp_path / "site")})
    assert ended.returncode == 1
    assert "2 jobs: 1 finished, 1 failed" in ended.stdout
    assert "RuntimeError: it broke" in ended.stdout
    assert "Traceback" in ended.stderr
    (failed,) = (tmp_path / "sweep").glob("*/failed.json")
    assert json.loads(failed.read_text()) == {"error": "it broke"}


def test_a_sweep_over_nothing_says_so_and_equal_jobs_are_one(tmp_path: Path) -> None:
    assert "0 jobs: nothing" in run(command(tmp_path, "seed=range(3,3)"), tmp_path).stdout
    assert "\n1 job: 1 finished" in run(command(tmp_path, "seed=0,0", "train.steps=1"), tmp_path).stdout


def test_a_failed_job_is_the_last_one_of_ranks_that_stay(tmp_path: Path) -> None:
    """Of torchrun's, who do all jobs in turn: one may have failed where another waits for it."""
    line = command(tmp_path, "trainer=ddp", "trainer.device=cpu", "optim.lr=1e-3,-1,1e-2", "train.steps=2")
    ended = run(line, tmp_path, ranks=2)
    assert ended.returncode == 1
    assert re.search(r"^ftcore: failed: .*lr.*; ranks that torchrun or srun started", ended.stderr, re.M)
    assert "Traceback" not in ended.stderr
    assert len(results(tmp_path)) == 1


def test_killed_and_given_again_it_ends_complete(tmp_path: Path) -> None:
    """SIGKILL at random moments; the same command again finishes, and ends as one that was never killed."""
    line = command(tmp_path, "seed=range(4)", "train.steps=40")
    rng, kills = random.Random(7), 0
    for _ in range(3):
        process = start(line, tmp_path)
        deadline = time.monotonic() + 120
        wanted = len(results(tmp_path)) + rng.randint(0, 1)
        while len(results(tmp_path)) < wanted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 0.5))
        with suppress(ProcessLookupError):  # on a quick machine it may have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills
    before = results(tmp_path)
    ended = run(line, tmp_path)
    assert ended.returncode == 0, ended.stderr
    after = results(tmp_path)
    assert len(after) == 4
    assert before.items() <= after.items(), "a finished job was run again"
    for job in after:
        assert [r["step"] for r in steps(tmp_path / "sweep" / job)] == list(range(1, 41))
    whole = run([a for a in line if a != "hydra.sweep.dir=sweep"] + ["hydra.sweep.dir=whole"], tmp_path)
    assert whole.returncode == 0, whole.stderr
    for job in after:
        assert weights(tmp_path / "sweep" / job) == weights(tmp_path / "whole" / job)


def test_two_commands_share_the_jobs(tmp_path: Path) -> None:
    """What the other runs is left to it; each job is run once."""
    line = command(tmp_path, "seed=range(4)", "train.steps=30")
    processes = [start(line, tmp_path) for _ in range(2)]
    texts = [p.communicate(timeout=240)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], texts
    assert len(results(tmp_path)) == 4
    trained = sum(text.count("step 1/30") for text in texts)
    assert trained == 4, texts
    assert not list((tmp_path / "sweep").glob("*/.lease-*"))


def test_ctrl_c_saves_and_ends_the_sweep(tmp_path: Path) -> None:
    line = command(tmp_path, "seed=range(3)", "train.steps=100000")
    process = start(line, tmp_path)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "sweep").glob("*/checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 130, text
    assert "saved; go on with: ftcore resume" in text
    assert len(list((tmp_path / "sweep").glob("*/config.yaml"))) == 1


def test_a_changed_plugin_is_noticed(tmp_path: Path) -> None:
    """A finished or begun run of another source is not taken for this one's."""
    source = "import ftcore\n\n@ftcore.plugin()\nclass Plugin:\n    '''Does nothing.'''\n"
    site = tmp_path / "site"
    make_plugin(site, "idle", source)
    line, env = command(tmp_path, "+plugin=idle", "seed=0,1"), {"PYTHONPATH": str(site)}
    assert run(line, tmp_path, env).returncode == 0
    (site / "ftcore_idle" / "__init__.py").write_text(source + "    rate: float = 0.5\n")
    changed = run(line, tmp_path, env)
    assert changed.returncode == 1
    assert changed.stdout.count("another source of plugin 'idle', which has changed since") == 2
    assert run([*line, "force=true"], tmp_path, env).returncode == 0
    assert run(line, tmp_path, env).returncode == 0


def test_arms_choose_plugins_and_options_together(tmp_path: Path) -> None:
    folder = tmp_path / "conf" / "arm"
    folder.mkdir(parents=True)
    (folder / "slow.yaml").write_text("# @package _global_\noptim:\n  lr: 1e-5\n")
    make_plugin(
        tmp_path / "site",
        "idle",
        "import ftcore\n\n@ftcore.plugin()\nclass Plugin:\n    '''No.'''\n    x: int = 1\n",
        "x: 1",
    )
    (folder / "idle_2.yaml").write_text(
        "# @package _global_\ndefaults:\n  - /plugin: [idle]\nplugin:\n  idle:\n    x: 2\n"
    )
    line = command(tmp_path, "+arm=base,slow,idle_2", "--config-dir", str(tmp_path / "conf"))
    ended = run(line, tmp_path, {"PYTHONPATH": str(tmp_path / "site")})
    assert ended.returncode == 0, ended.stderr
    read = {f.parent.name: json.loads(f.read_text()) for f in (tmp_path / "sweep").glob("*/run.json")}
    options = {name.partition("__")[0]: run["plugins"] for name, run in read.items()}
    assert {arm: [p["options"] for p in plugins] for arm, plugins in options.items()} == {
        "arm-base": [],
        "arm-slow": [],
        "arm-idle_2": [{"x": 2}],
    }
    rates = {
        f.parent.name.partition("__")[0]: records(f.parent)[0]["lr"]
        for f in (tmp_path / "sweep").glob("*/run.json")
    }
    assert rates["arm-slow"] == pytest.approx(1e-5)
    assert rates["arm-base"] == rates["arm-idle_2"] == pytest.approx(1e-3)


def test_launchers_agree(tmp_path: Path) -> None:
    """The basic launcher, joblib's and submitit's (two tasks a job) give the same directories and results."""
    line = command(tmp_path, "seed=0,1")
    local = [a for a in line if not a.startswith("hydra.sweep")]
    joblib = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=joblib"]
    submitit = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5", "hydra.sweep.dir=submitit"]
    runs([line, [*local, *joblib], [*local, *submitit]], tmp_path)
    names = sorted(results(tmp_path))
    assert len(names) == 2
    for other in ("joblib", "submitit"):
        found = sorted(f.parent.name for f in (tmp_path / other).glob("*/result.json"))
        assert found == names
        for name in names:
            assert weights(tmp_path / other / name) == weights(tmp_path / "sweep" / name)


def test_preempted_by_submitit_with_two_tasks(tmp_path: Path) -> None:
    """Both ranks save, the job is put back into the queue, resumes, and ends bit for bit the same."""
    line = command(tmp_path, "trainer=ddp", "train.steps=60", "seed=3")
    local = [a for a in line if not a.startswith("hydra.sweep")]
    submitit = [
        "hydra/launcher=submitit_local",
        "hydra.launcher.tasks_per_node=2",
        "hydra.launcher.timeout_min=5",
    ]
    process = start([*local, *submitit, "hydra.sweep.dir=preempted"], tmp_path)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "preempted").glob("*/checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    tasks = [p for p in tasks_of(tmp_path / "preempted") if is_alive(p)]
    assert len(tasks) == 2
    for pid in tasks:
        os.kill(pid, signal.SIGUSR2)
    text = process.communicate(timeout=200)[0]
    assert process.returncode == 0, text
    (job,) = (tmp_path / "preempted").glob("*/result.json")
    logs = "".join(f.read_text() for f in (tmp_path / "preempted" / ".submitit").rglob("*.out"))
    assert "resuming at step" in logs
    assert [r["step"] for r in steps(job.parent)] == list(range(1, 61))
    whole = run([*local, "trainer.devices=2", "hydra.sweep.dir=whole"], tmp_path)
    assert whole.returncode == 0, whole.stderr
    (reference,) = (tmp_path / "whole").glob("*/result.json")
    assert weights(job.parent) == weights(reference.parent)


def tasks_of(sweep: Path) -> list[int]:
    """Processes that submitit runs as tasks for this sweep."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = environment.read_bytes()
            command = (environment.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if b"SUBMITIT_LOCAL_GLOBALID=" in variables and str(sweep).encode() in command:
            found.append(int(environment.parent.name))
    return found
