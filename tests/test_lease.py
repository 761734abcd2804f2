"""A directory has one holder; what a dead or silent holder left is taken over, once."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ftcore import lease as module
from ftcore.errors import InUse
from ftcore.lease import lease, touched

CONTEND = """
import sys, time
from pathlib import Path
from ftcore.errors import InUse
from ftcore.lease import lease
directory, number = Path(sys.argv[1]), sys.argv[2]
while not (directory / "go").exists():
    pass
try:
    with lease(directory):
        (directory / f"held-{number}").touch()
        time.sleep(1.0)
except InUse:
    pass
"""


def left_behind(directory: Path, *, pid: int = 1, host: str = "elsewhere", age: float = 0.0) -> Path:
    """A lease of another process, last touched `age` seconds ago."""
    path = directory / ".lease-1"
    path.write_text(json.dumps({"host": host, "pid": pid}))
    os.utime(path, (time.time() - age,) * 2)
    return path


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_is_exclusive_and_given_back(tmp_path: Path) -> None:
    assert touched(tmp_path) is None
    with lease(tmp_path):
        age = touched(tmp_path)
        assert age is not None
        assert age < 5
        with pytest.raises(InUse, match=f"in use by another run .process {os.getpid()} on "), lease(tmp_path):
            pass
    assert not list(tmp_path.glob(".*"))
    with lease(tmp_path):
        pass


def test_one_that_lives_elsewhere_is_respected(tmp_path: Path) -> None:
    left_behind(tmp_path, age=60)
    with pytest.raises(InUse, match="process 1 on elsewhere"), lease(tmp_path):
        pass


def test_a_silent_one_is_followed(tmp_path: Path) -> None:
    left_behind(tmp_path, age=module.STALE_SECONDS + 5)
    assert touched(tmp_path) is None
    with lease(tmp_path):
        assert [p.name for p in module._leases(tmp_path)] == [".lease-1", ".lease-2"]
    assert not list(tmp_path.glob(".*"))


def test_a_dead_one_of_this_machine_is_followed_at_once(tmp_path: Path) -> None:
    left_behind(tmp_path, pid=ended_process(), host=module._host())
    with lease(tmp_path):
        pass


def test_half_written_counts_as_held(tmp_path: Path) -> None:
    (tmp_path / ".lease-1").touch()
    with pytest.raises(InUse, match="just started"), lease(tmp_path):
        pass


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_at_once_one_gets_it(tmp_path: Path, stale: bool) -> None:
    """Eight processes start together, also where each finds the same stale lease."""
    if stale:
        left_behind(tmp_path, age=1000)
    command = [sys.executable, "-c", CONTEND, str(tmp_path)]
    processes = [subprocess.Popen([*command, str(i)]) for i in range(8)]
    time.sleep(1.0)
    (tmp_path / "go").touch()
    assert [p.wait() for p in processes] == [0] * 8
    assert len(list(tmp_path.glob("held-*"))) == 1


def test_one_that_was_followed_ends_at_once(tmp_path: Path) -> None:
    """A suspended holder wakes up and finds a later lease: it must not write another byte."""
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom ftcore import lease\n"
        "lease.BEAT_SECONDS = 0.05\n"
        "with lease.lease(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    (tmp_path / ".lease-2").touch()
    assert "was taken over by another process" in holder.communicate(timeout=30)[1]
    assert holder.returncode == 1
    assert (tmp_path / ".lease-2").exists()
