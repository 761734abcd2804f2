"""A plugin that someone else has published: installed as a package, chosen, configured, saved, resumed."""

import json
import re
import signal
import subprocess
from pathlib import Path

import pytest

from .cli import make_data, make_plugin, result, run, run_each, start, steps, wait_for_step

PENALTY = '''
from ftcore import LossTerm, hookimpl, plugin


@plugin(after=("counter",))
class Plugin:
    """Penalise large logits."""

    weight: float = 0.25

    def __post_init__(self):
        if self.weight < 0:
            raise ValueError(f"weight must be at least 0, got {self.weight}")

    @hookimpl(wrapper=True)
    def compute_loss(self, batch, outputs):
        terms = yield
        square = outputs.logits.float().square().sum()
        terms["penalty"] = LossTerm(sum=square, unit="examples", weight=self.weight)
        return terms
'''
COUNTER = '''
import torch
from ftcore import hookimpl, plugin


@plugin()
class Plugin:
    """Count the steps; what it counts has to outlive a restart."""

    def __post_init__(self):
        self.count, self.seen = 0, torch.zeros(2)

    @hookimpl
    def on_step_start(self, step):
        step.log("counter", self.count)
        step.log("counter_seen", self.seen.sum())

    @hookimpl
    def on_step_end(self):
        self.count += 1
        self.seen += 1

    def state_dict(self):
        return {"count": self.count, "seen": self.seen}

    def load_state_dict(self, state):
        self.count, self.seen = state["count"], state["seen"]
'''
REPLACEMENT = '''
from ftcore import hookimpl, plugin


@plugin(conflicts=("counter",))
class Plugin:
    """Another optimiser."""

    @hookimpl
    def build_optimizer(self, params):
        import torch

        return torch.optim.SGD(params, lr=0.1)
'''
COMMON = ["train.batch_size=16", "train.steps=3", "train.log_every=1", "seed=1"]
EXPERIMENT = """\
# @package _global_
defaults:
  - /plugin: [penalty]
plugin:
  penalty:
    weight: 0.125
"""


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which five plugins are installed."""
    site = tmp_path_factory.mktemp("site")
    make_plugin(site, "penalty", PENALTY, "weight: 0.25", requires="ftcore<0.2,>=0.1")
    make_plugin(site, "counter", COUNTER)
    make_plugin(site, "sgd", REPLACEMENT)
    make_plugin(site, "other_sgd", REPLACEMENT)
    make_plugin(site, "future", PENALTY, "weight: 0.25", requires="ftcore>=9")
    return {"PYTHONPATH": str(site)}


@pytest.fixture(scope="module")
def sweep(env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every combination of two plugins, and one of them on two ranks."""
    tmp = tmp_path_factory.mktemp("sweep")
    arms = "+plugin=[],penalty,counter,[penalty,counter]"
    line = ["-m", *make_data(tmp, "classify"), *COMMON, "model.dropout=0", arms]
    ended = run([*line, "hydra.sweep.dir=arms", "hydra.sweep.subdir=${hydra.job.num}"], tmp, env)
    assert ended.returncode == 0, ended.stderr
    two = [*line[1:-1], "trainer=ddp", "trainer.device=cpu", "train.micro_batch_size=4", "+plugin=penalty"]
    ended = run([*two, "hydra.run.dir=arms/ddp"], tmp, env, ranks=2)
    assert ended.returncode == 0, ended.stderr
    return tmp / "arms"


def test_a_plugin_adds_a_term_to_the_loss(sweep: Path) -> None:
    """`loss/penalty` is logged unweighted; `loss` has it times its weight; without the plugin, neither."""
    for record in steps(sweep / "1"):
        assert record["loss/penalty"] > 0
        assert record["loss"] == pytest.approx(record["loss/task"] + 0.25 * record["loss/penalty"], rel=1e-6)
    for record in steps(sweep / "0"):
        assert "loss/penalty" not in record
        assert record["loss"] == record["loss/task"]
    first, plain = steps(sweep / "1")[0], steps(sweep / "0")[0]
    assert first["loss/task"] == plain["loss/task"]
    assert first["grad_norm"] != plain["grad_norm"]


