"""Which rows a step trains on: all of them once an epoch, by the seed, with little padding."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftcore.sampling import LengthBuckets

LENGTHS = np.random.default_rng(0).integers(1, 200, size=203)


def epoch(sampler: LengthBuckets, number: int) -> list[npt.NDArray[np.int64]]:
    """The steps of an epoch."""
    return [sampler(number, step) for step in range(sampler.steps_per_epoch)]


def padding(steps: list[npt.NDArray[np.int64]]) -> int:
    """Padded places of an epoch."""
    return sum(int((LENGTHS[rows].max() - LENGTHS[rows]).sum()) for rows in steps)


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 80), size=st.integers(1, 20), pool=st.integers(1, 9), number=st.integers(0, 3))
def test_each_row_occurs_once_an_epoch(rows: int, size: int, pool: int, number: int) -> None:
    """No row is dropped or doubled, and all batches but one are full."""
    steps = epoch(LengthBuckets(np.arange(rows), size, seed=1, pool=pool), number)
    assert sorted(np.concatenate(steps).tolist()) == list(range(rows))
    assert len(steps) == -(-rows // size)
    assert sorted(map(len, steps))[1:] == [size] * (len(steps) - 1)


def test_an_order_of_its_own_may_repeat_and_leave_out_rows() -> None:
    """`order` chooses the rows of an epoch; batches are still of similar length."""

    def order(epoch: int) -> npt.NDArray[np.int64]:
        return np.tile(np.random.default_rng(epoch).permutation(50), 2)

    sampler = LengthBuckets(LENGTHS, 16, seed=1, order=order)
    steps = epoch(sampler, 1)
    assert sampler.steps_per_epoch == 7
    assert sorted(np.concatenate(steps).tolist()) == sorted(order(1).tolist())
    assert padding(steps) < padding(np.array_split(order(1), 7)) / 2


def test_last_short_batch_is_kept() -> None:
    """203 rows in batches of 16 are 12 full ones and one of 11."""
    sizes = [len(rows) for rows in epoch(LengthBuckets(LENGTHS, 16, seed=0), 0)]
    assert sorted(sizes) == [11] + [16] * 12


def test_step_is_a_function_of_seed_epoch_and_step_alone() -> None:
    """Asked in any order, by any instance, a step has the same rows: resuming needs no state."""
    straight = LengthBuckets(LENGTHS, 16, seed=3)
    expected = {(e, s): straight(e, s).tolist() for e in range(3) for s in range(straight.steps_per_epoch)}
    other = LengthBuckets(LENGTHS, 16, seed=3)
    for key in sorted(expected, reverse=True)[::5] + sorted(expected)[::7]:
        assert other(*key).tolist() == expected[key]


def test_epochs_and_seeds_differ() -> None:
    """Which rows meet changes with the epoch and with the seed."""
    first = {frozenset(rows.tolist()) for rows in epoch(LengthBuckets(LENGTHS, 16, seed=0), 0)}
    for seed, number in ((0, 1), (1, 0)):
        steps = epoch(LengthBuckets(LENGTHS, 16, seed=seed), number)
        assert not first & {frozenset(rows.tolist()) for rows in steps}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pads_less_than_half_of_a_plain_shuffle(seed: int) -> None:
    """Sorting within pools saves most of the padding; a pool of one batch is a plain shuffle."""
    assert padding(epoch(LengthBuckets(LENGTHS, 16, seed), 0)) < 0.5 * padding(
        epoch(LengthBuckets(LENGTHS, 16, seed, pool=1), 0)
    )


def test_long_batches_are_not_all_first() -> None:
    """Batches of an epoch are shuffled: their mean lengths neither fall nor rise throughout."""
    means = [LENGTHS[rows].mean() for rows in epoch(LengthBuckets(LENGTHS, 16, seed=0, pool=100), 0)]
    falls = np.diff(means) < 0
    assert falls.any()
    assert not falls.all()
