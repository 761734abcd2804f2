"""Who is which rank, and how ranks meet."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ftcore import UserError, ranks
from ftcore.launch import rank_environment


def test_ranks_are_read_from_the_launchers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's variables, else Slurm's, else one process."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    assert rank_environment() == (0, 1, 0)
    for name, value in {"SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}.items():
        monkeypatch.setenv(name, value)
    assert rank_environment() == (5, 8, 1)
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    assert rank_environment() == (3, 4, 3)
    for rank in ("4", "x", "-1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(
            UserError, match=f"has RANK={rank}, WORLD_SIZE=4, LOCAL_RANK=3, which name no rank"
        ):
            rank_environment()


def test_a_rank_that_is_alone_says_what_it_waits_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It goes on when the others come; where the port is another's, that is said."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(ranks, "PATIENCE_SECONDS", 0.01)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(
            UserError, match=r"rank 0 of 2 can't meet the others at 127\.0\.0\.1:\d+ .*in use"
        ):
            ranks._meet(0, 2)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ranks._meet, 0, 2)
        time.sleep(0.1)
        ranks._meet(1, 2).set("key", "value")
        assert first.result().get("key") == b"value"
    assert "rank 0 of 2 waits for the others at 127.0.0.1:" in capsys.readouterr().err
