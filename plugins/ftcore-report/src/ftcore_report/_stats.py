"""The statistics of a comparison: arrays in, figures out. Nothing here knows what a run is.

A table holds one score per run and test row, fp64 [runs, rows]; a metric that is no mean over rows is a
table of one column. All figures are of `arm - baseline`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit

__all__ = [
    "Difference",
    "Need",
    "crossed_variance",
    "difference",
    "holm",
    "interval",
    "needed",
    "permutation",
]

Array = NDArray[np.float64]

EXACT = 2**12  # relabellings that are enumerated; above, so many are drawn:
DRAWS = 9_999
POWER = 0.8


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How an arm differs from the baseline.

    Attributes:
        value: mean of the arm minus mean of the baseline, in the metric's unit.
        runs: of the arm and of the baseline.
        rows: test rows that were resampled; 0 where only seeds were.
        paired: by seed.
        se: standard error; None with a single run in either arm, like `df` and `p`.
        df: degrees of freedom of `se` (Satterthwaite).
        p: two-sided, of this comparison alone.
        seed_variance: of the difference with one run an arm: what more seeds average out.
        row_variance: of the difference with endlessly many seeds: what only more test rows average out.
    """

    value: float
    runs: tuple[int, int]
    rows: int
    paired: bool
    se: float | None = None
    df: float = math.nan
    p: float | None = None
    seed_variance: float = math.nan
    row_variance: float = math.nan


def difference(arm: Array, baseline: Array, *, paired: bool, rows: bool, alpha: float = 0.05) -> Difference:
    """Compare two tables [runs, rows]; where `paired`, their runs correspond.

    Args:
        rows: whether the columns are test rows, the same in both tables, to be resampled too.
        alpha: what p has to get to, see `permutation`.
    """
    if paired and len(arm) != len(baseline):
        raise ValueError(f"paired tables need equally many runs, got {len(arm)} and {len(baseline)}")
    value = float(arm.mean() - baseline.mean())
    found: dict[str, Any] = {
        "value": value,
        "runs": (len(arm), len(baseline)),
        "rows": arm.shape[1] if rows else 0,
    }
    if min(len(arm), len(baseline)) < 2:
        return Difference(**found, paired=paired)
    signed = [arm - baseline] if paired else [arm, -baseline]
    se, df, seed_variance, row_variance = crossed_variance(signed)
    return Difference(
        **found,
        paired=paired,
        se=se,
        df=df,
        p=permutation(arm.mean(axis=1), baseline.mean(axis=1), paired=paired, alpha=alpha),
        seed_variance=seed_variance,
        row_variance=row_variance,
    )


def crossed_variance(signed: Sequence[Array]) -> tuple[float, float, float, float]:
    """Standard error, degrees of freedom, seed variance and row variance of the sum of the tables' means.

    Runs are resampled within each table, rows crossed with them and in common (the pigeonhole bootstrap of
    Owen, 2007). Its variance is taken in closed form, with n - 1 for n: of S runs and N rows it is
    (MS_runs + MS_rows + MS_rest) / (S N) by the two-way analysis of variance, a little above the truth.

    Args:
        signed: the differences by run [S, N], or the arm's table and minus the baseline's.
    """
    rows = signed[0].shape[1]
    by_row = np.sum([t.mean(axis=0) for t in signed], axis=0)  # [N]
    of_rows = float(by_row.var(ddof=1)) / rows if rows > 1 else 0.0
    parts: list[tuple[float, float]] = [(of_rows, max(rows - 1, 1))]
    seeds = rest = 0.0
    for table in signed:
        runs = len(table)
        of_runs = float(table.mean(axis=1).var(ddof=1)) / runs
        residual = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
        df = (runs - 1) * max(rows - 1, 1)
        of_rest = float((residual**2).sum()) / df / (runs * rows) if rows > 1 else 0.0
        parts += [(of_runs, runs - 1), (of_rest, df)]
        seeds, rest = seeds + of_runs * runs, rest + of_rest
    total = sum(v for v, _ in parts)
    spread = sum(v * v / df for v, df in parts)
    df = total * total / spread if spread else 1e9
    return math.sqrt(total), df, seeds, max(0.0, of_rows - rest)


