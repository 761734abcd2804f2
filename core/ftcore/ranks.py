"""The group of all ranks: how they find each other, and that it stays for all jobs of a process."""

from __future__ import annotations

import atexit
import os
import re
import sys
import threading
import zlib

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ftcore.errors import UserError
from ftcore.launch import rank_environment

__all__ = ["join_ranks", "leave_ranks"]

PATIENCE_SECONDS = 20.0  # until a rank says that it waits for the others


def join_ranks() -> None:
    """Form the group of all ranks, for this job and the next ones of this process (a multirun).

    A second group would wait for ever at the addresses of the first, which stay in the launcher's store.

    Raises:
        UserError: no store at the address that the environment gives.
    """
    if dist.is_initialized():
        return
    _name_meeting_place()
    rank, world_size, _ = rank_environment()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=_meet(rank, world_size), rank=rank, world_size=world_size)
    atexit.register(leave_ranks)


def leave_ranks() -> None:
    """Give back the group of all ranks, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _name_meeting_place() -> None:
    """Name the first task's machine and a port of this job's own, where the launcher has not (srun)."""
    env = os.environ
    if "MASTER_ADDR" in env:
        return
    job = env.get("SLURM_JOB_ID") or env.get("SUBMITIT_LOCAL_JOB_ID", "0")
    # node[03-05,09],other: the first is node03
    first = re.match(r"([^\[,]+)(?:\[(\d+))?", env.get("SLURM_STEP_NODELIST", ""))
    env["MASTER_ADDR"] = "".join(filter(None, first.groups())) if first else "127.0.0.1"
    env["MASTER_PORT"] = str(20000 + zlib.crc32(f"{job}.{env.get('SLURM_STEP_ID', '')}".encode()) % 40000)


def _meet(rank: int, world_size: int) -> Store:
    """The store by which ranks find each other, when all are there.

    They are waited for in a thread, so that Ctrl-C is heard: a rank that only the environment speaks of
    never comes.

    Raises:
        UserError: no store at the address that the environment gives.
    """
    where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    found: list[Store | Exception] = []

    def join() -> None:
        try:
            store, *_ = next(rendezvous("env://", rank, world_size))
            found.append(PrefixStore("ftcore", store))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(PATIENCE_SECONDS)
    if thread.is_alive():
        sys.stderr.write(
            f"ftcore: rank {rank} of {world_size} waits for the others at {where}; where no launcher started"
            " them, press Ctrl-C twice and unset RANK and WORLD_SIZE\n"
        )
    thread.join()
    if isinstance(found[0], Exception):
        said = str(found[0]).partition("\n")[0]
        raise UserError(
            f"rank {rank} of {world_size} can't meet the others at {where} (MASTER_ADDR:MASTER_PORT): {said}"
        )
    return found[0]
