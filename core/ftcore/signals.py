"""Asking a run to stop: signals become a flag that is read once a step and once an evaluation batch."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

__all__ = ["OUTPUT_LOST", "StopFlag", "caught", "stop_flag"]

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
    """Catch what asks a run to stop for the duration; signals reach the main thread only."""
    flag = StopFlag()
    with caught(flag.catch):
        yield flag


@contextlib.contextmanager
def caught(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """`handler` for SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 for the duration.

    Where there was a handler before, it is given the signal afterwards, when the run has saved:
    submitit's puts the job back into the queue.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        handler(number, frame)

    named = (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"))
    before = {n: signal.signal(n, note) for n in named if n is not None}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
        for number in dict.fromkeys(seen):
            earlier = before[signal.Signals(number)]
            if callable(earlier) and earlier is not signal.default_int_handler:
                earlier(number, None)
