"""The estimate: the theory of each stage, and which layout it names."""

import pytest

from ftcore_deepspeed._memory import BUCKET, LAYOUTS, Counts, count, estimate, report

P = 1000


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_what_each_stage_splits(ranks: int) -> None:
    """Bytes a parameter: weight 4, gradient 4, moments 8; from stage 1 on 4 for the copy that is stepped."""
    device = [estimate(Counts(P, P), ranks, layout)["device"] / P for layout in LAYOUTS[:4]]
    expected = [16, 4 + 4 + 12 / ranks, 4 + 4 / ranks + 12 / ranks, 20 / ranks]
    assert device == pytest.approx(expected)


def test_frozen_weights_have_no_states_and_kept_values_are_split() -> None:
    """Only what is trained has gradients and moments; what a plugin keeps is a rank's own part."""
    found = estimate(Counts(P, P // 2, kept=300), 2, (2, False, False))
    assert found["parameters"] == 4 * P
    assert found["gradients"] == P
    assert found["plugins"] == 600


def test_what_is_offloaded_is_counted_on_the_host() -> None:
    """Device and host together hold every state."""
    found = estimate(Counts(P, P), 2, (3, True, True))
    assert found["device"] == found["gradients"]
    assert found["host"] == found["parameters"] + found["optimizer"] + 4 * P / 2


def test_the_fastest_that_fits_is_named() -> None:
    """In the order of the layouts; none where nothing does."""
    buffer = BUCKET * 4 / 1e9
    total = 10**9
    chosen = (2, False, False)
    assert report(Counts(total, total), 2, chosen, 100)["fits"] == "trainer.stage=0"
    assert report(Counts(total, total), 2, chosen, 10.01 + buffer)["fits"] == "trainer.stage=3"
    assert report(Counts(total, total), 2, chosen, 1)["fits"].startswith("none")
    text = report(Counts(total, total), 2, chosen, None)["text"]
    assert [line.lstrip().startswith(">") for line in text[1:]].index(True) == 2


def test_stage_3_keeps_small_parameters_whole() -> None:
    """Those below 100,000 elements, on each rank, beside their slices."""
    counts = count([(99_999, True), (100_000, True), (300_000, False)], kept=7)
    assert counts == Counts(499_999, 199_999, small=99_999, kept=7)
    assert estimate(counts, 2, (3, False, False))["parameters"] == 4 * (499_999 / 2 + 99_999)
    assert estimate(counts, 2, (2, False, False))["parameters"] == 4 * 499_999
