"""Language modelling: windows that lose nothing, the loss of each next token, perplexity."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ftcore import Batch, tiny
from ftcore.config import Config, FilesData, TaskConfig
from ftcore.tasks import causal_lm


def windows(text: str | None, size: int) -> list[list[int]]:
    """The windows of one text with the tiny Llama's byte tokenizer."""
    cfg = Config(data=FilesData(max_length=size))
    (entry,) = causal_lm.format_examples([{"text": text}], tiny.tokenizer("tiny_llama"), cfg, [])
    assert all(row["input_ids"] == row["labels"] and set(row) == {"input_ids", "labels"} for row in entry)
    return [row["input_ids"] for row in entry]


@pytest.mark.parametrize("size", [4, 5, 8, 13])
@pytest.mark.parametrize("length", [1, 2, 3, 6, 11, 12, 40])
def test_every_token_is_trained_exactly_once(length: int, size: int) -> None:
    """What the windows train, joined, is the text and its end token; no window is too long or idle."""
    text = "".join(chr(97 + i % 26) for i in range(length))
    found = windows(text, size)
    expected = [*tiny.tokenizer("tiny_llama")(text)["input_ids"], tiny.EOS]
    assert [token for window in found for token in window[1:]] == expected[1:]
    assert found[0][0] == expected[0] == tiny.BOS
    assert all(2 <= len(window) <= size for window in found)


@pytest.mark.parametrize("text", ["", " \n", None])
def test_empty_text_is_dropped(text: str | None) -> None:
    """A text of nothing but spaces makes no window."""
    assert windows(text, 8) == []


def test_end_token_is_not_doubled() -> None:
    """A tokenizer that adds the end token itself adds the only one."""
    cfg = Config(data=FilesData(max_length=8))
    ((row,),) = causal_lm.format_examples([{"text": "ab"}], tiny.tokenizer("tiny_t5"), cfg, [])
    assert row["input_ids"].count(tiny.EOS) == 1


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_sum_over_next_tokens(smoothing: float) -> None:
    """Against a naive loop in float64 that shifts by one and leaves -100 out."""
    logits = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(4)) * 2
    labels = torch.tensor([[1, 2, 3, 4, 5], [0, -100, -100, 2, -100], [-100] * 5])
    batch = Batch({"labels": labels})
    expected, count = 0.0, 0
    for row in range(3):
        for position in range(4):
            target = int(labels[row, position + 1])
            if target != -100:
                scores = torch.log_softmax(logits[row, position].double(), dim=0)
                expected -= float((1 - smoothing) * scores[target] + smoothing * scores.mean())
                count += 1
    cfg = Config(task=TaskConfig(label_smoothing=smoothing))
    term = causal_lm.loss(batch, SimpleNamespace(logits=logits), cfg)
    assert float(term.sum) == pytest.approx(expected, rel=1e-6)
    assert (term.unit, causal_lm.count_tokens(batch)) == ("tokens", count)


def test_batch_without_labels_has_a_loss_of_zero_with_a_gradient() -> None:
    """A micro-batch that is masked whole contributes nothing, and its backward still runs."""
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(5), requires_grad=True)
    term = causal_lm.loss(
        Batch({"labels": torch.full((2, 3), -100)}), SimpleNamespace(logits=logits), Config()
    )
    term.sum.backward()
    assert float(term.sum.detach()) == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_prediction_sums_each_rows_tokens() -> None:
    """`nll` and `tokens` per row, padding left out, add up to the loss."""
    logits = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(6))
    batch = Batch(
        {"input_ids": torch.zeros(2, 4), "labels": torch.tensor([[1, 2, 3, 4], [1, 2, -100, -100]])}
    )

    def model(**inputs: Any) -> Any:
        return SimpleNamespace(logits=logits)

    predictions = causal_lm.predict(model, batch, None, Config())
    assert predictions["tokens"] == [3, 1]
    first = -torch.log_softmax(logits[1, 0].double(), dim=0)[2]
    assert predictions["nll"][1] == pytest.approx(float(first), rel=1e-6)
    total = causal_lm.loss(batch, SimpleNamespace(logits=logits), Config()).sum
    assert sum(predictions["nll"]) == pytest.approx(float(total), rel=1e-6)


def test_perplexity_is_over_tokens_not_rows() -> None:
    """Rows count by their length; a hopeless model has a finite perplexity."""
    metrics = causal_lm.evaluate({"nll": [6.0, 1.0], "tokens": [6, 1]})
    assert metrics == {"nll": 1.0, "perplexity": pytest.approx(math.e)}
    assert math.isfinite(causal_lm.evaluate({"nll": [1e6], "tokens": [1]})["perplexity"])
