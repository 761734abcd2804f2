"""`--plugin-file`: a technique in a single file, with no package around it."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from ftcore.cli import main
from ftcore.plugins import FILES, enable, file_plugins

from .cli import result, run, run_each, steps

SOURCE = '''
import ftcore
from ftcore import LossTerm, hookimpl, plugin


@plugin(api=1)
class LogitPenalty:
    """Penalise large logits."""

    weight: float = 0.25

    @hookimpl(wrapper=True)
    def compute_loss(self, outputs):
        terms = yield
        total = outputs.logits.float().square().sum()
        terms["logit_penalty"] = LossTerm(sum=total, unit="examples", weight=self.weight)
        return terms


@ftcore.plugin()
class Quiet:
    """Does nothing."""


class Helper:
    """No plugin."""
'''
RUN = ["model=tiny_bert", "train.steps=2", "train.log_every=1", "data.limit.train=32"]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file, named as the command line does."""
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    monkeypatch.setenv(FILES, str(path))
    return path


def test_a_class_is_a_plugin_under_its_name_in_lower_case(file: Path) -> None:
    """Each decorated class, found without running the file; its hash is the version."""
    assert [(p.name, p.cls) for p in file_plugins()] == [
        ("logit_penalty", "LogitPenalty"),
        ("quiet", "Quiet"),
    ]
    (one,) = enable({"logit_penalty": {"weight": 1}})
    assert (one.distribution, one.options) == (str(file), {"weight": 1.0})
    assert re.fullmatch(r"sha256:[0-9a-f]{16}", one.version)


def test_a_changed_file_is_another_class(file: Path) -> None:
    """One process that runs the file again after an edit gets what it says now."""
    (before,) = enable({"logit_penalty": {}})
    file.write_text(SOURCE.replace("0.25", "0.5"))
    (after,) = enable({"logit_penalty": {}})
    assert (before.instance.weight, after.instance.weight) == (0.25, 0.5)
    assert before.version != after.version


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.py", "class Mine: ...\n", r"none\.py has no class under @ftcore\.plugin"),
        ("odd.py", "class Mine(:\n", r"odd\.py is no Python: .*line 1"),
        ("mine.txt", SOURCE, r"mine\.txt is no Python file"),
        (
            "raises.py",
            SOURCE + "\nimport no_such_module\n",
            r"'logit_penalty' .*raises\.py.* does not import: .*no_such",
        ),
    ],
)
def test_a_file_that_is_no_plugin_is_refused(
    tmp_path: Path, capsys: Any, name: str, text: str, message: str
) -> None:
    """Exit 2 and one line; the environment is as before."""
    (tmp_path / name).write_text(text)
    assert main(["--plugin-file", str(tmp_path / name), "plan", "model=tiny_bert", "+plugin=quiet"]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"ftcore: error: [^\n]+\n", error), error
    assert re.search(message, error), error
    assert FILES not in os.environ


def test_it_trains_on_ranks_and_is_recorded(tmp_path: Path) -> None:
    """Two ranks get the file; run.json says which it was; without the file, or with another, no resume."""
    (tmp_path / "mine.py").write_text(SOURCE)
    chosen = ["+plugin=logit_penalty", "plugin.logit_penalty.weight=0.5", *RUN]
    two = ["trainer=ddp", "trainer.devices=2", "hydra.run.dir=two"]
    ended = run(["--plugin-file", "mine.py", *chosen, *two], tmp_path)
    assert ended.returncode == 0, ended.stderr
    for record in steps(tmp_path / "two"):
        assert record["loss"] == pytest.approx(
            record["loss/task"] + 0.5 * record["loss/logit_penalty"], rel=1e-6
        )
    (described,) = json.loads((tmp_path / "two" / "run.json").read_text())["plugins"]
    assert described["distribution"] == str(tmp_path / "mine.py")
    assert described["version"].startswith("sha256:")
    assert result(tmp_path / "two")["plugins"] == {"logit_penalty": described["version"]}
    (tmp_path / "two" / "result.json").unlink()  # as if it were unfinished
    (tmp_path / "two" / "checkpoints").mkdir(exist_ok=True)
    (tmp_path / "mine2.py").write_text(SOURCE.replace("square", "abs"))
    without, other, unknown = run_each(
        [
            ["resume", "two"],
            ["--plugin-file", "mine2.py", "resume", "two"],
            ["--plugin-file=mine.py", "+plugin=logit_penalty", "plugin.logit_penalty.wight=1"],
        ],
        tmp_path,
    )
    assert (without.returncode, other.returncode, unknown.returncode) == (2, 2, 2)
    assert re.search(r"no plugin 'logit_penalty' is installed.*--plugin-file FILE", without.stderr)
    changed = r"two holds a run with another source of plugin 'logit_penalty'.*force=true"
    assert re.search(changed, other.stderr)
    assert re.search(r"no option 'wight'; did you mean 'weight'", unknown.stderr)
