"""A function over many items by forked processes, results in order."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from ftcore.errors import UserError

__all__ = ["fork_map"]

ENDED = "a worker that formats data was ended (out of memory?); set data.workers lower"

Item = TypeVar("Item")
Result = TypeVar("Result")


def fork_map(
    function: Callable[[Item], Result], items: Iterable[Item], processes: int
) -> Iterator[Result | Exception]:
    """`map(function, items)` by up to so many processes; what the function raises stands in a result's place.

    A forked process has all that `function` refers to, as it was when it started, without its being pickled;
    what the function changes there is lost. One process is this one.

    Raises:
        UserError: the system can't fork, or has ended a process.
    """
    if processes == 1:
        yield from (_result(function, item) for item in items)
        return
    if "fork" not in multiprocessing.get_all_start_methods():
        raise UserError("several workers are forked processes, which this system has not; set data.workers=1")
    context, lines, children = multiprocessing.get_context("fork"), [], []
    busy: deque[Connection[Any, Any]] = deque()
    try:
        for number, item in enumerate(items):
            if number < processes:  # few items need few
                here, there = context.Pipe()
                lines.append(here)
                arguments = (function, there, tuple(lines))
                children.append(context.Process(target=_serve, args=arguments, daemon=True))
                children[-1].start()
                there.close()
            if len(busy) == processes:
                yield _receive(busy.popleft())
            busy.append(lines[number % processes])  # which waits for it: nobody writes to one that writes
            _send(busy[-1], item)
        while busy:
            yield _receive(busy.popleft())
    finally:
        for line in lines:
            line.close()
        for child in children:
            child.terminate()
            child.join()


def _serve(
    function: Callable[[Any], Any], line: Connection[Any, Any], parents: tuple[Connection[Any, Any], ...]
) -> None:
    """Answer until the parent closes its end, or is gone; Ctrl-C is the parent's to act on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for end in parents:  # inherited, and open as long as any process has them
        end.close()
    while True:
        try:
            item = line.recv()
        except EOFError:
            return
        result = _result(function, item)
        if isinstance(result, Exception) and not isinstance(result, UserError):
            result = RuntimeError(str(result))  # others may not survive the way
        try:
            line.send(result)
        except OSError:
            return  # nobody is there
        except Exception as error:
            line.send(RuntimeError(f"can't be sent from a worker ({error}); set data.workers=1"))


def _result(function: Callable[[Any], Any], item: Any) -> Any:
    try:
        return function(item)
    except Exception as error:
        return error


def _send(line: Connection[Any, Any], item: Any) -> None:
    try:
        line.send(item)
    except OSError:
        raise UserError(ENDED) from None


def _receive(line: Connection[Any, Any]) -> Any:
    try:
        return line.recv()
    except (EOFError, OSError):
        raise UserError(ENDED) from None
