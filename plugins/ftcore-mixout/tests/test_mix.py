"""The mathematics, against naive loops, exact enumeration and autograd."""

import itertools
from typing import Any

import pytest
import torch

from ftcore_mixout._mask import draw, mask_key
from ftcore_mixout._mix import decay_, factor, mix, slice_factor

CPU = torch.device("cpu")
KEY = mask_key(0, 1, 2, "w")
SHAPE = (5, 7)
CASES = pytest.mark.parametrize("features", [1, 0, None], ids=["column", "conv1d", "element"])


def pair(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    w, u = torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64).to(dtype)
    return w, u


def mask_by_hand(p: float, features: int | None) -> torch.Tensor:
    """The mask of a weight, one element at a time."""
    drawn = draw(KEY, p, 0, 35, CPU) > 0
    mask = torch.empty(SHAPE, dtype=torch.float64)
    for row, column in itertools.product(range(5), range(7)):
        index = {1: column, 0: row, None: row * 7 + column}[features]
        mask[row, column] = float(drawn[index])
    return mask


@CASES
@pytest.mark.parametrize("p", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("zero", [False, True])
def test_it_is_the_formula_of_the_paper(p: float, features: int | None, zero: bool) -> None:
    """((1-m) u + m w - p u) / (1-p), as Lee et al. write it, with the mask filled in by hand."""
    w, u = pair()
    u = torch.zeros_like(u) if zero else u
    m = mask_by_hand(p, features)
    expected = ((1 - m) * u + m * w - p * u) / (1 - p)
    mixed = mix(w, None if zero else u, factor(KEY, p, SHAPE, features, CPU))
    torch.testing.assert_close(mixed, expected, rtol=1e-6, atol=1e-6)


@CASES
@pytest.mark.parametrize("zero", [False, True])
def test_gradcheck_in_float64(features: int | None, zero: bool) -> None:
    """Autograd through the mixture agrees with finite differences."""
    w, u = pair()
    f = factor(KEY, 0.4, SHAPE, features, CPU).double()
    assert len(f.unique()) == 2
    assert torch.autograd.gradcheck(lambda x: mix(x, None if zero else u, f).sin(), w.requires_grad_())


@CASES
def test_the_factor_is_the_derivative(features: int | None) -> None:
    """What gradients are multiplied by is what autograd has: m / (1-p), not m."""
    w, u = pair()
    f = factor(KEY, 0.4, SHAPE, features, CPU).double()
    upstream = torch.randn(SHAPE, dtype=torch.float64)
    (found,) = torch.autograd.grad(mix(w.requires_grad_(), u, f), w, upstream)
    torch.testing.assert_close(found, upstream * f.expand(SHAPE), rtol=1e-12, atol=0)
    assert f.unique().tolist() == pytest.approx([0, 1 / 0.6])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_mean_over_all_masks_is_w(p: float) -> None:
    """All 128 masks of 7 columns, each weighted by its probability."""
    w, u = pair()
    mean = torch.zeros_like(w)
    for drawn in itertools.product((0.0, 1.0), repeat=7):
        kept = sum(drawn)
        chance = (1 - p) ** kept * p ** (7 - kept)
        mean += chance * mix(w, u, torch.tensor(drawn).double().view(1, 7) / (1 - p))
    torch.testing.assert_close(mean, w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("granularity", [1, None], ids=["column", "element"])
def test_the_mean_over_drawn_masks_is_w(granularity: int | None) -> None:
    """4,000 steps of p=0.7, within five standard errors."""
    w, u = pair(torch.float32)
    mixed = torch.stack(
        [mix(w, u, factor(mask_key(0, s, -1, "w"), 0.7, SHAPE, granularity, CPU)) for s in range(4000)]
    ).double()
    error = (mixed.mean(0) - w).abs() / (w - u).abs()
    assert float(error.max()) < 5 * (0.7 / 0.3 / 4000) ** 0.5


@CASES
@pytest.mark.parametrize(("start", "stop"), [(0, 35), (3, 4), (5, 23), (35, 35)])
def test_a_shard_has_its_slice_of_the_whole_factor(features: int | None, start: int, stop: int) -> None:
    """Any range of the flattened weight, rows cut in the middle included."""
    whole = factor(KEY, 0.5, SHAPE, features, CPU).expand(SHAPE).reshape(-1)
    assert torch.equal(slice_factor(KEY, 0.5, SHAPE, features, CPU, start, stop), whole[start:stop])


def test_small_deltas_survive_bf16() -> None:
    """Weights in bf16 and a target in fp32: the mixture is computed in fp32 and rounded once."""
    u = torch.full((4, 4), 0.02)
    w = (u + 1e-3 * torch.arange(16).view(4, 4)).bfloat16()
    f = torch.full((1, 4), 10.0)
    mixed = mix(w, u, f, out=torch.empty_like(w))
    assert mixed.dtype == torch.bfloat16
    exact = u.double() + 10 * (w.double() - u.double())
    assert torch.equal(mixed, exact.to(torch.bfloat16))


def test_nothing_is_rounded_where_nothing_moved() -> None:
    """w = u gives u bit for bit, whatever the mask and p: training starts at the pretrained model."""
    w, _ = pair(torch.float32)
    assert torch.equal(mix(w, w.clone(), factor(KEY, 0.9, SHAPE, None, CPU)), w)


def test_decay_goes_to_the_target() -> None:
    """w - rate * (w - u), in place."""
    w, u = pair()
    before = w.clone()
    decay_(w, u, 0.25)
    torch.testing.assert_close(w, before - 0.25 * (before - u), rtol=1e-12, atol=1e-12)


def test_bytes_of_a_column_factor_are_those_of_one_row() -> None:
    """The default mask costs in_features numbers, not a weight's."""
    found: Any = factor(KEY, 0.5, (4096, 64), 1, CPU)
    assert found.shape == (1, 64)