def test_a_plugins_term_is_scaled_by_core(sweep: Path) -> None:
    """Two ranks with micro-batches of 4 give the gradients of one rank with 16."""
    for key in ("loss", "loss/task", "loss/penalty", "grad_norm"):
        one, two = ([r[key] for r in steps(sweep / name)] for name in ("1", "ddp"))
        assert two == pytest.approx(one, rel=1e-5)


def test_runs_say_which_plugins_in_which_order(sweep: Path) -> None:
    """`after` puts penalty behind counter, whatever the order of selection; versions are written down."""
    orders = [result(sweep / name)["order"] for name in ("0", "1", "2", "3", "ddp")]
    assert orders == [[], ["penalty"], ["counter"], ["counter", "penalty"], ["penalty"]]
    assert result(sweep / "3")["plugins"] == {"counter": "1.2", "penalty": "1.2"}
    described = json.loads((sweep / "3" / "run.json").read_text())["plugins"]
    sources = [one.pop("source") for one in described]
    assert all(re.fullmatch("[0-9a-f]{16}", source) for source in sources)
    assert described == [
        {"name": "counter", "distribution": "ftcore-counter", "version": "1.2", "options": {}},
        {"name": "penalty", "distribution": "ftcore-penalty", "version": "1.2", "options": {"weight": 0.25}},
    ]


def test_each_job_of_a_sweep_has_plugins_of_its_own(sweep: Path) -> None:
    """A plugin's count starts at zero in every job, though one process runs them all."""
    for arm in ("2", "3"):
        assert [r["counter"] for r in steps(sweep / arm)] == [0, 1, 2]
    assert "counter" not in steps(sweep / "1")[0]


def test_an_experiment_chooses_and_configures(env: dict[str, str], tmp_path: Path) -> None:
    """A file of one's own chooses a plugin and sets an option; the command line adds one and wins."""
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "soft.yaml").write_text(EXPERIMENT)
    common = ["--config-dir", "mine", *make_data(tmp_path, "classify"), *COMMON, "experiment=soft"]
    ended = run([*common, "+plugin=counter", "hydra.run.dir=run"], tmp_path, env)
    assert ended.returncode == 0, ended.stderr
    record = steps(tmp_path / "run")[0]
    assert record["loss"] == pytest.approx(record["loss/task"] + 0.125 * record["loss/penalty"], rel=1e-6)
    assert result(tmp_path / "run")["order"] == ["counter", "penalty"]
    shown = run([*common, "plugin.penalty.weight=0.5", "--cfg", "job", "--package", "plugin"], tmp_path, env)
    assert "penalty:\n  weight: 0.5\n" in shown.stdout, shown.stdout + shown.stderr


def test_plan_shows_the_order_and_the_batch(env: dict[str, str], tmp_path: Path) -> None:
    """`ftcore plan` names the plugins in call order, who answers which hook, and the batch arithmetic."""
    line = ["model=tiny_bert", "+plugin=[penalty,counter]", "plugin.penalty.weight=0.5"]
    line += ["train.micro_batch_size=4", "trainer=ddp", "trainer.devices=2"]
    made = run(["plan", "--json", *line], tmp_path, env)
    assert made.returncode == 0, made.stderr
    plan = json.loads(made.stdout)
    assert [(p["name"], p["options"]) for p in plan["plugins"]] == [
        ("counter", {}),
        ("penalty", {"weight": 0.5}),
    ]
    assert plan["hooks"]["compute_loss"] == [
        {"plugin": "penalty", "wrapper": True},
        {"plugin": "core", "wrapper": False},
    ]
    assert plan["batch"] == {"rows_per_step": 16, "micro_batch_size": 4, "ranks": 2, "accumulation": 2}
    text = run(["plan", *line], tmp_path, env).stdout
    assert re.search(r"compute_loss +\[penalty\] > core", text)
    assert text.index("counter 1.2") < text.index("penalty 1.2")
    assert "weight = 0.5  (command line)" in text
    assert plan["directory"].startswith(str(tmp_path / "runs" / "default"))
    assert not (tmp_path / "runs").exists()


