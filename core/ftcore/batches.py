"""The rows of a step, as micro-batches: the same rows however the step is split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ftcore.contract import Batch
from ftcore.seeding import derive

if TYPE_CHECKING:
    from ftcore.job import Job

__all__ = ["make_batch", "micro_batches"]


def micro_batches(
    job: Job, rows: np.ndarray[Any, Any] | Sequence[np.ndarray[Any, Any]], epoch: int
) -> list[Batch]:
    """This rank's micro-batches of a step.

    Micro-batch i on rank r (of W) holds rows (or packs of rows) [(i·W+r)·m, +m) of the step. All ranks get
    equally many; where the rows run out, a filler of one, which counts for nothing, takes the place.
    """
    world, size = job.strategy.world_size, job.cfg.micro_batch_size(job.strategy.world_size)
    count = -(-len(rows) // (size * world))
    batches = []
    for i in range(count):
        number = i * world + job.strategy.rank
        part = rows[number * size : (number + 1) * size]
        batch = make_batch(job, job.prepared.splits["train"], _flat(part if len(part) else rows[:1]), epoch)
        batch.micro_batch = number
        batch.is_filler = len(part) == 0
        batches.append(batch)
    return batches


def _flat(rows: np.ndarray[Any, Any] | Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    return rows if isinstance(rows, np.ndarray) else np.concatenate(rows)


def make_batch(job: Job, source: Any, rows: np.ndarray[Any, Any], epoch: int) -> Batch:
    """Collate rows of a split to one batch on the CPU."""
    numbers = rows.tolist()
    seed = job.cfg.seed

    def rng(i: int) -> np.random.Generator:
        return np.random.default_rng(derive(seed, "collate", epoch, numbers[i]))

    batch = job.hooks.collate([source[row] for row in numbers], job.tokenizer, rng)
    batch.rows = numbers
    return batch
