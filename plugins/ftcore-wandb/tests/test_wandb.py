"""By the command line in offline mode, the files read back; a run is stopped and resumed."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2

from ftcore_wandb import Wandb
from tests import cli

ROWS = [{"text": f"row {i} " + "ab" * (i % 7), "label": "yes" if i % 3 else "no"} for i in range(32)]
BLOCK, HEADER = 32768, 7


def start(tmp: Path, *arguments: str, **extra: str) -> cli.Process:
    return cli.start(arguments, tmp, {"HOME": str(tmp), **extra})


def end(process: cli.Process, code: int) -> str:
    said, _ = process.communicate()
    assert process.returncode == code, said
    return said


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    files = [f"data.{split}={path}" for split in ("train", "validation", "test")]
    own = ["+plugin=wandb", f"hydra.run.dir={tmp_path / 'run'}", "model=tiny_bert", "data=files"]
    return [*own, *files, "train.steps=40", "train.log_every=1", "train.eval_every=20"]


def payloads(path: Path) -> Iterator[bytes]:
    """Whole records of a `.wandb` file: LevelDB's log format after a header of seven bytes."""
    data, at, parts = path.read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # no room for a header: padding
            at += BLOCK - at % BLOCK
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + HEADER : at + HEADER + size]
        at += HEADER + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def read(run_dir: Path) -> tuple[set[str], dict[int, dict[str, Any]], dict[str, Any], list[int]]:
    """Ids of the W&B runs, what was logged by step, the summary, and steps of each file's first record."""
    ids, history, summary, first = set(), {}, {}, []
    for file in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb")):
        begun = len(history)
        for payload in payloads(file):
            record = wandb_internal_pb2.Record.FromString(payload)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                items = {
                    (i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item
                }
                history.setdefault(record.history.step.num, {}).update(items)
            if record.HasField("summary"):
                summary |= {
                    i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.summary.update
                }
        first.append(sorted(history)[begun] if len(history) > begun else -1)
    return ids, history, summary, first


def test_a_killed_run_goes_on_in_the_same_wandb_run(tmp_path: Path, arguments: list[str]) -> None:
    """One id over SIGKILL and a resume; every record of metrics.jsonl is there, and the test figures."""
    run_dir = tmp_path / "run"
    process = start(tmp_path, *arguments, "train.steps=150", "train.save_every=5", WANDB_MODE="offline")
    deadline = time.monotonic() + 120
    while not list(run_dir.glob("checkpoints/step-6?")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    end(process, -9)
    end(start(tmp_path, "resume", str(run_dir), WANDB_MODE="offline"), 0)
    ids, history, summary, first = read(run_dir)
    assert len(ids) == 1
    assert len(first) == 2
    kept = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert sorted(history) == sorted({r["step"] for r in kept})
    for record in kept:
        there = history[record["step"]]
        assert {k: there[k] for k in record if k != "step"} == {
            k: v for k, v in record.items() if k != "step"
        }
    metrics = json.loads((run_dir / "result.json").read_text())["metrics"]
    assert {k: summary[k] for k in metrics} == metrics


def test_a_failed_job_of_a_sweep_has_failed_in_wandb(tmp_path: Path, arguments: list[str]) -> None:
    """Each job has a W&B run of its own; the next job in the process ends a failed one as failed."""
    odd = tmp_path / "odd.py"
    odd.write_text(
        "from ftcore import hookimpl, plugin\n\n@plugin(api=1)\nclass Odd:\n    at: int = 3\n    @hookimpl\n"
        "    def on_step_end(self, state):\n        assert state.step != self.at\n"
    )
    own = ["-m", "--plugin-file", str(odd), "+plugin=[wandb,odd]", "plugin.odd.at=3,0", "hydra.sweep.dir=s"]
    rest = [a for a in arguments if not a.startswith(("hydra.run.dir", "+plugin"))]
    said = end(start(tmp_path, *own, *rest, "train.steps=4", WANDB_MODE="offline"), 1)
    assert "2 jobs: 1 finished, 1 failed" in said
    codes = {}
    for file in (tmp_path / "s").glob("*/wandb/offline-run-*/run-*.wandb"):
        records = map(wandb_internal_pb2.Record.FromString, payloads(file))
        finished = (file.parents[2] / "result.json").is_file()
        codes[finished] = [r.exit.exit_code for r in records if r.HasField("exit")]
    assert codes == {True: [0], False: [1]}


def test_an_unknown_mode_is_said_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(ValueError, match="WANDB_MODE=ofline: known: online, offline, disabled"):
        Wandb()
    assert Wandb(mode="offline").mode == "offline"


def test_no_login_is_one_line(tmp_path: Path, arguments: list[str]) -> None:
    """Online without a key: what is missing, and how to do without."""
    said = end(start(tmp_path, *arguments, WANDB_MODE="online", WANDB_API_KEY=""), 2)
    assert said.splitlines()[-1].startswith("ftcore: error: wandb: ")
    assert "plugin.wandb.mode=offline" in said