def test_plan_of_a_sweep_says_what_is_left(tmp_path: Path) -> None:
    """Jobs by state with the time left; the same directories as the sweep itself; nothing is trained."""
    line = [*make_data(tmp_path, "classify"), "train.steps=2", "seed=0,1", "name=two"]
    before, _, after = (
        run(arguments, tmp_path)
        for arguments in (
            ["plan", "-m", *line],
            ["-m", *line[:-2], "seed=0", "name=two"],
            ["plan", "-m", "--json", *line],
        )
    )
    assert "2 jobs: 2 to do\ntime left: not known" in before.stdout, before.stderr
    report = json.loads(after.stdout)
    assert [job["state"] for job in report["jobs"]] == ["finished", "to do"]
    assert report["left"] == 1
    assert report["seconds_each"] > 0
    assert [Path(job["directory"]).exists() for job in report["jobs"]] == [True, False]


def test_plan_measures(tmp_path: Path) -> None:
    """Rows, tokens, steps and seconds; the directory stays as it was."""
    data = make_data(tmp_path, "classify")
    made = run(["plan", "--measure", "--json", *data, "train.epochs=3"], tmp_path)
    plan = json.loads(made.stdout)
    assert plan["steps"] == 3 * plan["steps_per_epoch"], made.stderr
    assert plan["seconds"] > plan["steps"] * plan["seconds_per_step"] > 0
    assert not (tmp_path / "runs").exists()


BAD = {
    "a value that the plugin refuses": (
        "+plugin=penalty plugin.penalty.weight=-1",
        r"plugin\.penalty: weight must be at least 0, got -1",
    ),
    "a plugin for a later ftcore": (
        "+plugin=future",
        r"'future' \(ftcore-future 1\.2\) needs ftcore>=9.*upgrade",
    ),
    "two that replace one hook": (
        "+plugin=[sgd,other_sgd]",
        r"'sgd' and 'other_sgd' both replace build_optimizer",
    ),
    "two in conflict": ("+plugin=[counter,sgd]", r"'sgd' and 'counter' can't be combined"),
}


@pytest.fixture(scope="module")
def refusals(
    env: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, subprocess.CompletedProcess[str]]:
    """The answer to each bad choice of plugins."""
    lines = [["model=tiny_bert", *line.split()] for line, _ in BAD.values()]
    return dict(zip(BAD, run_each(lines, tmp_path_factory.mktemp("bad"), env), strict=True))


@pytest.mark.parametrize("name", BAD)
def test_a_bad_choice_is_refused(refusals: dict[str, subprocess.CompletedProcess[str]], name: str) -> None:
    """Exit 2 and one line, before any weights are loaded."""
    assert refusals[name].returncode == 2
    assert re.fullmatch(r"ftcore: error: [^\n]+\n", refusals[name].stderr), refusals[name].stderr
    assert re.search(BAD[name][1], refusals[name].stderr), refusals[name].stderr


def test_a_plugins_state_is_saved_and_needed(env: dict[str, str], tmp_path: Path) -> None:
    """It counts on after a restart, numbers and tensors; without the plugin the run does not go on."""
    line = [*make_data(tmp_path, "classify"), "train.steps=150", "train.log_every=1", "train.save_every=10"]
    line += ["train.batch_size=8", "train.eval_every=100", "hydra.run.dir=run"]
    first = start([*line, "+plugin=counter"], tmp_path, env)
    wait_for_step(first, tmp_path / "run", 10)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)
    assert first.returncode == 75
    unchosen, uninstalled = run(line, tmp_path, env), run(["resume", "run"], tmp_path)
    assert (unchosen.returncode, uninstalled.returncode) == (2, 2)
    assert re.fullmatch(r"ftcore: error: .*plugin.*counter.*\n", unchosen.stderr)
    assert re.fullmatch(r"ftcore: error: no plugin 'counter' is installed.*\n", uninstalled.stderr)
    ended = run(["resume", "run"], tmp_path, env)
    assert ended.returncode == 0, ended.stderr
    assert int(re.findall(r"resuming at step (\d+)", ended.stdout)[0]) >= 10
    assert [r["counter"] for r in steps(tmp_path / "run")] == list(range(150))
    assert [r["counter_seen"] for r in steps(tmp_path / "run")] == [2 * i for i in range(150)]
