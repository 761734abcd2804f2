"""What mixout costs: a whole training step with it over the same step without, both without dropout.

    python benchmarks/mixout.py [--model llama] [--rounds 15]
    python benchmarks/mixout.py --memory [--model llama]

The demo model on the demo data, or a Llama of 19 million weights on rows of 264 tokens: more than 1,024
tokens a step, in four micro-batches; every block trains on the same rows. `--cpu-time` counts the time of one
thread, which others on the machine hardly change. `--memory` prints peaks, each in a process of its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from interleaved import compare

from ftcore import tiny
from ftcore.compose import compose
from ftcore.job import Job, open_job
from ftcore.loop import run_step
from ftcore.screen import Screen
from ftcore.signals import StopFlag

VARIANTS = {
    "without": [],
    "column, step": ["+plugin=mixout"],
    "column, micro_batch": ["+plugin=mixout", "plugin.mixout.mask_scope=micro_batch"],
    "element, step": ["+plugin=mixout", "plugin.mixout.granularity=element"],
    "element, micro_batch": [
        "+plugin=mixout",
        "plugin.mixout.granularity=element",
        "plugin.mixout.mask_scope=micro_batch",
    ],
}
DEMO = ["train.batch_size=64", "train.micro_batch_size=16"]


def llama() -> list[str]:
    """A Llama with random weights in a directory, and rows that fill 264 tokens."""
    import transformers

    folder = Path(tempfile.mkdtemp(prefix="ftcore-bench-llama-"))
    config = transformers.LlamaConfig(
        vocab_size=261,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tiny.tokenizer("tiny_llama").save_pretrained(folder)
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps({"text": f"{i:03} " + "abcdefgh " * 40}) + "\n" for i in range(64)))
    files = ["data=files", f"data.train={data}", "data.max_length=264", "data.max_truncated=1"]
    model = ["model=pretrained", f"model.path={folder}", "task=causal_lm"]
    return [*model, *files, "train.batch_size=4", "train.micro_batch_size=1"]


def open_at_start(overrides: list[str]) -> Job:
    """A silent job, as it stands before its first step."""
    directory = Path(tempfile.mkdtemp(prefix="ftcore-bench-"))
    job = open_job(compose(overrides), directory, lambda shown: Screen(False), StopFlag())
    job.hooks.on_train_start(job.state(10**6))
    job.strategy.model.train()
    return job


def steps_of(job: Job, count: int, clock: Callable[[], float]) -> Callable[[], float]:
    """Milliseconds a step; each call trains on the same rows, so that variants do the same work."""
    sampler = job.hooks.build_sampler(job.prepared.splits["train"], job.cfg.train.batch_size, 0)

    def run() -> float:
        started = clock()
        for job.progress.step in range(count):
            run_step(job, sampler, 10**6)
        return (clock() - started) / count * 1000

    return run


def print_peaks(model: str) -> None:
    for name in VARIANTS:
        again = [sys.executable, __file__, "--model", model, "--peak", name]
        peak = subprocess.run(again, capture_output=True, text=True, check=True).stdout.split()[-1]
        print(f"{name:<24}{peak:>8} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=("demo", "llama"), default="demo")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=1, help="optimiser steps a block")
    parser.add_argument("--cpu-time", action="store_true", help="time of the process, one thread")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--peak", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        return print_peaks(options.model)
    clock = time.process_time if options.cpu_time else time.perf_counter
    if options.cpu_time:
        torch.set_num_threads(1)
    common = ["model.dropout=0", *(DEMO if options.model == "demo" else llama())]
    chosen = VARIANTS if options.peak is None else {options.peak: VARIANTS[options.peak]}
    jobs = {name: open_at_start([*common, *more]) for name, more in chosen.items()}
    runs = {name: steps_of(job, options.steps, clock) for name, job in jobs.items()}
    if options.peak:
        runs[options.peak]()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        return None
    for name, run in runs.items():
        run()
        assert jobs[name].progress.tokens == jobs["without"].progress.tokens, "not the same work"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32,", end=" ")
    print(f"{jobs['without'].progress.tokens // options.steps} tokens a step")
    compare(runs, rounds=options.rounds, unit="ms/step")
    return None


if __name__ == "__main__":
    main()
