"""The tutorial, from nothing to a package that passes its tests: its files and commands, in order."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from . import cli

PAGE = Path(__file__).resolve().parents[1] / "docs" / "tutorial.md"
INSTALL = ["pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index", "--target", "site"]


def run(line: str, folder: Path) -> str:
    """A command of the page; `# exit code N` is what it ends with, if not 0. Returns what it printed."""
    command, _, expected = line.partition("  # exit code ")
    program, *arguments = shlex.split(command)
    site = {"PYTHONPATH": str(folder / "site")}
    if program == "ftcore":
        ended = cli.run(arguments, folder, site)
    else:
        if program == "pip":  # not into the environment of these tests
            program, arguments = INSTALL[0], [*INSTALL[1:], arguments[-1]]
        ended = subprocess.run(
            [sys.executable, "-m", program, *arguments],
            cwd=folder,
            env=cli.environment(folder, **site),
            capture_output=True,
            text=True,
            timeout=400,
        )
    assert ended.returncode == int(expected or 0), f"{line}\n{ended.stdout[-3000:]}\n{ended.stderr[-3000:]}"
    return ended.stdout


def test_the_tutorial_works_as_written(tmp_path: Path) -> None:
    """Each titled block is a file, each `$` line a command; what check is said to find, it finds."""
    said = {}
    for block in re.finditer(r'^```(\w+)(?: title="(.+?)")?\n(.*?)^```$', PAGE.read_text(), re.M | re.S):
        kind, title, text = block.groups()
        if title:
            (tmp_path / title).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / title).write_text(text)
        for line in text.splitlines() if kind == "console" else ():
            said[line] = run(line.removeprefix("$ "), tmp_path)
    assert len(said) == 7
    checks = [text for line, text in said.items() if " check " in line]
    assert "'task' is 3 times as large in 3 micro-batches: its sum is a mean" in checks[0]
    assert [sum(line.startswith("ok ") for line in text.splitlines()) for text in checks] == [3, 5]
