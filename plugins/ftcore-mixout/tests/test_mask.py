"""Masks: functions of their key and index, independent, with the right share."""

import pytest
import torch

from ftcore_mixout._mask import CHUNK, draw, mask_key

CPU = torch.device("cpu")
KEY = mask_key(1, 2, -1, "layer")


def bits(key: bytes, p: float = 0.5, stop: int = 1 << 18) -> torch.Tensor:
    return draw(key, p, 0, stop, CPU) > 0


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (7, 70_000), (CHUNK - 3, CHUNK + 3), (65_536, 65_536)])
def test_a_bit_does_not_depend_on_the_range_it_is_asked_for_in(start: int, stop: int) -> None:
    """Shards of any offset see the bits of the whole."""
    whole = bits(KEY, 0.7, CHUNK + 10)
    assert torch.equal(draw(KEY, 0.7, start, stop, CPU) > 0, whole[start:stop])


def test_a_mask_is_the_same_for_any_number_of_threads() -> None:
    """One thread and three give the same bits."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(bits(KEY))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_masks_are_pinned() -> None:
    """A mask must not change between versions: a resumed run would train on another."""
    assert "".join(str(int(b)) for b in bits(KEY, 0.5, 40)) == "0111110000110001001111101101110000100000"
    assert bits(KEY).sum().item() == 131_187


@pytest.mark.parametrize("p", [0.0, 0.1, 0.7, 0.9])
def test_what_is_kept_is_one_over_its_chance(p: float) -> None:
    """0 or 1 / (1-p), so that the mean is 1."""
    values = {0.0, 1 / (1 - p)} if p else {1.0}
    assert draw(KEY, p, 0, 999, CPU).unique().tolist() == pytest.approx(sorted(values))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.7, 0.9, 0.999])
def test_the_share_that_is_dropped_is_p(p: float) -> None:
    """Within five standard deviations of a fair coin."""
    n = 1 << 21
    deviation = (p * (1 - p) / n) ** 0.5
    assert float(1 - bits(KEY, p, n).double().mean()) == pytest.approx(p, abs=5 * deviation)


@pytest.mark.parametrize("p", [0.0, 1 - 1e-12])
def test_the_ends_of_p(p: float) -> None:
    """p=0 keeps all; p next to 1 drops all."""
    assert bits(KEY, p).all().item() is (p == 0)
    assert bits(KEY, p).any().item() is (p == 0)


@pytest.mark.parametrize(
    "other",
    [
        mask_key(2, 2, -1, "layer"),
        mask_key(1, 3, -1, "layer"),
        mask_key(1, 2, 0, "layer"),
        mask_key(1, 2, -1, "b"),
    ],
    ids=["seed", "step", "micro_batch", "layer"],
)
def test_each_part_of_the_key_gives_an_independent_mask(other: bytes) -> None:
    """The masks agree in half of their bits."""
    n = 1 << 18
    agreeing = float((bits(KEY) == bits(other)).double().mean())
    assert agreeing == pytest.approx(0.5, abs=5 * 0.5 / n**0.5)


@pytest.mark.parametrize("lag", [1, 2, 64, 768, 65_536, CHUNK])
def test_bits_of_one_mask_are_uncorrelated(lag: int) -> None:
    """Neighbours, rows, blocks and chunks: a bit says nothing about the one `lag` further."""
    n = 1 << 21
    signs = bits(KEY, 0.5, n).float() * 2 - 1
    assert abs(float((signs[lag:] * signs[:-lag]).mean())) < 5 / (n - lag) ** 0.5


def test_short_masks_are_independent_over_steps() -> None:
    """Columns of 2,000 steps: each is kept as often as chance has it, no two go together."""
    steps, columns = 2000, 256
    drawn = torch.stack([bits(mask_key(0, s, -1, "w"), 0.7, columns) for s in range(steps)]).double()
    assert float(((drawn.mean(0) - 0.3) / (0.21 / steps) ** 0.5).abs().max()) < 5
    assert float(torch.corrcoef(drawn.T).fill_diagonal_(0).abs().max()) * steps**0.5 < 6
