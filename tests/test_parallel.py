"""Forked workers give what one process gives, in order, and leave nobody behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from ftcore import UserError
from ftcore.parallel import fork_map

from .cli import is_alive

PARENT = """
import os, time
from ftcore.parallel import fork_map

def slow(item):
    time.sleep(0.05)
    return os.getpid()

for pid in fork_map(slow, range(10_000), 3):
    print(pid, flush=True)
"""


def square(item: np.ndarray) -> np.ndarray:
    """Refuses 3; the rest is more than a pipe holds at once."""
    if item[0] == 3:
        raise UserError("three")
    if item[0] == 5:
        raise KeyError("five")
    return item**2


@pytest.mark.parametrize("processes", [1, 2, 3, 20])
@pytest.mark.parametrize("count", [0, 1, 8])
def test_results_come_in_order_and_errors_in_their_place(processes: int, count: int) -> None:
    """Items and results of a megabyte each."""
    found = list(fork_map(square, (np.full(125_000, i) for i in range(count)), processes))
    assert len(found) == count
    for i, one in enumerate(found):
        if i in (3, 5):
            assert isinstance(one, UserError) == (i == 3)
            assert str(one).strip("'") == ("three" if i == 3 else "five")
        else:
            np.testing.assert_array_equal(one, np.full(125_000, i * i))
    assert not multiprocessing.active_children()


def test_one_that_stops_listening_leaves_no_process() -> None:
    """As where a row is refused, and the run ends."""
    results = fork_map(square, (np.full(9, i) for i in range(1000)), 2)
    next(results)
    assert len(multiprocessing.active_children()) == 2
    results.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()


def test_a_worker_that_is_killed_is_said() -> None:
    """As the system does where memory runs out."""
    with pytest.raises(UserError, match=r"was ended \(out of memory\?\); set data\.workers lower"):
        list(fork_map(lambda item: os.kill(os.getpid(), signal.SIGKILL), range(4), 2))
    found = list(fork_map(lambda item: lambda: item, range(1), 2))  # what can't be sent
    assert "set data.workers=1" in str(found[0])


def test_workers_leave_when_their_parent_is_killed() -> None:
    """None is left to wait for ever."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        workers = {int(parent.stdout.readline()) for _ in range(3)}
        parent.kill()
        assert parent.communicate()[1] == ""
    deadline = time.monotonic() + 20
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(workers) == 3
    assert not any(map(is_alive, workers))
