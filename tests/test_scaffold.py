"""`ftcore new-plugin`: every kind is a package that works as it stands."""

import ast
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from ftcore.cli import main
from ftcore.scaffold import KINDS, files
from ftcore.testing import Conformance


def install(name: str, kind: str, site: Path) -> None:
    """Put the package on a path as pip would."""
    info = site / f"ftcore_{name}-0.1.0.dist-info"
    for path, text in files(name, kind).items():
        if path.startswith("src/"):
            (site / path[4:]).parent.mkdir(parents=True, exist_ok=True)
            (site / path[4:]).write_text(text)
    project = tomllib.loads(files(name, kind)["pyproject.toml"])["project"]
    ((point, value),) = project["entry-points"]["ftcore.plugins"].items()
    info.mkdir()
    needs = "".join(f"Requires-Dist: {line}\n" for line in project["dependencies"])
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n{needs}")
    (info / "entry_points.txt").write_text(f"[ftcore.plugins]\n{point} = {value}\n")


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_conforms(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its options, its YAML, its hooks, and its gradient however a step is split."""
    install(name := f"made_{kind}", kind, tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    suite: Any = type("Suite", (Conformance,), {"name": name})()
    suite.test_yaml_is_the_defaults()
    suite.test_bad_options_are_refused()
    suite.test_hooks_match(suite.config())
    suite.test_one_gradient_however_it_is_split(suite.config(), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_its_test_subclasses_the_suite(kind: str) -> None:
    """In as few lines as it takes; the class of the plugin is about 20."""
    made = files("label_noise", kind)
    assert "class TestLabelNoise(Conformance):" in made["tests/test_conformance.py"]
    source = made["src/ftcore_label_noise/__init__.py"]
    (cls,) = (n for n in ast.parse(source).body if isinstance(n, ast.ClassDef))
    assert cls.name == "LabelNoise"
    assert (cls.end_lineno or 0) - cls.lineno < 30
    assert {"LICENSE", "README.md", ".github/workflows/test.yml", "pyproject.toml"} <= set(made)
    assert not re.search(r"\$\{?[a-z]", "".join(made.values())), "a word of the template was left"


def test_it_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A directory that is there is left alone."""
    monkeypatch.chdir(tmp_path)
    assert main(["new-plugin", "label_noise", "--kind", "regularizer"]) == 0
    assert "pip install -e ./ftcore-label-noise" in capsys.readouterr().out
    assert (tmp_path / "ftcore-label-noise/src/ftcore_label_noise/conf/plugin/label_noise.yaml").is_file()
    assert main(["new-plugin", "label_noise"]) == 2
    assert "ftcore-label-noise exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Focal"], "got 'Focal'"),
        (["../focal"], "got '../focal'"),
        (["class"], "got 'class'"),
        (["core"], "'core' is ftcore's own name"),
        (["mixout"], r"'mixout' is installed already \(ftcore-mixout\)"),
        (["focal", "--kind", "optimizer"], "invalid choice: 'optimizer'"),
        ([], "required: name"),
    ],
)
def test_a_name_or_kind_that_can_not_be_is_refused(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """One line, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    assert main(["new-plugin", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"ftcore: error: [^\n]+\n", error), error
    assert re.search(message, error), error
    assert list(tmp_path.iterdir()) == []
