"""`ftcore compare` itself: how often it calls a difference where there is none, and its time on 200 runs.

    python benchmarks/compare.py            # 200 A/A sweeps for each number of seeds; 200 runs
    python benchmarks/compare.py --sweeps 20 --runs 20

An A/A sweep has four arms of one and the same recipe. A run answers each of 200 test rows rightly or not:
rows differ in how hard they are, runs in how good they are, and a run and a row interact by chance. A sweep
counts as wrong where any of its three comparisons is called. The time is of the whole command, the best of
three.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from ftcore_report import Run, compare

ARMS, ROWS = 4, 200


def answers(rng: np.random.Generator, runs: int, skewed: bool) -> np.ndarray:
    """Right or not, bool [runs, rows]; `skewed` lets one run in eight fail to train (chance answers)."""
    hard = rng.normal(size=ROWS)
    good = 1 + 0.3 * rng.normal(size=(runs, 1)) - 4 * (rng.random((runs, 1)) < 0.125) * skewed
    return hard + good + 0.8 * rng.normal(size=(runs, ROWS)) > 0


def run_of(arm: int, seed: int, right: np.ndarray) -> Run:
    """A run in memory, as if it had been read."""
    config = {"plugin": f"arm{arm}" if arm else "none"}
    result = {"metric": {"name": "eval/accuracy"}, "metrics": {"test/accuracy": float(right.mean())}}
    run = Run(
        path=Path(f"{arm}/{seed}"), config=config, seed=seed, metric="", state="finished", result=result
    )
    run.__dict__["test"] = table(right)
    return run


def table(right: np.ndarray) -> pa.Table:
    """The predictions of a run."""
    said = np.where(right, "yes", "no")
    return pa.table({"row": np.arange(len(right)), "label": ["yes"] * len(right), "prediction": said})


def false_calls(sweeps: int, seeds: int, skewed: bool) -> tuple[int, int]:
    """A/A sweeps with a difference called, and with a Holm p below 0.05 alone."""
    called = low = 0
    for number in range(sweeps):
        rng = np.random.default_rng([number, seeds, skewed])
        right = answers(rng, ARMS * seeds, skewed).reshape(ARMS, seeds, ROWS)
        runs = [run_of(arm, seed, right[arm, seed]) for arm in range(ARMS) for seed in range(seeds)]
        (found,) = compare(runs)
        called += any(line.is_called for line in found.lines)
        low += any(line.p is not None and line.p < 0.05 for line in found.lines)
    return called, low


def write_runs(root: Path, count: int) -> None:
    """`count` finished runs of ten arms on the disk."""
    plain = {
        "model": {"path": "m", "dropout": None},
        "data": {"source": "files"},
        "task": {"name": "classify"},
    }
    plain |= {"optim": {"lr": 1e-3, "betas": [0.9, 0.999]}, "trainer": {"strategy": "single"}, "plugin": {}}
    rng = np.random.default_rng(0)
    for i in range(count):
        path, right = root / f"run-{i}", answers(rng, 1, False)[0]
        (path / "predictions").mkdir(parents=True)
        train = {"epochs": 8.0, "steps": None, "batch_size": 16}
        own = plain | {
            "train": train,
            "seed": i // 10,
            "plugin": {f"arm{i % 10}": {"p": 0.5}} if i % 10 else {},
        }
        (path / "config.yaml").write_text(yaml.safe_dump(own))
        records = [{"step": s, "loss": 1 / s, "grad_norm": 1.0, "lr": 1e-3} for s in range(1, 101)]
        records += [{"step": s, "eval/accuracy": s / 100} for s in range(10, 101, 10)]
        (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        (path / "run.json").write_text(json.dumps({"data": {"source": "d"}, "plugins": []}))
        metrics = {"test/accuracy": float(right.mean())}
        result = {
            "status": "finished",
            "metric": {"name": "eval/accuracy"},
            "metrics": metrics,
            "seconds": 9.0,
        }
        (path / "result.json").write_text(json.dumps(result))
        pq.write_table(table(right), path / "predictions" / "test.parquet")


def seconds(root: Path, *arguments: str) -> str:
    """Of `ftcore compare`, from the shell's point of view, and of its CPU; the best of three."""
    best = (float("inf"), float("inf"))
    for _ in range(3):
        start, before = time.perf_counter(), os.times()
        command = [sys.executable, "-m", "ftcore", "compare", str(root), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        best = min(best, (time.perf_counter() - start, cpu))
    return f"{best[0]:.2f} s ({best[1]:.2f} s of CPU time)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sweeps", type=int, default=200)
    parser.add_argument("--runs", type=int, default=200)
    options = parser.parse_args()
    for skewed in (False, True):
        for seeds in (3, 5, 8, 20):
            called, low = false_calls(options.sweeps, seeds, skewed)
            kind = "some runs fail" if skewed else "all runs train"
            print(f"A/A, {seeds:>2} seeds, {kind}: {called} of {options.sweeps} sweeps call a difference"
                  f" (p alone: {low})")  # fmt: skip
    with tempfile.TemporaryDirectory() as root:
        write_runs(Path(root), options.runs)
        page = ("--html", f"{root}/c.html")
        print(f"ftcore compare, {options.runs} runs: {seconds(Path(root))}")
        print(f"ftcore compare --html, {options.runs} runs: {seconds(Path(root), *page)}")


if __name__ == "__main__":
    main()
