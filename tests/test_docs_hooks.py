"""The reference of the hooks: made from the specifications, every hook with an example that runs."""

import json
import os
import runpy
from pathlib import Path
from typing import Any

import pytest

from ftcore import hookspecs
from ftcore.plugins import FILES, file_plugins

from .cli import result, run

DOCS = Path(__file__).resolve().parents[1] / "docs"
EXAMPLES = DOCS / "examples"


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Plugin name by hook, of every example."""
    paths = [EXAMPLES / f"{name}.py" for name in hookspecs.names()]
    monkeypatch.setenv(FILES, os.pathsep.join(map(str, paths)))
    return {plugin.path.stem: plugin.name for plugin in file_plugins()}


def test_every_hook_has_an_example_and_every_example_a_hook() -> None:
    """A hook without one is named here."""
    assert sorted(hookspecs.names()) == sorted(path.stem for path in EXAMPLES.glob("*.py"))


def test_the_page_is_up_to_date() -> None:
    """`make docs` makes it; what is committed is what it makes now."""
    made: Any = runpy.run_path(str(DOCS / "_hooks.py"))["page"]()
    assert (DOCS / "hooks.md").read_text() == made, "docs/hooks.md is out of date: python docs/_hooks.py"


def test_every_example_runs(plugins: dict[str, str], tmp_path: Path) -> None:
    """All at once, in one run: each one's hook is called, and what they say they do is there."""
    files = [f"--plugin-file={EXAMPLES / hook}.py" for hook in plugins]
    chosen = f"+plugin=[{','.join(plugins.values())}]"
    settings = [
        "model=tiny_bert",
        "train.steps=3",
        "train.log_every=1",
        "train.eval_every=2",
        "hydra.run.dir=run",
    ]
    ended = run([*files, chosen, *settings], tmp_path)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr
    cost = result(tmp_path / "run")["plugin_cost"]
    not_in = [hook for hook, name in plugins.items() if hook not in cost[name]["seconds"]]
    # Of other commands, before ranks start, and after the result.
    assert not_in == ["load_file", "format_examples", "on_train_end"]
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    assert described["data"]["splits"]["train"]["longest"] > len("Which is it? number 47")
    assert {"eval/confidence", "eval/accuracy"} <= set(result(tmp_path / "run")["metrics"])
    assert {"alive", "done.txt", "parameters.txt"} <= {path.name for path in (tmp_path / "run").iterdir()}
    for shown in ('"loss/z_loss"', '"loss/lasso"', '"loss/long_rows"', '"longest"', '"local_grad_norm"'):
        assert shown in ended.stdout, shown
