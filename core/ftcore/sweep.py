"""The jobs of a multirun: one that fails does not stop the others, and the command's last words name it.

Each job leaves a word, a small JSON file in the shared cache; so it does from a launcher's process
or another machine as well.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import shutil
import sys
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from ftcore.errors import Interrupted, InUse, SweepFailed, TrainingError, UserError
from ftcore.launch import rank_environment

__all__ = ["is_in_sweep", "job", "sweep"]

WORDS = "FTCORE_SWEEP"
"""Environment variable: the directory of one command's words, in the cache that all its jobs share."""


def is_in_sweep() -> bool:
    """Whether this process runs a job of a multirun."""
    return WORDS in os.environ


@contextlib.contextmanager
def sweep() -> Iterator[None]:
    """Everything inside belongs to one command; ends with `report` of its jobs, if there were any.

    Raises:
        SweepFailed: some failed; each is printed with its error before.
    """
    from ftcore.prepare import cache_root

    words = cache_root() / "sweeps" / uuid.uuid4().hex[:12]
    os.environ[WORDS] = str(words)
    try:
        yield
        _report(words)
    finally:
        del os.environ[WORDS]
        shutil.rmtree(words, ignore_errors=True)


def job(run_dir: Path, run: Callable[[], float], *, others: bool = True) -> float:
    """Run one job; NaN where it fails, or runs elsewhere: that is noted, and said at once.

    Raises:
        SweepFailed: it failed, and the process can't go on to `others`.
    """
    try:
        value = run()
    except Interrupted:
        raise
    except Exception as error:
        outcome, message = "failed", str(error)
        if isinstance(error, InUse):
            outcome = "running elsewhere"
        elif not isinstance(error, UserError | TrainingError):
            traceback.print_exc()
            message = f"{type(error).__name__}: {error}"
        _note(run_dir, outcome, message)
        if not others:
            raise SweepFailed(
                f"{message}; ranks that torchrun or srun started run no job after it"
            ) from error
        return math.nan
    finally:
        gc.collect()  # models are in cycles of few objects, which the collector would leave for many jobs
    _note(run_dir, "pruned" if _is_pruned(run_dir) else "finished", "")
    return value


def _is_pruned(run_dir: Path) -> bool:
    result = run_dir / "result.json"  # not there yet for a rank that is done before the first one
    return result.is_file() and json.loads(result.read_text(encoding="utf-8"))["status"] == "pruned"


def _note(run_dir: Path, outcome: str, message: str) -> None:
    if message:
        print(f"ftcore: {outcome}: {message}", file=sys.stderr)
    words = Path(os.environ[WORDS])
    words.mkdir(parents=True, exist_ok=True)
    word = {"run": str(run_dir), "outcome": outcome, "message": message}
    (words / f"{uuid.uuid4().hex}.json").write_text(json.dumps(word), encoding="utf-8")


def _report(folder: Path) -> None:
    if rank_environment()[0] > 0:
        return
    read = [json.loads(f.read_text(encoding="utf-8")) for f in folder.glob("*.json")]
    if not read:
        print("0 jobs: nothing is left to run, or a range(...) or glob(...) has no value")
        return
    # Ranks of one run leave a word each, and so do equal jobs: the one that says most speaks for the run.
    outcomes = ("running elsewhere", "finished", "pruned", "failed")
    words = list({w["run"]: w for w in sorted(read, key=lambda w: outcomes.index(w["outcome"]))}.values())
    counts = {o: sum(w["outcome"] == o for w in words) for o in (*outcomes[1:], outcomes[0])}
    said = ", ".join(f"{n} {outcome}" for outcome, n in counts.items() if n)
    print(f"\n{len(words)} job{'s' if len(words) > 1 else ''}: {said}")
    for word in sorted(words, key=lambda w: str(w["run"])):
        if word["message"]:
            print(f"  {word['outcome']}: {Path(word['run']).name}: {word['message']}")
    if counts["failed"]:
        raise SweepFailed(
            f"{counts['failed']} of {len(words)} jobs failed;"
            " the same command again runs only what is unfinished"
        )
