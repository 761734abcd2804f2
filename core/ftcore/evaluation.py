"""Predictions of a split, over all ranks, and the metrics of them: whole, by group, worst group."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ftcore.batches import make_batch

if TYPE_CHECKING:
    from ftcore.job import Job

__all__ = ["averaged", "predict", "score"]


def score(job: Job, predictions: Mapping[str, Sequence[Any]], split: str, prefix: str) -> dict[str, float]:
    """Metrics of a split's predictions under `prefix/`, the same on all ranks."""
    metrics = _metrics(job, predictions, split) if job.strategy.rank == 0 else {}
    return {f"{prefix}/{k}": v for k, v in job.strategy.broadcast(metrics).items()}


@contextlib.contextmanager
def averaged(job: Job) -> Iterator[None]:
    """The weights that `eval_weights` gives (an average), to evaluate and to save; put back afterwards."""
    if not job.hooks.implemented("eval_weights"):
        yield
        return
    shards = job.strategy.shards()
    values = job.hooks.eval_weights(shards) or {}
    kept = {s.name: s.value.clone() for s in shards if s.name in values}
    for shard in shards:
        if shard.name in values:
            shard.value.copy_(values[shard.name])
    job.strategy.sync_shards()
    try:
        yield
    finally:
        for shard in shards:
            if shard.name in kept:
                shard.value.copy_(kept[shard.name])
        job.strategy.sync_shards()


def predict(job: Job, split: str) -> dict[str, list[Any]] | None:
    """Columns of predictions in row order, each rank's share gathered; None where asked to stop."""
    model = job.strategy.model
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return _predict(job, split)
    finally:
        model.train(was_training)


def _predict(job: Job, split: str) -> dict[str, list[Any]] | None:
    rows, strategy = job.prepared.splits[split], job.strategy
    order = np.argsort(-rows.lengths, kind="stable")
    size = job.cfg.micro_batch_size(strategy.world_size)
    chunks = [order[i : i + size] for i in range(0, len(order), size)]
    per_rank = -(-len(chunks) // strategy.world_size)
    mine: dict[int, dict[str, Any]] = {}
    for i in range(per_rank):
        job.screen.tick(f"{split} {i + 1}/{per_rank}")
        if any(strategy.all_sum([job.stop.code])):
            return None
        number = i * strategy.world_size + strategy.rank
        # Ranks with nothing left run the first batch again: all make equally many passes.
        chunk = chunks[number] if number < len(chunks) else chunks[0]
        batch = make_batch(job, rows, chunk, epoch=0).to(strategy.device)
        own = {} if split == "predict" else batch.columns  # of new rows the answers alone
        answer = {**own, **job.hooks.predict(strategy.model, batch, job.tokenizer)}
        if number < len(chunks):
            for j, row in enumerate(chunk.tolist()):
                mine[row] = {name: values[j] for name, values in answer.items()}
    table: dict[int, dict[str, Any]] = {}
    for part in strategy.gather(mine):
        table |= part
    ordered = [table[row] for row in range(len(rows))]
    return {name: [r[name] for r in ordered] for name in ordered[0]}


def _metrics(job: Job, predictions: Mapping[str, Sequence[Any]], split: str) -> dict[str, float]:
    """Metrics of all rows; where the data has a group column, of each group and the worst one."""
    metrics = job.hooks.evaluate(predictions, job.prepared.labels, split)
    groups = predictions.get("group")
    if groups is None:
        return metrics
    name = job.metric.lstrip("-").rpartition("/")[2]
    by_group = {}
    for group in sorted(set(groups)):
        picked = [i for i, g in enumerate(groups) if g == group]
        part = {column: [values[i] for i in picked] for column, values in predictions.items()}
        by_group[group] = job.hooks.evaluate(part, job.prepared.labels, split)
    flat = {f"group/{g}/{k}": v for g, part in by_group.items() for k, v in part.items()}
    values = [m[name] for m in by_group.values() if name in m]
    if values:
        flat[f"worst_group/{name}"] = max(values) if job.metric.startswith("-") else min(values)
    return {**metrics, **flat}
