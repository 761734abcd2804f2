"""Which rows meet in a step, so that anchors have positives: pairs of one class, classes spread evenly."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["BalancedPairs"]

Ints = npt.NDArray[np.int64]


class BalancedPairs:
    """Every row once an epoch, in pairs of one class; any stretch of an epoch has the classes' shares.

    A pair stands at an even place of its step, so micro-batches of an even size never part it, however the
    step is split. Classes with an odd number of rows leave one over each epoch, another one each time; those
    pair up among themselves, and have a positive only by chance.

    Args:
        labels: class of each row, int64 [rows].
        batch_size: rows per optimiser step over all ranks; even.
        seed: the run's; the order is a function of it and of the epoch.
    """

    def __init__(self, labels: Ints, batch_size: int, seed: int) -> None:
        self.labels = np.asarray(labels)
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = -(-len(self.labels) // batch_size)
        self._epoch: tuple[int, Ints] = (-1, np.empty(0, np.int64))

    def __call__(self, epoch: int, step: int) -> Ints:
        """Rows of a step; the last of an epoch may be short."""
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._order(epoch))
        return self._epoch[1][step * self.batch_size : (step + 1) * self.batch_size]

    def _order(self, epoch: int) -> Ints:
        rng = np.random.default_rng([self.seed % 2**63, epoch])
        pairs, places, left = [], [], []
        for label in np.unique(self.labels):
            rows = rng.permutation(np.flatnonzero(self.labels == label))
            left.append(rows[len(rows) // 2 * 2 :])
            pairs.append(rows[: len(rows) // 2 * 2].reshape(-1, 2))
            places.append(_spread(len(pairs[-1]), rng))
        rest = rng.permutation(np.concatenate(left))
        pairs.append(rest[: len(rest) // 2 * 2].reshape(-1, 2))
        places.append(_spread(len(pairs[-1]), rng))
        order = np.concatenate(pairs)[np.argsort(np.concatenate(places), kind="stable")]
        return np.concatenate([order.ravel(), rest[len(rest) // 2 * 2 :]])


def _spread(count: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Places in [0, 1), one in each of `count` equal stretches."""
    return (np.arange(count) + rng.random(count)) / max(1, count)
