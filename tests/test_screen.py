"""What a person sees: on a terminal (a pseudo-terminal here), and where the output goes elsewhere."""

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pexpect
import pytest

from ftcore import plugin
from ftcore.run import _header
from ftcore.screen import Screen

from .cli import environment, make_data, make_plugin

SLOW = """
import time
from ftcore import hookimpl, plugin

@plugin()
class Plugin:
    @hookimpl
    def on_step_start(self, step):
        print("SLOW", flush=True)
        time.sleep(100)
"""
RECORD = {"step": 3, "loss": 1.5, "loss/task": 1.5, "grad_norm": 0.25, "lr": 1e-3}
RECORD |= {"tokens_per_second": 1000.0, "memory_mb": 512.0}


def terminal(tmp: Path, *arguments: str, **env: str) -> Any:
    """A run on a terminal of 100 columns."""
    inherited = environment(tmp, TERM="xterm", **env)
    del inherited["COLUMNS"]
    command = ["-m", "ftcore", *arguments]
    return pexpect.spawn(
        sys.executable,
        command,
        cwd=str(tmp),
        env=inherited,
        dimensions=(40, 100),
        timeout=200,
        encoding="utf-8",
    )


def plain(text: str) -> str:
    """Without colours and cursor movements; a live line's states follow one another."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")


def test_a_terminal_shows_a_header_one_live_line_and_evaluations(tmp_path: Path) -> None:
    """Header of at most eight lines; the live line has everything; Ctrl-C saves and says how to go on."""
    line = [
        *make_data(tmp_path, "classify"),
        "train.batch_size=8",
        "train.epochs=100000",
        "hydra.run.dir=run",
    ]
    run = terminal(tmp_path, *line, "train.log_every=1")
    run.expect(r"step +6 .*accuracy")
    header = [x for x in plain(run.before).split("\nrun ")[0].splitlines() if x.strip()]
    assert [x.split()[0] for x in header] == ["model", "data", "batch", "disk"]
    assert "8 = 8 micro x 1 accumulation x 1 rank(s)" in header[2]
    run.expect(r"step +12 .*accuracy")
    live = plain(run.before)
    assert re.search(r"\d+/600000 +loss \d\.\d{4}  grad \S+  lr \S+  \d+ tok/s  \d\.\d GB +\d+:\d+", live), (
        live
    )
    run.sendintr()
    run.expect("stopping after this step, then saving")
    run.expect(r"go on with: ftcore resume (\S+)")
    assert run.match[1] == str(tmp_path / "run")
    run.expect(pexpect.EOF)
    run.close()
    assert run.exitstatus == 130
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("trainer", [(), ("trainer=ddp", "trainer.devices=2")])
def test_a_second_interrupt_stops_at_once(tmp_path: Path, trainer: tuple[str, ...]) -> None:
    """Within a step that takes minutes, on one process and with ranks of its own."""
    make_plugin(tmp_path / "site", "slow", SLOW)
    line = [*make_data(tmp_path, "classify"), "+plugin=slow", *trainer]
    run = terminal(tmp_path, *line, PYTHONPATH=str(tmp_path / "site"))
    run.expect("SLOW")
    time.sleep(0.5)
    run.sendintr()
    run.expect("Ctrl-C again stops at once")
    before = time.monotonic()
    run.sendintr()
    run.expect("ftcore: stopped at once")
    run.expect(pexpect.EOF)
    run.close()
    assert run.exitstatus == 130
    assert time.monotonic() - before < 60
    assert "Traceback" not in plain(run.before)


@pytest.mark.parametrize("trainer", [(), ("trainer=ddp", "trainer.devices=2")])
def test_a_reader_that_leaves_stops_the_run_quietly(tmp_path: Path, trainer: tuple[str, ...]) -> None:
    """`ftcore ... | head -2`: saved, one line on stderr, no traceback."""
    line = [*make_data(tmp_path, "classify"), "train.epochs=100000", "hydra.run.dir=run", *trainer]
    with subprocess.Popen(
        [sys.executable, "-m", "ftcore", *line],
        cwd=tmp_path,
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        assert run.stdout.readline().startswith("model")
        run.stdout.close()
        said = run.stderr.read()
    assert run.returncode == 141
    assert re.fullmatch(r"ftcore: stopped at step \d+, saved; go on with: ftcore resume \S+\n", said)


def test_elsewhere_a_line_comes_every_half_minute(capsys: pytest.CaptureFixture[str]) -> None:
    """The first step at once, then nothing until 30 seconds have passed; evaluations always."""
    screen = Screen(shown=True)
    screen.start(0, 9)
    screen.step({**RECORD, "step": 1})
    screen.step({**RECORD, "step": 2})
    screen.evaluation(2, {"eval/accuracy": 0.5, "eval/group/a/accuracy": 1.0}, is_best=True)
    screen._last_line -= 31
    screen.step(RECORD)
    screen.tick("validation 1/2")
    out = capsys.readouterr().out.splitlines()
    assert [line[:8] for line in out] == ["step 1/9", "step    ", "step 3/9"]
    assert out[1] == "step      2  accuracy 0.5000  (best)"
    assert re.search(
        r"loss 1\.5000  grad 0\.25  lr 1\.00e-03  1000 tok/s  0\.5 GB  about \d+ s left$", out[2]
    )


def test_other_ranks_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is asked of them."""
    screen = Screen(shown=False)
    screen.header([("model", "x")])
    screen.start(0, 9)
    screen.step(RECORD)
    screen.result({"metrics": {"eval/a": 1.0}, "steps": 1, "examples": 1, "seconds": 1.0}, "run")
    assert capsys.readouterr().out == ""


def test_more_plugins_than_fit_share_a_line(open_tiny: Any) -> None:
    """Five plugins, and still eight lines of header; what a plugin did to the model stands there."""

    def made(number: int) -> Any:
        class Plugin:
            def describe(self) -> dict[str, Any]:
                return {"matrices": [1, 2], "share": 0.5, "number": number}

        Plugin.__name__ = f"P{number}"
        return plugin()(Plugin)()

    job = open_tiny({}, *(made(i) for i in range(5)))
    header = _header(job)
    assert [name for name, _ in header] == ["model", "data", "p0", "p1", "...", "batch", "disk", "run"]
    assert header[2][1] == "0: 2 matrices, share 0.5, number 0"
    assert "p4 0: 2 matrices, share 0.5, number 4" in header[4][1]
