"""Asking a run to stop: signals become a flag that is read once a step and once an evaluation batch."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["OUTPUT_LOST", "StopFlag", "stop_flag"]

REQUEUE = 75  # EX_TEMPFAIL
INTERRUPTED = 130
OUTPUT_LOST = 141  # 128 + SIGPIPE


class StopFlag:
    """`code` is 0, or the exit code that the signal asks for."""

    def __init__(self) -> None:
        self.code = 0

    def catch(self, number: int, frame: FrameType | None) -> None:
        """First signal: remember it. A second Ctrl-C stops at once."""
        if number == signal.SIGINT and self.code == INTERRUPTED:
            raise KeyboardInterrupt
        if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
            # Past Python's own buffers, which the signal may have come in the middle of.
            os.write(2, b"\nftcore: stopping after this step, then saving (Ctrl-C again stops at once)\n")
        self.code = INTERRUPTED if number == signal.SIGINT else REQUEUE

    def output_lost(self) -> None:
        """Nobody reads the output any more: stop as a filter does, but save first."""
        self.code = self.code or OUTPUT_LOST


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
