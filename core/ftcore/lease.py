"""One process works in a run directory at a time, wherever it runs: a lease that other machines see.

`.lease-1`, `.lease-2`, ...: whoever creates the highest file holds the directory. Creating a file
that must not exist is atomic on network file systems too, where locks are not to be relied on. The
holder touches its file every few seconds; one that was left alone for two minutes, or whose
process is gone, is followed by the next number. A holder that finds itself followed (it was
suspended) ends at once, before it writes over its successor.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from ftcore.errors import InUse, UserError

__all__ = ["lease", "touched"]

BEAT_SECONDS = 5.0
STALE_SECONDS = 120.0


@contextlib.contextmanager
def lease(directory: Path) -> Iterator[None]:
    """Hold `directory` for the duration; it is made where it is not there.

    Raises:
        InUse: another process holds it.
        UserError: it can't be made, or written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        mine = _acquire(directory)
    except OSError as error:
        raise UserError(
            f"can't write to {directory} ({error.strerror}); set hydra.run.dir, or mend it"
        ) from error
    done = threading.Event()
    threading.Thread(target=_beat, args=(mine, done), daemon=True).start()
    try:
        yield
    finally:
        done.set()
        for path in _leases(directory):
            if _number(path) <= _number(mine):
                path.unlink(missing_ok=True)


def touched(directory: Path) -> float | None:
    """Seconds since the directory's holder showed itself, None where there is none or it is gone."""
    held = _leases(directory)
    return None if not held or _is_gone(held[-1]) else _age(held[-1])


def _acquire(directory: Path) -> Path:
    while True:
        held = _leases(directory)
        if held and not _is_gone(held[-1]):
            raise InUse(
                f"{directory} is in use by another run ({_holder(held[-1])});"
                " wait for it, or set another name="
            )
        mine = directory / f".lease-{_number(held[-1]) + 1 if held else 1}"
        try:
            with mine.open("x", encoding="utf-8") as file:
                json.dump({"host": _host(), "pid": os.getpid()}, file)
        except FileExistsError:
            continue  # another was quicker
        return mine


def _beat(mine: Path, done: threading.Event) -> None:
    while not done.wait(BEAT_SECONDS):
        if _leases(mine.parent)[-1:] != [mine] and not done.is_set():
            sys.stderr.write(f"ftcore: failed: {mine.parent} was taken over by another process\n")
            sys.stderr.flush()
            os._exit(1)
        with contextlib.suppress(OSError):  # a file system that is away for a moment
            os.utime(mine)


def _leases(directory: Path) -> list[Path]:
    return sorted(directory.glob(".lease-*"), key=_number)


def _number(path: Path) -> int:
    return int(path.name.removeprefix(".lease-"))


def _is_gone(path: Path) -> bool:
    """Whether the holder has ended: its process where that can be seen from here, else its silence."""
    with contextlib.suppress(OSError, ValueError):
        holder = json.loads(path.read_text(encoding="utf-8"))
        if holder["host"] == _host() and not _is_alive(holder["pid"]):
            return True
    return _age(path) > STALE_SECONDS


def _age(path: Path) -> float:
    """Seconds since `path` was touched, by the clock of its file system; 0 where it is just gone."""
    clock = path.with_name(f".clock-{socket.gethostname()}-{os.getpid()}")
    try:
        clock.touch()
        return clock.stat().st_mtime - path.stat().st_mtime
    except OSError:
        return 0.0
    finally:
        clock.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _host() -> str:
    """The machine, and the container in it: where a process number means the same process."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"
    return socket.gethostname()


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host'].partition(' ')[0]}"
    return "just started"
