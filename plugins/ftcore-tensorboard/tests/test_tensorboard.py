"""By the command line, read back by TensorBoard's own reader; a run is killed and resumed."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ftcore_tensorboard import TensorBoard
from tests import cli

ROWS = [{"text": f"row {i} " + "ab" * (i % 7), "label": "yes" if i % 3 else "no"} for i in range(32)]


def finish(tmp: Path, *arguments: str) -> None:
    ended = cli.run(arguments, tmp)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def kill_after_checkpoint(tmp: Path, run_dir: Path, *arguments: str) -> None:
    """Start a run; SIGKILL it once it has saved a checkpoint and logged steps after it."""
    process = cli.start(arguments, tmp)
    deadline = time.monotonic() + 120
    while not _has_gone_on(run_dir):
        assert process.poll() is None, process.printed("1")
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.communicate()


def _has_gone_on(run_dir: Path) -> bool:
    saved = [int(d.name[5:]) for d in (run_dir / "checkpoints").glob("step-*")]
    return bool(saved) and any(r["step"] > min(saved) + 3 for r in records(run_dir))


def records(run_dir: Path) -> list[Mapping[str, Any]]:
    """Whole records only: the last may be half written."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def arguments(tmp: Path, run_dir: Path) -> list[str]:
    path = tmp / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    files = [f"data.{split}={path}" for split in ("train", "validation", "test")]
    own = ["+plugin=tensorboard", f"hydra.run.dir={run_dir}", "model=tiny_bert", "data=files"]
    return [*own, *files, "train.steps=60", "train.log_every=1", "train.save_every=20", "train.eval_every=10"]


def test_a_killed_run_goes_on_with_each_step_once(tmp_path: Path) -> None:
    """After SIGKILL and resume TensorBoard shows what metrics.jsonl holds, and the test figures."""
    run_dir = tmp_path / "run"
    kill_after_checkpoint(tmp_path, run_dir, *arguments(tmp_path, run_dir))
    finish(tmp_path, "resume", str(run_dir))
    shown = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    for name in ("loss", "grad_norm", "lr", "eval/accuracy"):
        kept = [(r["step"], r[name]) for r in records(run_dir) if name in r]
        found = [(e.step, e.value) for e in shown.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in kept]
        assert all(abs(a - b) <= 1e-6 * abs(b) for (_, a), (_, b) in zip(found, kept, strict=True))
    metrics = json.loads((run_dir / "result.json").read_text())["metrics"]
    (tested,) = shown.Scalars("test/accuracy")
    assert (
        tested.value == float(f"{metrics['test/accuracy']:.7g}")
        or abs(tested.value - metrics["test/accuracy"]) < 1e-6
    )


@pytest.mark.parametrize("folder", ["", "..", "a/b", "model", "metrics.jsonl"])
def test_a_folder_that_is_none_or_the_runs_own(folder: str) -> None:
    """What the run itself writes is not written over."""
    with pytest.raises(ValueError, match="folder"):
        TensorBoard(folder=folder)
