"""Which rows make up each optimiser step: shuffled, of similar length, a function of (seed, epoch, step)."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ftcore.seeding import derive

__all__ = ["LengthBuckets"]

Ints = npt.NDArray[np.int64]


class LengthBuckets:
    """Shuffles an epoch, sorts within pools of a few batches by length, and shuffles the batches.

    Rows of a batch are then of similar length, so that little is padding, while which rows meet
    changes every epoch. Each row occurs once an epoch; the last batch may be short, never dropped.

    Args:
        lengths: tokens of each row, int.
        batch_size: rows per optimiser step.
        pool: batches per pool; 1 is a plain shuffle.
        order: the rows of an epoch, in random order, as a function of the epoch, always equally many.
            Default: a permutation of all rows.
    """

    def __init__(
        self,
        lengths: npt.NDArray[np.int64],
        batch_size: int,
        seed: int,
        pool: int = 8,
        order: Callable[[int], Ints] | None = None,
    ) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.pool = pool
        self.order = order
        self.steps_per_epoch = -(-(len(order(0)) if order else len(self.lengths)) // batch_size)
        self._epoch: tuple[int, list[Ints]] = (-1, [])

    def __call__(self, epoch: int, step: int) -> Ints:
        """Rows of a step, longest first."""
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._order(epoch))
        return self._epoch[1][step]

    def _order(self, epoch: int) -> list[Ints]:
        rng = np.random.default_rng(derive(self.seed, "order", epoch))
        rows = self.order(epoch) if self.order else rng.permutation(len(self.lengths))
        size = self.pool * self.batch_size
        batches: list[Ints] = []
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            # Longest first: a step that does not fit in memory fails early, within the pool.
            part = part[np.argsort(-self.lengths[part], kind="stable")]
            batches += [part[i : i + self.batch_size] for i in range(0, len(part), self.batch_size)]
        return [batches[i] for i in rng.permutation(len(batches))]
