"""Local ranks as plain child processes of this one, and which rank this process is.

The children never see Hydra or the command line.

Signals are passed on; a rank that dies takes the others down, and its own error is shown.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ftcore.errors import Interrupted, TrainingError, UserError
from ftcore.signals import caught

__all__ = ["launch", "rank_environment"]

GRACE_SECONDS = 10.0


def rank_environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) as torchrun, srun, submitit or our own launch set them."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return _ranks_of("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env:
        return _ranks_of("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    if int(env.get("SUBMITIT_LOCAL_NTASKS", "1")) > 1:
        return _ranks_of("SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_NTASKS", "SUBMITIT_LOCAL_LOCALID")
    return 0, 1, 0


def _ranks_of(*names: str) -> tuple[int, int, int]:
    """(rank, world size, local rank) by these variables.

    Raises:
        UserError: they are no ranks, as where they are left from something else.
    """
    said = [os.environ.get(name, "0") for name in names]
    numbers = [int(text) if text.isdecimal() else -1 for text in said]
    rank, world_size, local_rank = numbers
    if min(numbers) < 0 or rank >= world_size:
        found = ", ".join(f"{name}={text}" for name, text in zip(names, said, strict=True))
        raise UserError(
            f"the environment has {found}, which name no rank: unset them where no launcher set them"
        )
    return rank, world_size, local_rank


def launch(
    ranks: int, run_dir: Path, module: str = "ftcore.worker", env: Mapping[str, str] | None = None
) -> None:
    """Run `python -m ftcore.worker RUN_DIR` (or another module) as `ranks` processes and wait for them.

    `env` is added to their environment.

    Raises:
        UserError, TrainingError, Interrupted: what the first rank to fail reported.
    """
    with tempfile.TemporaryDirectory(prefix="ftcore-ranks-") as reports:
        children = [_start(module, rank, ranks, run_dir, Path(reports), env or {}) for rank in range(ranks)]

        received: list[int] = []

        def forward(number: int, frame: object) -> None:
            received.append(number)
            if received.count(signal.SIGINT) == 2:
                raise KeyboardInterrupt  # the ranks are killed on the way out
            for child in children:
                if child.poll() is None:
                    child.send_signal(number)

        with caught(forward):
            try:
                first = _wait(children)
            finally:
                for child in children:
                    if child.poll() is None:
                        child.kill()
            _raise(first, children, run_dir, Path(reports))


def _start(
    module: str, rank: int, ranks: int, run_dir: Path, reports: Path, more: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    env = {
        # A launcher's that started this very process: it hosts no store for ranks of ours.
        **{k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC_")},
        **more,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": _port(reports),
        "FTCORE_REPORTS": str(reports),
        "FTCORE_PARENT": str(os.getpid()),
    }
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    if sys.platform == "linux":
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")  # host names may not resolve
    command = [sys.executable, "-m", module, str(run_dir)]
    return subprocess.Popen(command, env=env, start_new_session=True)


def _port(reports: Path) -> str:
    """A free port, the same for all ranks of this launch."""
    path = reports / "port"
    if not path.is_file():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            path.write_text(str(probe.getsockname()[1]))
    return path.read_text()


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Wait for all; returns the ranks that failed first. Then the others get SIGTERM, and 10 seconds."""
    first: list[int] = []
    deadline = math.inf
    while any(child.poll() is None for child in children):
        failed = [rank for rank, child in enumerate(children) if child.poll() not in (None, 0)]
        if failed and not first:
            first, deadline = failed, time.monotonic() + GRACE_SECONDS
            for child in children:
                if child.poll() is None:
                    child.terminate()
        if time.monotonic() > deadline:
            for child in children:
                child.kill()
        time.sleep(0.05)
    return first or [rank for rank, child in enumerate(children) if child.returncode]


def _raise(
    first: Sequence[int], children: Sequence[subprocess.Popen[bytes]], run_dir: Path, reports: Path
) -> None:
    """Raise what went wrong first: a rank that was killed, else the earliest report."""
    if not first:
        return
    for rank in first:
        if (code := children[rank].returncode) < 0:
            name = signal.Signals(-code).name
            raise TrainingError(
                f"rank {rank} was ended by {name}{' (out of memory?)' if name == 'SIGKILL' else ''};"
                f" go on with: ftcore resume {run_dir}"
            )
    found = [json.loads(f.read_text()) for f in reports.glob("rank-*.json")]
    if not found:
        raise TrainingError(
            f"rank {first[0]} ended with exit code {children[first[0]].returncode} and no message"
        )
    report = min(found, key=lambda r: r["time"])
    if report["kind"] == "interrupted":
        raise Interrupted(report["message"], report["code"])
    if report["kind"] == "user":
        raise UserError(report["message"])
    sys.stderr.write(report["traceback"])
    raise TrainingError(f"rank {report['rank']}: {report['message']}")
