"""Which rows are contrasted with one another, for each choice of `gather` and `batch`."""

import pytest
import torch

from ftcore_contrastive._groups import Groups
from ftcore_contrastive._loss import ABSENT

# Two ranks of two micro-batches of two rows; rank 1's last is a filler.
LABELS = [
    [torch.tensor([0, 1]), torch.tensor([1, 2])],
    [torch.tensor([0, 0]), torch.tensor([ABSENT])],
]


@pytest.mark.parametrize(
    ("gather", "whole", "own", "anchors", "count"),
    [
        # Micro-batches side by side on the ranks are one; the filler and its padding are absent.
        (True, False, [[0, 1, 0, 0], [1, 2, -1, -1]], 3, 2),
        (False, False, [[0, 1], [1, 2]], 2, 3),
        (True, True, [[0, 1, 1, 2, 0, 0, -1, -1]], 5, 1),
        (False, True, [[0, 1, 1, 2]], 4, 2),
    ],
)
def test_groups_of_rank_0(gather: bool, whole: bool, own: list[list[int]], anchors: int, count: int) -> None:
    """Its own groups, and counts over all ranks, of rows with a label."""
    groups = Groups.of(LABELS, 0, gather=gather, whole=whole)
    assert [g.labels.tolist() for g in groups.own] == own
    assert (groups.rows, groups.anchors, groups.count) == (6, anchors, count)


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_every_rank_finds_its_own_rows(gather: bool, whole: bool) -> None:
    """`rows` points at the rank's own labels; what concerns the step is the same on all ranks."""
    found = [Groups.of(LABELS, rank, gather=gather, whole=whole) for rank in (0, 1)]
    for labels, groups in zip(LABELS, found, strict=True):
        mine = [torch.cat(labels)] if whole else labels
        for one, group in zip(mine, groups.own, strict=True):
            assert group.labels[group.rows].tolist() == one.tolist()
            assert len(group.labels) % group.per_rank == 0
    assert (found[0].rows, found[0].anchors) == (found[1].rows, found[1].anchors)
