"""The loss where labels are trained: against cross entropy over all logits, with gradients."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from ftcore import Batch, tiny
from ftcore_instruct import _loss
from ftcore_instruct._forward import WEIGHTED, call, count_weights, loss_term
from ftcore_instruct._packing import flatten, padded

ROWS = [
    {"input_ids": np.array([5, 6, 7, 8, 9]), "labels": np.array([-100, -100, 7, -100, 9])},
    {"input_ids": np.array([10, 11, 12]), "labels": np.array([-100, 11, 12])},
    {"input_ids": np.array([13, 14]), "labels": np.array([-100, -100])},
]


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(tiny.config("tiny_llama")).eval()


def reference(model: Any, smoothing: float = 0.0) -> torch.Tensor:
    """Summed over rows, each by itself, from all of its logits."""
    total = torch.zeros(())
    for row in ROWS:
        logits = model(input_ids=torch.as_tensor(row["input_ids"])[None]).logits[0, :-1]
        labels = torch.as_tensor(row["labels"])[1:]
        total = total + F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    return total


def gradient(model: Any, loss: torch.Tensor) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("keep", [True, False])
def test_padded_loss_is_that_of_each_row(keep: bool, smoothing: float) -> None:
    """A padded batch, with logits where they are trained or everywhere; masked rows count for nothing."""
    model = llama()
    batch = padded(ROWS, True, 0)
    term = loss_term(model, batch, call(model, batch, keep=keep), smoothing)
    assert term.unit == "tokens"
    torch.testing.assert_close(term.sum, reference(model, smoothing))


def test_logits_are_made_where_labels_are_trained() -> None:
    """Of five positions, the three whose next token some row trains."""
    model = llama()
    batch = padded(ROWS, True, 0)
    assert call(model, batch, keep=True).logits.shape == (3, 3, 261)
    assert call(model, batch, keep=False).logits.shape == (3, 5, 261)


def test_chunked_loss_and_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of one token: the loss and every gradient as from all logits; the head is put back."""
    monkeypatch.setattr(_loss, "CHUNK", 1)
    model = llama()
    batch = padded(ROWS, True, 0)
    outputs = call(model, batch, keep=True, headless=True)
    assert outputs.logits is None
    term = loss_term(model, batch, outputs, 0.0)
    whole = reference(model)
    torch.testing.assert_close(term.sum, whole)
    torch.testing.assert_close(gradient(model, 0.5 * term.sum), gradient(model, 0.5 * whole))
    assert call(model, batch, keep=False).logits.shape[-1] == 261


def test_chunks_agree_with_all_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """More tokens than a chunk holds, and gradients of both factors."""
    monkeypatch.setattr(_loss, "CHUNK", 300 * 16)
    torch.manual_seed(0)
    hidden, weight = torch.randn(70, 8, requires_grad=True), torch.randn(300, 8, requires_grad=True)
    labels = torch.randint(0, 300, (70,))
    whole = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    chunked = _loss.chunked_sum(hidden, weight, labels)
    torch.testing.assert_close(chunked, whole)
    for mine, theirs in zip(
        torch.autograd.grad(chunked, (hidden, weight), retain_graph=True),
        torch.autograd.grad(whole, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)
    wide = [x.detach().double().requires_grad_(True) for x in (hidden, weight)]
    torch.autograd.gradcheck(_loss.chunked_sum, (*wide, labels))
    held = _loss.chunked_sum(hidden, weight.detach(), labels)  # a head that is not trained
    assert torch.equal(torch.autograd.grad(held, hidden)[0], torch.autograd.grad(chunked, hidden)[0])


def test_chunked_loss_in_half_precision() -> None:
    """Under bf16 autocast the head's products are in bf16, as the model's own are; the sum stays fp32."""
    model = llama()
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    batch = padded(ROWS, True, 0)
    outputs = call(model, batch, keep=True, headless=True)
    assert outputs.last_hidden_state.dtype == torch.bfloat16
    term = loss_term(model, batch, outputs, 0.0)
    whole = loss_term(model, batch, call(model, batch, keep=True), 0.0)
    assert term.sum.dtype == torch.float32
    torch.testing.assert_close(term.sum, whole.sum, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient(model, term.sum), gradient(model, whole.sum), rtol=0.02, atol=2e-3)


def test_only_plain_heads_are_chunked() -> None:
    """Scaled or capped logits are not the head's own, so their models make logits."""
    small = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"intermediate_size": 16, "num_key_value_heads": 2}
    from_config = transformers.AutoModelForCausalLM.from_config
    assert _loss.has_plain_head(llama())
    assert not _loss.has_plain_head(from_config(transformers.GraniteConfig(**small)))
    assert not _loss.has_plain_head(from_config(transformers.Gemma2Config(head_dim=8, **small)))


def test_weights_of_tokens() -> None:
    """A loss of weighted tokens, and the unit that it is divided by; without weights there is none."""
    model = llama()
    weights = [np.full(len(row["labels"]), w, np.float32) for row, w in zip(ROWS, (0.5, 2, 1), strict=True)]
    weighted = [{**row, "weights": w} for row, w in zip(ROWS, weights, strict=True)]
    logits = [model(input_ids=torch.as_tensor(r["input_ids"])[None]).logits[0, :-1] for r in ROWS]
    labels = [torch.as_tensor(r["labels"])[1:] for r in ROWS]
    sums = [F.cross_entropy(x, y, reduction="sum") for x, y in zip(logits, labels, strict=True)]
    for batch in (padded(weighted, True, 0), _flat(weighted)):
        term = loss_term(model, batch, _call(model, batch), 0.0)
        assert term.unit == WEIGHTED
        torch.testing.assert_close(term.sum, 0.5 * sums[0] + 2 * sums[1] + sums[2])
        assert count_weights(batch) == {WEIGHTED: 2 * 0.5 + 2 * 2}
    assert count_weights(padded(ROWS, True, 0)) == {}


def _flat(rows: Any) -> Batch:
    return flatten(rows, decoder=True)


def _call(model: Any, batch: Batch) -> Any:
    from ftcore_instruct._attention import use_segments

    if "attention_mask" not in batch:
        use_segments(model)
    return call(model, batch, keep=True)


def test_a_batch_without_labels_gives_zero() -> None:
    """Nothing is trained, nothing fails: the step's other micro-batches count."""
    model = llama()
    batch = padded(ROWS[2:], True, 0)
    term = loss_term(model, batch, call(model, batch, keep=True), 0.0)
    assert float(term.sum.detach()) == 0
    term.sum.backward()
