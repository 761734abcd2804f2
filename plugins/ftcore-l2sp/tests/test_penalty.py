"""The penalty, its schedule, and what is checked on resuming."""

import pytest
import torch

from ftcore import UserError
from ftcore_l2sp import L2SP, factor, penalty


def test_gradients_are_the_closed_form() -> None:
    """alpha · (w - w0) on pretrained values, beta · w on new ones."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(7, generator=generator, dtype=torch.float64, requires_grad=True)
    w0 = torch.randn(7, generator=generator, dtype=torch.float64)
    (pulled,) = torch.autograd.grad(penalty(w, w0, 0.3, 9.0), w)
    (shrunk,) = torch.autograd.grad(penalty(w, None, 9.0, 0.2), w)
    torch.testing.assert_close(pulled, 0.3 * (w.detach() - w0))
    torch.testing.assert_close(shrunk, 0.2 * w.detach())
    assert torch.autograd.gradcheck(lambda x: penalty(x, w0, 0.3, 0.0), (w,))


@pytest.mark.parametrize("cut", [0, 1, 4, 7])
def test_parts_add_up_to_the_whole(cut: int) -> None:
    """However a parameter is split over ranks, empty parts included."""
    w, w0 = torch.arange(7.0), torch.ones(7)
    parts = penalty(w[:cut], w0[:cut], 0.1, 0.0) + penalty(w[cut:], w0[cut:], 0.1, 0.0)
    torch.testing.assert_close(parts, penalty(w, w0, 0.1, 0.0))


@pytest.mark.parametrize(
    ("schedule", "values"),
    [("constant", (1.0, 1.0, 1.0)), ("linear", (1.0, 0.5, 0.0)), ("cosine", (1.0, 0.5, 0.0))],
)
def test_the_schedule_goes_by_progress(schedule: str, values: tuple[float, ...]) -> None:
    """At the beginning, half-way and at the end."""
    assert [factor(schedule, p) for p in (0, 0.5, 1)] == pytest.approx(values)


def test_other_pretrained_weights_are_refused_on_resume() -> None:
    """One changed element is enough; a new head that differs is none of its business."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    new = frozenset({"1.weight", "1.bias"})
    began, went_on = L2SP(), L2SP()
    began.setup_model(model, new)
    assert began.describe() == {"new": sorted(new), "kept_parameters": 12}
    with torch.no_grad():
        model[1].weight.zero_()
    went_on.setup_model(model, new)
    went_on.load_state_dict(began.state_dict())
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-3
    went_on.setup_model(model, new)
    with pytest.raises(UserError, match="not those that this run began with"):
        went_on.load_state_dict(began.state_dict())
