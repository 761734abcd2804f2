"""What the tests share: runs on real ranks (gloo, CPU), many to a start."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.cli import rendezvous

from . import cases


@pytest.fixture(scope="session", autouse=True)
def _on_cpu() -> Iterator[None]:
    """One thread for each process; DeepSpeed does not look for an accelerator."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("DS_ACCELERATOR", "cpu")
        yield


@pytest.fixture(scope="session")
def run_ranks() -> Callable[[Path, int, Mapping[str, Any]], None]:
    """`run_ranks(folder, world_size, cases)`: every case on that many ranks, which have to end well."""

    def run(folder: Path, world_size: int, chosen: Mapping[str, Any]) -> None:
        cases.write(folder, chosen)
        with rendezvous(world_size) as places:
            for place in places:
                place.pop("LOCAL_RANK")  # as under srun
            command = [sys.executable, cases.__file__ or "", str(folder), json.dumps(places)]
            subprocess.run(command, env=os.environ, check=True, timeout=1500)

    return run
