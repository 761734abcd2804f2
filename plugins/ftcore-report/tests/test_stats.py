"""The statistics against brute force, closed forms and simulation."""

import math
from itertools import combinations, product

import numpy as np
import pytest
from scipy import stats

from ftcore_report import _stats

RNG = np.random.default_rng(5)


def brute_flips(d: np.ndarray) -> float:
    means = [
        np.mean([s * x for s, x in zip(signs, d, strict=True)]) for signs in product((1, -1), repeat=len(d))
    ]
    return float(np.mean([abs(m) >= abs(np.mean(d)) - 1e-12 for m in means]))


def brute_deals(a: np.ndarray, b: np.ndarray) -> float:
    pool, observed, far = [*a, *b], abs(np.mean(a) - np.mean(b)), []
    for picked in combinations(range(len(pool)), len(a)):
        ours = [pool[i] for i in picked]
        theirs = [x for i, x in enumerate(pool) if i not in picked]
        far.append(abs(np.mean(ours) - np.mean(theirs)) >= observed - 1e-12)
    return float(np.mean(far))


@pytest.mark.parametrize("n", [6, 7, 10])
def test_sign_flips_equal_the_enumeration(n: int) -> None:
    """Six pairs and more: labels are swapped within pairs; ties count as far as what was seen."""
    a, b = RNG.normal(0.4, 1, n).round(1), RNG.normal(0, 1, n).round(1)
    assert _stats.permutation(a, b, paired=True) == pytest.approx(brute_flips(a - b), abs=1e-12)


@pytest.mark.parametrize(("n", "m", "paired"), [(5, 5, True), (3, 4, False), (6, 6, False)])
def test_deals_equal_the_enumeration(n: int, m: int, paired: bool) -> None:
    """Fewer pairs, or none: runs are dealt to the arms anew."""
    a, b = RNG.normal(1, 1, n).round(1), RNG.normal(0, 1, m).round(1)
    assert _stats.permutation(a, b, paired=paired) == pytest.approx(brute_deals(a, b), abs=1e-12)


def test_six_pairs_do_not_fall_behind_five() -> None:
    """At a level that swaps within six pairs can't reach, runs are dealt: more seeds never claim less."""
    smallest = [
        _stats.permutation(np.arange(n) + 9.0, np.arange(n) / 9, paired=True, alpha=0.05 / 3) for n in (5, 6)
    ]
    assert smallest == pytest.approx([2 / 252, 2 / 924])


@pytest.mark.parametrize(("n", "paired"), [(13, True), (8, False)])
def test_drawn_relabellings_agree_with_the_enumeration(n: int, paired: bool) -> None:
    """Above 4,096 relabellings, 9,999 are drawn: within four standard errors of the exact p."""
    a, b = RNG.normal(0.7, 1, n), RNG.normal(0, 1, n)
    exact = brute_flips(a - b) if paired else brute_deals(a, b)
    error = 4 * math.sqrt(exact * (1 - exact) / 9_999) + 1e-4
    assert _stats.permutation(a, b, paired=paired) == pytest.approx(exact, abs=error)


def test_an_extreme_p_is_never_zero() -> None:
    """The observed labelling is among those counted, drawn or enumerated."""
    assert _stats.permutation(np.arange(20) + 100.0, np.arange(20.0), paired=True) == 1e-4
    assert _stats.permutation(np.full(8, 2.0), np.full(8, 1.0), paired=True) == 2 / 2**8


@pytest.mark.parametrize("n", [3, 5])
def test_figures_far_from_zero_count_the_observed_labelling(n: int) -> None:
    """A small difference between large figures (perplexities) has the p that it has near zero."""
    for _ in range(50):
        low = RNG.normal(size=n)
        high = low.max() + 0.1 + RNG.random(n)
        p = _stats.permutation(3e4 + high, 3e4 + low, paired=False)
        assert p == pytest.approx(2 / math.comb(2 * n, n))


def test_the_variance_is_that_of_resampling_seeds_and_rows_crossed() -> None:
    """The closed form is the pigeonhole bootstrap's variance, but for n - 1 in place of n."""
    seeds, rows = 12, 40
    table = RNG.normal(size=(seeds, 1)) * 0.6 + RNG.normal(size=rows) + RNG.normal(size=(seeds, rows))
    runs = RNG.multinomial(seeds, [1 / seeds] * seeds, 40_000) / seeds
    columns = RNG.multinomial(rows, [1 / rows] * rows, 40_000) / rows
    drawn = ((runs @ table) * columns).sum(axis=1).var()
    se, *_ = _stats.crossed_variance([table])
    # n / (n - 1) of each part: between 1 and the product of both.
    assert se**2 / drawn * 1.02 >= 1
    assert se**2 / drawn / 1.02 <= seeds / (seeds - 1) * rows / (rows - 1)


