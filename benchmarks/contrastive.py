"""What the contrastive term costs: a whole training step with it over the same step of cross entropy alone.

    python benchmarks/contrastive.py [--rounds 15] [--cpu-time]
    python benchmarks/contrastive.py --memory
    python benchmarks/contrastive.py --anchors

Time: the demo model on the demo data, 64 rows a step in four micro-batches; every block trains on the same
rows. `--cpu-time` counts the time of one thread, which others on the machine hardly change.
`--memory`: the peak of one step over what is resident before it, each in a process of its own (Linux): the
demo model on 128 rows of 128 tokens, contrasted whole in one pass, and by `batch=global` in 8 and 16 parts.
`--anchors`: the loss of 4,096 anchors and its gradient, against autograd through the similarity matrix.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from interleaved import compare

from ftcore.compose import compose
from ftcore.job import Job, open_job
from ftcore.loop import run_step
from ftcore.screen import Screen
from ftcore.signals import StopFlag

ON = ["+plugin=contrastive"]
GLOBAL = [*ON, "plugin.contrastive.batch=global"]
VARIANTS = {"cross entropy": [], "micro": ON, "global": GLOBAL}
PEAKS = {
    "cross entropy, 1 x 128": ["train.micro_batch_size=128"],
    "one pass, 1 x 128": [*ON, "train.micro_batch_size=128"],
    "global, 8 x 16": [*GLOBAL, "train.micro_batch_size=16"],
    "global, 16 x 8": [*GLOBAL, "train.micro_batch_size=8"],
}
ANCHORS = ("blocks", "autograd")


def open_at_start(overrides: list[str]) -> Job:
    """A silent job, as it stands before its first step."""
    directory = Path(tempfile.mkdtemp(prefix="ftcore-bench-"))
    job = open_job(compose(overrides), directory, lambda shown: Screen(False), StopFlag())
    job.hooks.on_train_start(job.state(10**6))
    job.strategy.model.train()
    return job


def step_of(job: Job, clock: Callable[[], float]) -> Callable[[], float]:
    """Milliseconds of a step; each call trains on the same rows, so that variants do the same work."""
    sampler = job.hooks.build_sampler(job.prepared.splits["train"], job.cfg.train.batch_size, 0)

    def run() -> float:
        started = clock()
        job.progress.step = 0
        run_step(job, sampler, 10**6)
        return (clock() - started) * 1000

    return run


def long_rows() -> list[str]:
    """Data of 128 rows that fill 128 tokens, of eight classes."""
    folder = Path(tempfile.mkdtemp(prefix="ftcore-bench-rows-"))
    rows = [{"text": f"row {i} " + "parcel late again " * 50, "label": f"class {i % 8}"} for i in range(128)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["data=files", f"data.train={folder / 'train.jsonl'}"]
    return [*files, "data.max_length=128", "data.max_truncated=1", "train.batch_size=128"]


def peak_of(run: Callable[[], object]) -> float:
    """MiB by which a call's peak of resident memory exceeds what was resident before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    run()
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    return (peak - before) / 2**20


def anchors(kind: str) -> Callable[[], float]:
    """Milliseconds of the loss and its gradient for 4,096 anchors of width 384 in ten classes."""
    from ftcore_contrastive import supervised_contrastive

    torch.manual_seed(0)
    x, labels = torch.randn(4096, 384).requires_grad_(), torch.arange(4096) % 10

    def naive() -> torch.Tensor:
        z = torch.nn.functional.normalize(x, dim=1)
        similarity = (z @ z.T / 0.3).masked_fill(torch.eye(4096, dtype=torch.bool), -torch.inf)
        log_p = similarity - similarity.logsumexp(dim=1, keepdim=True)
        positive = (labels[:, None] == labels).fill_diagonal_(False)
        return -(log_p.masked_fill(~positive, 0).sum(dim=1) / positive.sum(dim=1)).mean()

    def run() -> float:
        x.grad, started = None, time.perf_counter()
        (supervised_contrastive(x, labels, 0.3) if kind == "blocks" else naive()).backward()
        return (time.perf_counter() - started) * 1000

    return run


def print_peaks(names: tuple[str, ...]) -> None:
    """Each in a process of its own, which gives what it frees back at once."""
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    for name in names:
        again = [sys.executable, __file__, "--peak", name]
        peak = subprocess.run(again, capture_output=True, text=True, check=True, env=env).stdout.split()[-1]
        print(f"{name:<24}{peak:>8} MiB", flush=True)


def print_peak(name: str) -> None:
    if name in ANCHORS:
        run = anchors(name)
    else:
        job = open_at_start([*long_rows(), *PEAKS[name]])
        for param in job.strategy.params.values():
            param.grad = torch.zeros_like(param)
        job.strategy.step(0.0)  # makes the optimiser's moments
        run = step_of(job, time.perf_counter)
    print(round(peak_of(run)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cpu-time", action="store_true", help="time of the process, one thread")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--anchors", action="store_true", help="4,096 anchors by themselves")
    parser.add_argument("--peak", choices=(*PEAKS, *ANCHORS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        return print_peak(options.peak)
    if options.memory:
        return print_peaks(tuple(PEAKS))
    if options.anchors:
        print_peaks(ANCHORS)
        return compare({kind: anchors(kind) for kind in reversed(ANCHORS)}, rounds=options.rounds, unit="ms")
    clock = time.process_time if options.cpu_time else time.perf_counter
    if options.cpu_time:
        torch.set_num_threads(1)
    demo = ["train.batch_size=64", "train.micro_batch_size=16"]
    jobs = {name: open_at_start([*demo, *more]) for name, more in VARIANTS.items()}
    runs = {name: step_of(job, clock) for name, job in jobs.items()}
    for name, run in runs.items():
        run()
        assert jobs[name].progress.tokens == jobs["cross entropy"].progress.tokens, "not the same work"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32,", end=" ")
    print(f"{jobs['cross entropy'].progress.tokens} tokens a step")
    return compare(runs, rounds=options.rounds, unit="ms/step")


if __name__ == "__main__":
    main()
