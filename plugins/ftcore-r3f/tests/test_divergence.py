"""The divergence, and which predictions are compared."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ftcore import UserError
from ftcore_r3f import R3F, predicted, symmetric_kl


def test_it_is_both_divergences() -> None:
    """Against torch's own KL, each way; it is 0 between equals, and its gradient is the numerical one."""
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 5, 3, generator=generator)
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    both = F.kl_div(log_q, log_p.exp(), reduction="sum") + F.kl_div(log_p, log_q.exp(), reduction="sum")
    torch.testing.assert_close(symmetric_kl(p, q), both)
    assert float(symmetric_kl(p, p)) == 0
    leaf, step = p.clone().requires_grad_(True), 1e-2
    (grad,) = torch.autograd.grad(symmetric_kl(leaf, q), leaf)
    shift = torch.zeros_like(p)
    shift[2, 1] = step
    numerical = (symmetric_kl(p + shift, q) - symmetric_kl(p - shift, q)) / (2 * step)
    assert float(grad[2, 1]) == pytest.approx(float(numerical), rel=1e-2)


def test_what_is_compared_is_what_is_trained() -> None:
    """All rows; or tokens with a label, a decoder's one place earlier."""
    rows = torch.arange(6.0).view(3, 2)
    assert torch.equal(predicted(rows, torch.tensor([0, 1, 0]), True), rows)
    logits, labels = torch.arange(8.0).view(1, 4, 2), torch.tensor([[-100, -100, 1, 0]])
    assert torch.equal(predicted(logits, labels, True), logits[0, 1:3])
    assert torch.equal(predicted(logits, labels, False), logits[0, 2:])


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [((3, 1), (3,), "regression"), ((1, 2, 9), (1, 5), "do not go with labels")],
)
def test_other_heads_are_refused(logits: tuple[int, ...], labels: tuple[int, ...], message: str) -> None:
    """With the reason."""
    with pytest.raises(UserError, match=message):
        predicted(torch.zeros(logits), torch.zeros(labels, dtype=torch.long), True)


@pytest.mark.parametrize(("precision", "least"), [("bf16", 0.01), ("fp16", 0.001)])
def test_noise_that_rounding_hides_is_refused(precision: str, least: float) -> None:
    """The default is for fp32; a weight of 0 has no noise to lose."""
    cfg: Any = SimpleNamespace(train=SimpleNamespace(precision=precision))
    model = SimpleNamespace(
        config=SimpleNamespace(is_encoder_decoder=False), get_input_embeddings=torch.nn.Module
    )
    with pytest.raises(UserError, match=rf"eps=1e-05 is lost .*precision={precision}.* {least:g} or more"):
        R3F().setup_model(model, cfg)
    R3F(eps=least).setup_model(model, cfg)
    R3F(weight=0.0).setup_model(model, cfg)
