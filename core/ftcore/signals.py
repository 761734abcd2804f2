"""Asking a run to stop: signals become a flag that is read once a step and once an evaluation batch."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["StopFlag", "stop_flag"]

REQUEUE = 75  # EX_TEMPFAIL
INTERRUPTED = 130


class StopFlag:
    """`code` is 0, or the exit code that the signal asks for."""

    def __init__(self) -> None:
        self.code = 0

    def catch(self, number: int, frame: FrameType | None) -> None:
        """First signal: remember it. A second Ctrl-C stops at once."""
        if number == signal.SIGINT and self.code == INTERRUPTED:
            raise KeyboardInterrupt
        self.code = INTERRUPTED if number == signal.SIGINT else REQUEUE


@contextlib.contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Catch SIGTERM, SIGUSR1 and SIGINT for the duration; signals reach the main thread only."""
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    numbers = [signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]
    before = {n: signal.signal(n, flag.catch) for n in numbers}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
