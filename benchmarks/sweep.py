"""Twenty short jobs in one multirun against twenty calls of `ftcore`, and the memory of the one process.

Usage: python benchmarks/sweep.py [--jobs 20] [OVERRIDE ...]

Prints the ratio of the wall times, and the peak memory of the process after its 5th and its last job, as the
runs' own records have it. Targets: at most 0.6x, and at most 5% more.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHORT = ["model=tiny_bert", "train.steps=8", "train.log_every=8"]


def timed(arguments: list[str], folder: Path) -> float:
    """Seconds that one command takes."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "ftcore", *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - started


def memory(run: Path) -> float:
    """MB at the most, of the process so far."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return float(max(record["memory_mb"] for record in records if "memory_mb" in record))


def main() -> None:
    """Both ways, one after the other, the data formatted beforehand."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("overrides", nargs="*", default=SHORT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        timed([*options.overrides, "train.steps=1", "seed=999"], folder)
        swept = timed(
            ["-m", *options.overrides, f"seed=range({options.jobs})", "hydra.sweep.dir=sweep"], folder
        )
        runs = sorted(folder.glob("sweep/*/metrics.jsonl"), key=lambda file: file.stat().st_mtime)
        separate = sum(timed([*options.overrides, f"seed={n}"], folder) for n in range(options.jobs))
        fifth, last = memory(runs[4].parent), memory(runs[-1].parent)
        print(f"{options.jobs} jobs in one multirun {swept:.1f} s, by themselves {separate:.1f} s:", end=" ")
        print(f"{swept / separate:.2f}x")
        print(f"peak memory after job 5 {fifth:,.0f} MB, after job {options.jobs} {last:,.0f} MB:", end=" ")
        print(f"{last / fifth - 1:+.1%}")


if __name__ == "__main__":
    main()
