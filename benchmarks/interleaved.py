"""Compare timings on a noisy machine: interleaved pairs, alternating order, with an A/A control.

Each round runs every variant once, forwards and then backwards in turn. What counts is the median over
rounds of the ratio to the baseline of the same round, with a bootstrap interval. The baseline runs twice
a round; where its ratio to itself is off by more than 2%, the run says that it is too noisy to tell.
"""

import random
import statistics
from collections.abc import Callable, Mapping

__all__ = ["compare"]

Variant = Callable[[], float]


def compare(variants: Mapping[str, Variant], *, rounds: int = 15, unit: str = "ms", digits: int = 3) -> None:
    """Time variants, each of which returns one figure, and print a table; the first is the baseline."""
    names = list(variants)
    baseline, control = names[0], f"{names[0]} (again)"
    runs = {**variants, control: variants[baseline]}
    for run in runs.values():
        run()  # warm up
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        order = list(runs)
        random.Random(number).shuffle(order)
        for name in order:
            found[name].append(runs[name]())
    for name, values in found.items():
        ratios = [v / b for v, b in zip(values, found[baseline], strict=True)]
        low, high = _interval(ratios)
        difference = statistics.median(v - b for v, b in zip(values, found[baseline], strict=True))
        print(
            f"{name:<24}{statistics.median(values):10.{digits}f} {unit}"
            f"   ratio {statistics.median(ratios):.3f} [{low:.3f}, {high:.3f}]"
            f"   difference {difference:+.{digits}f} {unit}"
        )
    off = abs(statistics.median(v / b for v, b in zip(found[control], found[baseline], strict=True)) - 1)
    print(f"A/A control off by {off:.1%}" + ("; too noisy to tell" if off > 0.02 else ""))


def _interval(values: list[float], draws: int = 2000) -> tuple[float, float]:
    """95% bootstrap interval of the median."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]
