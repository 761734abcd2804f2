"""One local rank: `python -m ftcore.worker RUN_DIR`, started by `launch`."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftcore.config import Config
from ftcore.errors import Interrupted, TrainingError, UserError
from ftcore.ranks import leave_ranks
from ftcore.run import read_config, train_here
from ftcore.signals import StopFlag, stop_flag

__all__ = ["main"]


def main(run_dir: Path, work: Callable[[Config, Path, StopFlag], Any] = train_here) -> int:
    """Train (or do other `work`) as the rank that the environment names; the parent gets errors in a file."""
    _die_with_parent()
    with stop_flag() as stop:  # around the reports too: the launcher's SIGTERM must not cut one short
        try:
            work(read_config(run_dir), run_dir, stop)
        except Interrupted as error:
            return _report("interrupted", error, error.exit_code)
        except UserError as error:
            return _report("user", error, 2)
        except BaseException as error:
            return _report("failure", error, 1)
        finally:
            leave_ranks()
    return 0


def _die_with_parent() -> None:
    """Leave at once when the parent is gone (killed): nobody would stop this rank any more."""
    parent = int(os.environ["FTCORE_PARENT"])

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _report(kind: str, error: BaseException, code: int) -> int:
    """Leave the error for the parent to show; returns the exit code."""
    rank = int(os.environ["RANK"])
    quiet = isinstance(error, TrainingError)
    report = {
        "rank": rank,
        "kind": kind,
        "code": code,
        "message": str(error) if quiet or kind != "failure" else f"{type(error).__name__}: {error}",
        "traceback": "" if quiet else traceback.format_exc(),
        "time": time.time(),
    }
    path = Path(os.environ["FTCORE_REPORTS"]) / f"rank-{rank}.json"
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(report))
    scratch.replace(path)
    return code


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a rank that failed must not wait for others in an exit handler
