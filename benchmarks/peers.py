"""The same model and rows, trained three ways: ftcore's step, a bare PyTorch loop, Hugging Face's Trainer."""

import dataclasses
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
import torch.nn.functional as F

from ftcore import hookimpl, plugin
from ftcore.compose import compose
from ftcore.config import OptimConfig
from ftcore.contract import Sampler
from ftcore.defaults import Defaults
from ftcore.hooks import Hooks
from ftcore.job import Job, open_job
from ftcore.loop import run_step
from ftcore.plugins import Enabled
from ftcore.screen import Screen
from ftcore.signals import StopFlag

__all__ = ["bare", "ftcore_steps", "open_quiet", "trainer"]


@plugin()
class Idle:
    """Implements every hook of the step and does nothing."""

    @hookimpl
    def on_step_start(self, batches: Any) -> None:
        """Nothing."""

    @hookimpl
    def count_units(self, batch: Any) -> dict[str, float]:
        return {}

    @hookimpl(wrapper=True)
    def forward(self) -> Any:
        return (yield)

    @hookimpl(wrapper=True)
    def compute_loss(self) -> Any:
        return (yield)

    @hookimpl
    def on_step_end(self) -> None:
        """Nothing."""


def open_quiet(overrides: list[str], idle_plugins: int = 0) -> Job:
    """A job of these overrides, silent, in a directory of its own."""
    directory = Path(tempfile.mkdtemp(prefix="ftcore-bench-"))
    cfg = compose(overrides)
    job = open_job(cfg, directory, lambda shown: Screen(False), StopFlag())
    idle = [
        Enabled(name=f"idle{i}", instance=Idle(), distribution="", version="", options={})
        for i in range(idle_plugins)
    ]
    job.hooks = Hooks(Defaults(cfg), idle, cfg)
    job.strategy.model.train()
    return job


def ftcore_steps(job: Job, steps: int, *, per_token: bool = False) -> Callable[[], float]:
    """Milliseconds a step (or trained tokens a second) of ftcore's own step, hooks and all."""
    sampler = job.hooks.build_sampler(job.prepared.splits["train"], job.cfg.train.batch_size, 0)

    def run() -> float:
        job.progress.step = 0  # every block trains on the same rows
        tokens, started = job.progress.tokens, time.perf_counter()
        for _ in range(steps):
            run_step(job, sampler, 10**6)
            job.progress.step += 1
            job.hooks.on_step_end(job.state(10**6))
        seconds = time.perf_counter() - started
        return (job.progress.tokens - tokens) / seconds if per_token else seconds / steps * 1000

    return run


def bare(job: Job, steps: int) -> Callable[[], float]:
    """The same steps by hand: same rows, same padding, same optimiser, nothing else.

    First checks that it is the same: one gradient norm for the first step's rows, dropout off.
    """
    model, rows = job.strategy.model, job.prepared.splits["train"]
    vectors = [p for p in model.parameters() if p.ndim < 2]  # not decayed, as in the other two loops
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=1e-5, fused=True
    )
    sampler: Sampler = job.hooks.build_sampler(rows, job.cfg.train.batch_size, 0)

    def batch(numbers: Any) -> tuple[torch.Tensor, ...]:
        examples = [rows[int(n)] for n in numbers]
        longest = max(len(e["input_ids"]) for e in examples)
        ids = np.full((len(examples), longest), 0, np.int64)
        mask = np.zeros((len(examples), longest), np.int64)
        for i, e in enumerate(examples):
            ids[i, : len(e["input_ids"])] = e["input_ids"]
            mask[i, : len(e["input_ids"])] = 1
        labels = torch.tensor([e["labels"] for e in examples])
        return tuple(
            x.to(job.strategy.device) for x in (torch.from_numpy(ids), torch.from_numpy(mask), labels)
        )

    model.eval()
    ids, mask, labels = batch(sampler(0, 0))
    F.cross_entropy(model(input_ids=ids, attention_mask=mask).logits, labels).backward()
    by_hand = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    optimizer.zero_grad()
    at_rate_zero = dataclasses.replace(job, cfg=dataclasses.replace(job.cfg, optim=OptimConfig(lr=0.0)))
    ours = float(run_step(at_rate_zero, sampler, 10**6)["grad_norm"])
    assert math.isclose(ours, by_hand, rel_tol=1e-5), (ours, by_hand)
    model.train()

    def run() -> float:
        started = time.perf_counter()
        for position in range(steps):
            epoch, within = divmod(position, sampler.steps_per_epoch)
            ids, mask, labels = batch(sampler(epoch, within))
            loss = F.cross_entropy(model(input_ids=ids, attention_mask=mask).logits, labels)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            assert math.isfinite(float(norm))
            optimizer.step()
            optimizer.zero_grad()
        return (time.perf_counter() - started) / steps * 1000

    return run


def trainer(job: Job, steps: int, *, per_token: bool = False) -> Callable[[], float]:
    """The same model and rows by transformers' Trainer with its defaults (random order, padded batches)."""
    import transformers
    from datasets import Dataset

    rows = job.prepared.splits["train"]
    data = Dataset.from_list(
        [
            {"input_ids": r["input_ids"].tolist(), "labels": r["labels"]}
            for r in (rows[i] for i in range(len(rows)))
        ]
    )
    times: list[float] = []

    class Watch(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter())

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter())

    collator = transformers.DataCollatorWithPadding(job.tokenizer)
    counted = 0

    def collate(examples: Any) -> Any:
        nonlocal counted
        counted += sum(len(e["input_ids"]) for e in examples)
        return collator(examples)

    def run() -> float:
        nonlocal counted
        times.clear()
        counted = 0
        arguments = transformers.TrainingArguments(
            output_dir=str(job.run_dir / "hf"),
            per_device_train_batch_size=job.cfg.train.batch_size,
            max_steps=steps,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            log_level="error",
            use_cpu=job.strategy.device.type == "cpu",
            logging_steps=10**6,
            seed=int(time.time()) % 10_000,
        )
        transformers.Trainer(
            model=job.strategy.model,
            args=arguments,
            train_dataset=data,
            data_collator=collate,
            callbacks=[Watch()],
        ).train()
        seconds = times[-1] - times[0]
        return counted / seconds if per_token else seconds / steps * 1000

    return run
