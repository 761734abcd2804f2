"""The loss and its gradient against a double loop, over blocks and simulated ranks, and what it keeps."""

import math
from typing import Any

import pytest
import torch

from ftcore_contrastive import _loss, supervised_contrastive
from ftcore_contrastive._loss import attach, contrast, count_positives, normalize

LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 3, -1, 2])  # 3 stands alone, -1 takes no part


def by_loops(z: torch.Tensor, labels: torch.Tensor, temperature: float, reduction: str) -> torch.Tensor:
    """The definition, one exponential at a time, for autograd to differentiate."""
    z = z / z.norm(dim=1, keepdim=True)
    rows = [i for i in range(len(z)) if labels[i] >= 0]
    total, anchors = z.sum() * 0, 0
    for i in rows:
        positives = [p for p in rows if p != i and labels[p] == labels[i]]
        if not positives:
            continue
        below = sum(torch.exp(z[i] @ z[k] / temperature) for k in rows if k != i)
        terms = [torch.log(torch.exp(z[i] @ z[p] / temperature) / below) for p in positives]
        total, anchors = total - sum(terms) / len(positives), anchors + 1
    return total / anchors if reduction == "mean" and anchors else total


def sample(count: int = len(LABELS), width: int = 5, seed: int = 0) -> torch.Tensor:
    """Random representations, float64, that ask for a gradient."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=rng, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("temperature", [0.07, 0.3, 1.0])
@pytest.mark.parametrize("block", [2, 4, 512])
def test_it_is_the_double_loop(
    monkeypatch: pytest.MonkeyPatch, reduction: str, temperature: float, block: int
) -> None:
    """Value and gradient, whatever the size of the blocks."""
    monkeypatch.setattr(_loss, "BLOCK", block)
    fast, slow = sample(), sample()
    found = supervised_contrastive(fast, LABELS, temperature, reduction=reduction)
    expected = by_loops(slow, LABELS, temperature, reduction)
    (3 * found).backward()
    (3 * expected).backward()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(fast.grad, slow.grad, rtol=1e-10, atol=1e-13)


def test_gradcheck() -> None:
    """The written-out gradient is the derivative of the value."""
    assert torch.autograd.gradcheck(lambda z: supervised_contrastive(z, LABELS, 0.3), (sample(),))


def test_a_second_derivative_is_an_error_not_a_zero() -> None:
    """The gradient is attached as a constant; differentiating it again would be wrong without a word."""
    z = sample()
    with pytest.raises(RuntimeError, match="can't be differentiated twice"):
        torch.autograd.grad(supervised_contrastive(z, LABELS), z, create_graph=True)


@pytest.mark.parametrize(
    "labels", [[0, 1, 2], [0], [-1, -1, 0], [-1, -1]], ids=["all alone", "one row", "one labelled", "none"]
)
def test_nothing_to_contrast_is_zero_with_a_zero_gradient(labels: list[int]) -> None:
    """No 0/0: not in the value, not in the gradient."""
    z = sample(len(labels))
    loss = supervised_contrastive(z, torch.tensor(labels))
    loss.backward()
    assert loss == 0
    assert z.grad is not None
    assert not z.grad.any()


def test_anchors_without_positives_leave_the_mean_but_stay_keys() -> None:
    """Three anchors count; the fourth row still pushes them away, and is pushed."""
    labels, z = torch.tensor([0, 0, 0, 1]), sample(4)
    assert count_positives(labels).tolist() == [2, 2, 2, 0]
    mean = supervised_contrastive(z, labels)
    assert float(mean.detach()) == pytest.approx(
        float(supervised_contrastive(z, labels, reduction="sum").detach()) / 3
    )
    mean.backward()
    assert z.grad is not None
    assert z.grad[3].norm() > 1e-3


def test_at_equal_representations_it_is_the_log_of_the_other_rows() -> None:
    """ln(B - 1) an anchor, as no key is nearer than another: no factor such as τ/0.07 creeps in."""
    z = torch.ones(16, 4)
    for temperature in (0.07, 0.3):
        loss = supervised_contrastive(z, torch.arange(16) % 2, temperature)
        assert float(loss) == pytest.approx(math.log(15), rel=1e-6)


def test_the_order_of_rows_and_the_names_of_classes_do_not_matter() -> None:
    """A permutation of rows permutes the gradient."""
    order = torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(1))
    renamed = torch.where(LABELS >= 0, 10 - LABELS, LABELS)
    one, other = sample(), sample().detach()[order].requires_grad_()
    first = supervised_contrastive(one, LABELS)
    second = supervised_contrastive(other, renamed[order])
    first.backward()
    second.backward()
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(one.grad[order], other.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_before_anything_is_computed(dtype: torch.dtype) -> None:
    """The loss of half-precision inputs is the fp32 loss of the same numbers."""
    half = sample().detach().to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = supervised_contrastive(half, LABELS, 0.07)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(by_loops(half.double(), LABELS, 0.07, "mean")), rel=1e-5)


def share(sizes: list[int], rank: int, whole: torch.Tensor) -> torch.Tensor:
    return whole.split(sizes)[rank]


@pytest.mark.parametrize("sizes", [[9], [5, 4], [3, 3, 2, 1], [8, 0, 1]])
def test_ranks_together_have_the_gradient_of_one(sizes: list[int]) -> None:
    """Each rank computes its rows' part from gathered rows alone, rows of unequal number included."""
    z = normalize(sample()).detach()
    losses, gradient = contrast(z, LABELS, slice(0, 9), 0.3, 0.25)
    gathered: list[list[torch.Tensor]] = []  # what each call of `gather` is to give, from one process
    contrast(z, LABELS, slice(0, 9), 0.3, 0.25, gather=lambda x: gathered.append(x) or x)  # type: ignore[func-returns-value, arg-type]
    start = 0
    for rank, size in enumerate(sizes):
        answers = iter(gathered)
        found = contrast(
            share(sizes, rank, z),
            LABELS,
            slice(start, start + size),
            0.3,
            0.25,
            gather=lambda local, answers=answers: next(answers),
        )
        torch.testing.assert_close(found[0], losses[start : start + size])
        torch.testing.assert_close(found[1], gradient[start : start + size])
        start += size


def test_no_matrix_of_similarities_is_kept_for_the_backward() -> None:
    """What autograd saves grows with the rows, not with their square."""
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t,  # type: ignore[func-returns-value]
        lambda t: t,
    ):
        loss = supervised_contrastive(torch.randn(1024, 8).requires_grad_(), torch.arange(1024) % 7)
    loss.backward()
    assert max(saved) <= 1024 * 8


def test_attach_scales_with_what_comes_after() -> None:
    """The chain rule, and the value unchanged."""
    z, gradient = sample(3, 2), torch.ones(3, 2, dtype=torch.float64)
    value: Any = attach(z, torch.tensor(7.0, dtype=torch.float64), gradient)
    (value * 0.5).backward()
    assert float(value.detach()) == 7
    torch.testing.assert_close(z.grad, gradient * 0.5)
