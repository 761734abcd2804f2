"""Packing: against brute force, and no row lost or met twice."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftcore_instruct._packing import PackSampler, best_fit_decreasing, flatten, padded

SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=8)


def fewest(lengths: Sequence[int], capacity: int) -> int:
    """The smallest number of packs there is, by trying every way."""

    @cache
    def best(rest: tuple[int, ...], space: tuple[int, ...]) -> int:
        if not rest:
            return len(space)
        fits = {s for s in space if s >= rest[0]}
        answers = [best(rest[1:], (*space, capacity - rest[0]))]
        for s in fits:
            left = list(space)
            left[left.index(s)] -= rest[0]
            answers.append(best(rest[1:], tuple(sorted(left))))
        return min(answers)

    return best(tuple(sorted(lengths, reverse=True)), ())


def naive(lengths: Sequence[int], capacity: int) -> int:
    """Best fit decreasing by its definition: look at every pack for each row."""
    space: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [s for s in space if s >= length]
        if fits:
            space.remove(min(fits))
            space.append(min(fits) - length)
        else:
            space.append(capacity - length)
    return len(space)


def packs_of(lengths: Any, capacity: int) -> list[Any]:
    """The rows of each pack."""
    rows, starts = best_fit_decreasing(np.asarray(lengths, np.int64), capacity)
    return np.split(rows, starts[1:-1]) if len(starts) > 1 else []


@settings(max_examples=80, deadline=None)
@given(SIZES)
def test_packs_are_best_fit_decreasing_and_near_the_optimum(lengths: list[int]) -> None:
    """Every row is in one pack, none over-full; as many as by the definition, within 11/9 of the fewest."""
    packs = packs_of(lengths, 12)
    assert sorted(np.concatenate(packs).tolist()) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in pack) <= 12 for pack in packs)
    assert len(packs) == naive(lengths, 12)
    assert len(packs) <= 11 / 9 * fewest(lengths, 12) + 6 / 9


def test_packs_of_many_rows_are_full() -> None:
    """Log-normal lengths: within 1.001 of the lower bound, total tokens over capacity."""
    lengths = np.random.default_rng(0).lognormal(5, 0.8, 20_000).astype(np.int64).clip(4, 2048)
    bound = -(-int(lengths.sum()) // 2048)
    assert len(packs_of(lengths, 2048)) <= 1.001 * bound


@pytest.mark.parametrize("lengths", [[0, 3], [13]])
def test_rows_that_fit_no_pack_are_refused(lengths: list[int]) -> None:
    """An empty row, or one longer than a pack, is an error: nothing is dropped."""
    with pytest.raises(ValueError, match=r"must be in 1\.\.12"):
        packs_of(lengths, 12)


def test_no_rows_make_no_packs() -> None:
    """An empty epoch has no packs."""
    assert packs_of([], 12) == []


def test_every_row_of_every_epoch_is_in_one_step() -> None:
    """Also where epochs differ in rows and packs; a step is a function of (seed, epoch, step)."""
    lengths = np.random.default_rng(0).integers(1, 40, 200)

    def order(epoch: int) -> Any:
        return np.random.default_rng(epoch).permutation(200)[: 150 - epoch]

    sampler, again = (PackSampler(order, lengths, 64, batch_size=4, seed=1) for _ in range(2))
    compositions = []
    for epoch in (0, 3, 1):
        steps = [sampler(epoch, step) for step in range(sampler.steps_per_epoch)]
        packs = [pack.tolist() for step in steps for pack in step]
        assert sorted(r for pack in packs for r in pack) == sorted(order(epoch).tolist())
        assert all(lengths[pack].sum() <= 64 for pack in packs)
        assert all(3 <= len(step) <= 5 for step in steps[:-1])
        compositions.append({tuple(sorted(pack)) for pack in packs})
        last = again(epoch, sampler.steps_per_epoch - 1)
        assert [p.tolist() for p in last] == [p.tolist() for p in steps[-1]]
    assert len(compositions[0] & compositions[1]) < len(compositions[0]) / 4, "the same rows meet each epoch"


ROWS = [
    {"row": 7, "input_ids": np.arange(4), "labels": np.array([5, -100, 2, 3]), "source": 0, "task": "a"},
    {"row": 9, "input_ids": np.arange(2), "labels": np.array([-100, 1]), "source": 2, "task": "b"},
]


def test_flat_rows_of_a_decoder() -> None:
    """Positions start anew, and the first token of a row is no label; numbers and texts are columns."""
    batch = flatten(ROWS, decoder=True)
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3, 0, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 2, 3, -100, 1]]
    assert batch["kept"].tolist() == [1, 2, 4]
    assert batch.columns == {
        "source": [0, 2],
        "task": ["a", "b"],
        "length": [4, 2],
        "target_length": [4, 2],
    }


def test_padded_rows_hold_the_same() -> None:
    """Without packing: tokens padded, `kept` in any row, and no stray tensors for the model."""
    batch = padded(ROWS, True, pad_token_id=0)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "kept"}
    assert batch["labels"].tolist() == [[5, -100, 2, 3], [-100, 1, -100, -100]]
    assert batch["kept"].tolist() == [0, 1, 2]
    assert batch.columns == {"source": [0, 2], "task": ["a", "b"]}
