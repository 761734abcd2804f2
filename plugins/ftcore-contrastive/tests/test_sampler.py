"""The balanced sampler: nothing lost, pairs whole, classes in proportion, an order by seed and epoch."""

from collections import Counter

import numpy as np
import pytest

from ftcore_contrastive._sampler import BalancedPairs

LABELS = np.repeat([0, 1, 2, 3], [41, 26, 13, 1])


def epoch_of(sampler: BalancedPairs, epoch: int = 0) -> list[list[int]]:
    return [sampler(epoch, step).tolist() for step in range(sampler.steps_per_epoch)]


@pytest.mark.parametrize("batch_size", [2, 8, 16, 100])
def test_every_row_occurs_once_an_epoch(batch_size: int) -> None:
    """None is dropped and none repeated, whatever the size; only the last step is short."""
    steps = epoch_of(BalancedPairs(LABELS, batch_size, 0))
    assert sorted(row for step in steps for row in step) == list(range(81))
    assert {len(step) for step in steps[:-1]} <= {batch_size}


@pytest.mark.parametrize("micro", [2, 4, 8])
def test_anchors_have_positives_but_for_what_a_class_leaves_over(micro: int) -> None:
    """In micro-batches of any even size; at most one row a class and epoch may stand alone."""
    steps = epoch_of(BalancedPairs(LABELS, 16, 0))
    lonely = []
    for step in steps:
        for start in range(0, len(step), micro):
            labels = LABELS[step[start : start + micro]]
            lonely += [label for label in labels if Counter(labels.tolist())[label] == 1]
    assert all(count <= 1 for count in Counter(lonely).values())


def test_each_step_has_the_classes_in_proportion() -> None:
    """Half a pair off the exact share and the chance of a boundary, no more: no step of one class."""
    labels = np.repeat([0, 1], [64, 32])
    counts = [np.bincount(labels[step], minlength=2) for step in epoch_of(BalancedPairs(labels, 24, 0))]
    assert all(abs(int(count[0]) - 16) <= 4 for count in counts)


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    """Any step can be asked for by itself, as a resumed run does; epochs and seeds differ."""
    whole = epoch_of(BalancedPairs(LABELS, 16, 0), 1)
    assert BalancedPairs(LABELS, 16, 0)(1, 3).tolist() == whole[3]
    assert epoch_of(BalancedPairs(LABELS, 16, 0)) != whole
    assert epoch_of(BalancedPairs(LABELS, 16, -1), 1) != whole
