"""The package as it is published: built, installed in another environment, run outside the repository."""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from .cli import environment, result, run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution as an index would have it."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    ended = subprocess.run(command, cwd=out, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment: the wheel, and what it needs borrowed from this one."""
    home = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(home, symlinks=True)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
    # A line of a .pth file comes after the environment's own packages, and runs no other .pth file:
    # the editable ftcore of this environment stays out of sight.
    (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = ["-m", "pip", "--python", str(home / "bin" / "python"), "install", "--no-deps", "--no-index"]
    ended = subprocess.run([sys.executable, *install, str(wheel)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return home / "bin" / "python"


def test_the_wheel_has_config_and_data(wheel: Path) -> None:
    """Every file of `conf/` and of the demo's data is in it, and no test is."""
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"ftcore/conf/{f.relative_to(ROOT / 'conf')}" for f in (ROOT / "conf").rglob("*.yaml")}
    wanted |= {f"ftcore/demo_data/{split}.jsonl" for split in ("train", "validation", "test")}
    wanted |= {f"ftcore/{f.relative_to(ROOT / 'core/ftcore')}" for f in (ROOT / "core/ftcore").rglob("*.py")}
    wanted |= {f"ftcore/templates/{f.name}" for f in (ROOT / "core/ftcore/templates").iterdir()}
    assert len(wanted) > 40
    assert wanted <= names
    assert "ftcore/py.typed" in names, "type checkers take no notice of the annotations"
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"ftcore"}


def test_the_demo_runs_from_the_wheel(python: Path, tmp_path: Path) -> None:
    """Away from the repository: the embedded data, a tiny model, three steps, by `python -m ftcore`."""
    where = [str(python), "-c", "import ftcore; print(ftcore.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True)
    assert Path(found.stdout.strip()).is_relative_to(python.parents[1]), found.stdout + found.stderr
    ended = run(["model=tiny_bert", "train.steps=3", "hydra.run.dir=run"], tmp_path, python=str(python))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert result(tmp_path / "run")["steps"] == 3
    assert "test/accuracy" in result(tmp_path / "run")["metrics"]


def test_the_command_is_installed(python: Path, tmp_path: Path) -> None:
    """`ftcore` itself is there, finds its config groups, and its commands each once."""
    command = [python.with_name("ftcore"), "--help"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    for word in ("tiny_bert", "causal_lm", "ddp", "resume"):
        assert word in ended.stdout
    listed = next(line for line in ended.stdout.splitlines() if "resume" in line and "plan" in line)
    assert listed.count("resume") == 1
