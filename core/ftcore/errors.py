"""Errors and notes for the person at the keyboard, and how names are guessed for them."""

import difflib
import os
import sys
from collections.abc import Iterable

__all__ = [
    "InUse",
    "Interrupted",
    "SweepFailed",
    "TrainingError",
    "UserError",
    "nearest",
    "note",
    "root_cause",
]


class UserError(Exception):
    """Something the user can mend. The message is one line: what, where, and what to do.

    The command line prints it as `ftcore: error: ...` and exits 2, with no traceback.
    """


class InUse(UserError):
    """Another process works in this run directory."""


class TrainingError(Exception):
    """Training can't go on (a loss that is not finite, a rank that died): one line, exit 1."""


class SweepFailed(TrainingError):
    """Some jobs of a multirun failed."""


class Interrupted(Exception):
    """The run was asked to stop and has saved its state; the message says how to go on.

    `exit_code` is 75 (EX_TEMPFAIL, after SIGTERM or SIGUSR1: a scheduler may requeue), 130 (Ctrl-C), or
    141 (whoever read the output is gone, as after `| head`).
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """A sentence that names the nearest of `known`, or all of them; empty where there are none.

    `prefix` is shown before each name, and plays no part in what is near.
    """
    names = sorted(set(known))
    ratios = {n: difflib.SequenceMatcher(None, name, n).ratio() for n in names}
    best = max(ratios.values(), default=0.0)
    if best >= 0.6:
        close = [n for n in names if ratios[n] >= best - 0.1]
        return "did you mean " + " or ".join(f"'{prefix}{c}'" for c in close) + "?"
    return "known: " + ", ".join(prefix + n for n in names) if names else ""


def root_cause(error: BaseException) -> str:
    """The first line of the innermost cause: what libraries wrap is rarely helpful."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).partition("\n")[0]


def note(text: str) -> None:
    """Say what was decided for the user: a line on stderr, by the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"ftcore: {text}", file=sys.stderr)