def test_without_rows_it_is_the_paired_t_interval() -> None:
    """A metric that is no mean over rows: Student's interval of the seeds' differences."""
    a, b = RNG.normal(1, 1, (9, 1)), RNG.normal(0, 1, (9, 1))
    found = _stats.interval(_stats.difference(a, b, paired=True, rows=False), 0.05)
    wanted = stats.ttest_rel(a[:, 0], b[:, 0]).confidence_interval()
    assert found == pytest.approx((wanted.low, wanted.high))


def test_unpaired_without_rows_it_is_welchs_interval() -> None:
    """Arms with other seeds: Welch's interval."""
    a, b = RNG.normal(1, 2, (9, 1)), RNG.normal(0, 1, (5, 1))
    found = _stats.interval(_stats.difference(a, b, paired=False, rows=False), 0.05)
    wanted = stats.ttest_ind(a[:, 0], b[:, 0], equal_var=False).confidence_interval()
    assert found == pytest.approx((wanted.low, wanted.high))


@pytest.mark.parametrize("paired", [True, False])
def test_the_difference_does_not_depend_on_the_order_of_runs_and_rows(paired: bool) -> None:
    """Neither value nor p nor standard error."""
    a, b = RNG.normal(1, 1, (7, 20)), RNG.normal(0, 1, (7, 20))
    runs, rows = RNG.permutation(7), RNG.permutation(20)
    one = _stats.difference(a, b, paired=paired, rows=True)
    other = _stats.difference(a[runs][:, rows], b[runs][:, rows], paired=paired, rows=True)
    assert (other.value, other.se, other.p) == pytest.approx((one.value, one.se, one.p))
    back = _stats.difference(b, a, paired=paired, rows=True)
    assert (back.value, back.se, back.p) == pytest.approx((-one.value, one.se, one.p))


@pytest.mark.parametrize(("seeds", "rows"), [(3, 50), (5, 200), (12, 50)])
def test_intervals_hold_the_truth_often_enough(seeds: int, rows: int) -> None:
    """95% intervals of 1,000 simulated sweeps over new seeds and new rows: at least 94% hold it."""
    held, rng = 0, np.random.default_rng(seeds)
    for _ in range(1000):
        row = rng.normal(size=rows) * 0.5
        table = 0.3 + rng.normal(size=(seeds, 1)) * 0.1 + row + rng.normal(size=(seeds, rows)) * 0.7
        se, df, *_ = _stats.crossed_variance([table])
        held += abs(table.mean() - 0.3) <= stats.t.ppf(0.975, df) * se
    assert held >= 940


def test_holm_is_the_textbook_s() -> None:
    """Adjusted p rise with p, never fall below it, and the k-th smallest is tested at alpha / (m - k + 1)."""
    adjusted, shares = zip(*_stats.holm([0.01, 0.04, 0.03, 0.005]), strict=True)
    assert adjusted == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert shares == pytest.approx((1 / 3, 1, 1 / 2, 1 / 4))
    assert _stats.holm([]) == []


def test_one_seed_claims_nothing() -> None:
    """A value, but neither interval nor p, however many rows."""
    d = _stats.difference(np.ones((1, 500)), np.zeros((1, 500)), paired=True, rows=True)
    assert (d.value, d.se, d.p, _stats.interval(d, 0.05), _stats.needed(d, 0.05)) == (
        1,
        None,
        None,
        None,
        None,
    )


@pytest.mark.parametrize("effect", [0.5, 1.0])
def test_so_many_seeds_as_said_find_the_difference(effect: float) -> None:
    """Planned from the true effect and spread, 80% of simulated sweeps of that size give p < 0.05."""
    plan = _stats.Difference(
        value=effect, runs=(3, 3), rows=0, paired=True, se=1.0, seed_variance=1.0, row_variance=0.0
    )
    need = _stats.needed(plan, 0.05)
    assert need is not None
    assert need.seeds is not None
    rng = np.random.default_rng(1)
    draws = rng.normal(effect, 1, (300, need.seeds))
    found = [_stats.permutation(d, d * 0, paired=True) < 0.05 for d in draws]
    assert 0.72 <= np.mean(found) <= 0.9


def test_where_rows_are_the_limit_rows_are_asked_for() -> None:
    """A spread over rows that no number of seeds averages out; twice the effect takes a quarter."""
    plan = {
        "runs": (5, 5),
        "rows": 100,
        "paired": True,
        "se": 0.1,
        "seed_variance": 0.001,
        "row_variance": 0.01,
    }
    need = _stats.needed(_stats.Difference(value=0.1, **plan), 0.05)
    assert need is not None
    assert need.seeds is None
    assert need.rows == math.ceil(100 * 0.01 / (0.1 / (stats.norm.ppf(0.975) + stats.norm.ppf(0.8))) ** 2)


def test_equal_arms_are_not_different() -> None:
    """No spread and no difference: p 1, an interval of no width at 0, nothing to plan."""
    d = _stats.difference(np.ones((6, 10)), np.ones((6, 10)), paired=True, rows=True)
    assert (d.p, _stats.interval(d, 0.05), _stats.needed(d, 0.05)) == (1, (0, 0), None)
