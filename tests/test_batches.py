"""The rows of a step over ranks and micro-batches."""

from typing import Any

import numpy as np
import pytest

from ftcore import hookimpl, plugin
from ftcore.batches import make_batch, micro_batches


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 3, 5, 16])
@pytest.mark.parametrize("rows", [1, 11, 16])
def test_rows_are_dealt_out_once_in_their_order(open_tiny: Any, world: int, size: int, rows: int) -> None:
    """Micro-batch i on rank r holds rows [(i*W+r)*m, +m): against a list cut by hand."""
    job = open_tiny({"train.micro_batch_size": size})
    numbers = np.arange(31, 31 - rows, -1)
    parts = [numbers[i : i + size].tolist() for i in range(0, rows, size)]
    per_rank = []
    for rank in range(world):
        job.strategy.rank, job.strategy.world_size = rank, world
        per_rank.append(micro_batches(job, numbers, epoch=0))
    assert len({len(batches) for batches in per_rank}) == 1
    dealt = [batches[i] for i in range(len(per_rank[0])) for batches in per_rank]
    assert [batch.rows for batch in dealt if not batch.is_filler] == parts
    assert [batch.micro_batch for batch in dealt] == list(range(len(dealt)))
    fillers = [batch for batch in dealt if batch.is_filler]
    assert len(fillers) < world
    assert all(batch.rows == [31] for batch in fillers)


def test_random_numbers_of_a_row_do_not_depend_on_the_split(open_tiny: Any) -> None:
    """`rng(i)` of `collate` is the row's own: the same alone or among others, new every epoch."""

    @plugin()
    class Draws:
        @hookimpl(wrapper=True)
        def collate(self, examples: Any, rng: Any) -> Any:
            batch = yield
            batch.columns["draw"] = [rng(i).random() for i in range(len(examples))]
            return batch

    job = open_tiny({}, Draws())
    rows = job.prepared.splits["train"]
    together = make_batch(job, rows, np.array([3, 7, 5]), epoch=0).columns["draw"]
    alone = [make_batch(job, rows, np.array([r]), epoch=0).columns["draw"][0] for r in (3, 7, 5)]
    assert together == alone
    assert len(set(together)) == 3
    assert make_batch(job, rows, np.array([3]), epoch=1).columns["draw"][0] != alone[0]


def test_packs_stay_whole(open_tiny: Any) -> None:
    """A step that is a list of packs is dealt out by packs: all rows of one are in one micro-batch."""
    job = open_tiny({"train.micro_batch_size": 2})
    packs = [np.array(rows) for rows in ([3, 1], [4], [7, 5, 6], [2], [9, 8])]
    batches = micro_batches(job, packs, epoch=0)
    assert [batch.rows for batch in batches] == [[3, 1, 4], [7, 5, 6, 2], [9, 8]]
    job.strategy.rank, job.strategy.world_size = 1, 2
    second = micro_batches(job, packs, epoch=0)
    assert [(b.rows, b.is_filler) for b in second] == [([7, 5, 6, 2], False), ([3, 1], True)]