def permutation(arm: Array, baseline: Array, *, paired: bool, alpha: float = 0.05) -> float:
    """Two-sided p of the difference of means over relabellings of the runs.

    The labels are swapped within pairs where there are enough pairs for that to reach `alpha` (six for 0.05).
    With fewer, and where nothing is paired, runs are dealt out to the arms anew: for pairs that resemble
    each other this errs towards no difference. Up to 4,096 relabellings are enumerated; of more, 9,999
    are drawn and the observed one counted in (Phipson and Smyth, 2010).

    Args:
        arm, baseline: one figure a run.
    """
    pool, n = np.concatenate([arm, baseline]), len(arm)
    # Rounding is of the size of the figures, not of their difference: equal means may differ by so much.
    observed = abs(arm.mean() - baseline.mean()) - 1e-12 * np.abs(pool).max()
    if paired and 2 / 2**n <= alpha:
        return _share(observed, np.abs(_signs(n) @ (arm - baseline)) / n, 2**n <= EXACT)
    chosen = _deals(len(pool), n)  # [relabellings, runs], 1 where a run is dealt to the arm
    means = chosen @ pool / n - (1 - chosen) @ pool / (len(pool) - n)
    return _share(observed, np.abs(means), comb(len(pool), n) <= EXACT)


def _signs(n: int) -> Array:
    if 2**n <= EXACT:
        return np.array(list(product((1.0, -1.0), repeat=n)))
    return np.random.default_rng(0).choice((1.0, -1.0), size=(DRAWS, n))


def _deals(n: int, first: int) -> Array:
    if comb(n, first) <= EXACT:
        chosen = np.zeros((comb(n, first), n))
        for row, picked in zip(chosen, combinations(range(n), first), strict=True):
            row[list(picked)] = 1
        return chosen
    one = np.arange(n) < first
    return np.random.default_rng(0).permuted(np.tile(one, (DRAWS, 1)), axis=1).astype(float)


def _share(observed: float, others: Array, exact: bool) -> float:
    """Share of relabellings at least as far from 0, equal ones counted in."""
    as_far = int((others >= observed).sum())
    return as_far / len(others) if exact else (as_far + 1) / (len(others) + 1)


def holm(p: Sequence[float]) -> list[tuple[float, float]]:
    """Adjusted p of each comparison, and the level at which Holm (1979) tests it, as a share of alpha."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    found, largest = [(0.0, 0.0)] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, p[i] * (len(p) - rank)))
        found[i] = (largest, 1 / (len(p) - rank))
    return found


def interval(d: Difference, alpha: float) -> tuple[float, float] | None:
    """The 1 - `alpha` interval of the difference, by Student's t; None with a single run in an arm."""
    if d.se is None:
        return None
    half = float(stdtrit(d.df, 1 - alpha / 2)) * d.se
    return d.value - half, d.value + half


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a difference of the size seen would take to be found: seeds in all, or test rows in all."""

    seeds: int | None = None
    rows: int | None = None


def needed(d: Difference, alpha: float) -> Need | None:
    """About how many seeds an arm (in all) give 80% power at the effect and variance seen.

    Normal approximation, with Guenther's (1981) term for the estimated variance, and never so few that
    the permutation test can't reach `alpha`. Where even endlessly many seeds would not do, the test
    rows that would, of the same kind. None where nothing can be said: no variance known, or no effect.
    """
    if d.se is None or d.value == 0:
        return None
    z = float(ndtri(1 - alpha / 2))
    allowed = (d.value / (z + float(ndtri(POWER)))) ** 2
    if allowed <= d.row_variance:
        return Need(rows=math.ceil(d.rows * d.row_variance / allowed))
    seeds = d.seed_variance / (allowed - d.row_variance) + z * z / (2 if d.paired else 4)
    return Need(seeds=max(math.ceil(seeds), _fewest(alpha)))


def _fewest(alpha: float) -> int:
    """Fewest runs an arm with which `permutation` can reach `alpha`."""
    n = 2
    while 2 / comb(2 * n, n) > alpha:
        n += 1
    return n
