"""What the tests share: caches of their own, and runs on real ranks (gloo, CPU), many to a start."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from . import cases


@pytest.fixture(scope="session", autouse=True)
def _surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's caches, or asks the network; one thread, as the models are tiny."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    root = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FTCORE_CACHE", str(root / "ftcore"))
        patch.setenv("HF_HOME", str(root / "huggingface"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("DS_ACCELERATOR", "cpu")
        yield


@pytest.fixture(scope="session")
def run_ranks() -> Callable[[Path, int, Mapping[str, Any]], None]:
    """`run_ranks(folder, world_size, cases)`: every case on that many ranks, which have to end well."""
    from torch.distributed import TCPStore

    def run(folder: Path, world_size: int, chosen: Mapping[str, Any]) -> None:
        cases.write(folder, chosen)
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        common = {**os.environ, "WORLD_SIZE": str(world_size), "GLOO_SOCKET_IFNAME": "lo"}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        common |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        command = [sys.executable, cases.__file__ or "", str(folder)]
        ranks = [
            subprocess.Popen(command, env={**common, "RANK": str(rank)})  # no LOCAL_RANK, as under srun
            for rank in range(world_size)
        ]
        try:
            assert [rank.wait(timeout=1500) for rank in ranks] == [0] * world_size
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()

    return run
