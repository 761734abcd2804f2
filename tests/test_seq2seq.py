"""Text to text: source and target rows, the loss over target tokens, generated text and its metrics."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ftcore import Batch, tiny
from ftcore.collate import pad
from ftcore.config import Config, FilesData, TaskConfig
from ftcore.store import Rows, write_rows
from ftcore.tasks import seq2seq


def formatted(*examples: tuple[Any, Any], size: int = 8) -> Any:
    """Rows of (source, target) with the tiny T5's byte tokenizer."""
    cfg = Config(data=FilesData(max_length=size))
    rows = [{"text": source, "target": target} for source, target in examples]
    return seq2seq.format_examples(rows, tiny.tokenizer("tiny_t5"), cfg, [])


def test_source_and_target_become_tokens_with_an_end() -> None:
    """Labels are the target's tokens; its text is kept for the metrics."""
    (row,) = formatted(("ab", "xyz"))
    decode = tiny.tokenizer("tiny_t5").decode
    assert (decode(row["input_ids"]), decode(row["labels"])) == ("ab</s>", "xyz</s>")
    assert (row["target"], row["truncated"]) == ("xyz", 0)


def test_what_is_cut_of_both_sides_is_counted() -> None:
    """Source and target are each cut to the length, with their end tokens, the target's text is not."""
    (row,) = formatted(("a" * 10, "b" * 9))
    assert row["truncated"] == (11 - 8) + (10 - 8)
    assert len(row["input_ids"]) == len(row["labels"]) == 8
    assert row["input_ids"][-1] == row["labels"][-1] == tiny.EOS
    assert row["target"] == "b" * 9


def test_empty_source_or_target_is_dropped() -> None:
    """Either side empty, blank or missing drops the example in its place."""
    entries = formatted(("", "x"), ("a", " "), (None, "x"), ("a", None), ("a", "x"))
    assert entries[:4] == [[]] * 4
    assert entries[4]["target"] == "x"


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_is_the_sum_over_target_tokens(smoothing: float) -> None:
    """Against a naive loop in float64; labels are not shifted, -100 is left out."""
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(8))
    labels = torch.tensor([[1, 4, 2], [3, -100, -100]])
    expected = 0.0
    for row, position in ((0, 0), (0, 1), (0, 2), (1, 0)):
        scores = torch.log_softmax(logits[row, position].double(), dim=0)
        expected -= float((1 - smoothing) * scores[labels[row, position]] + smoothing * scores.mean())
    cfg = Config(task=TaskConfig(label_smoothing=smoothing))
    term = seq2seq.loss(Batch({"labels": labels}), SimpleNamespace(logits=logits), cfg)
    assert float(term.sum) == pytest.approx(expected, rel=1e-6)
    assert (term.unit, seq2seq.count_tokens(Batch({"labels": labels}))) == ("tokens", 4)


def test_prediction_is_greedy_text_and_the_targets_likelihood(tmp_path: Any) -> None:
    """With the tiny T5: `nll` equals the model's own loss, `prediction` is its greedy generation."""
    import transformers

    torch.manual_seed(2)
    model = transformers.T5ForConditionalGeneration(tiny.config("tiny_t5")).eval()
    tokenizer = tiny.tokenizer("tiny_t5")
    rows = [{k: v for k, v in r.items() if k != "truncated"} for r in formatted(("abc", "xy"), ("d", "z"))]
    write_rows(rows, tmp_path / "rows")
    stored = Rows(tmp_path / "rows")
    batch = pad([stored[0], stored[1]], tiny.PAD)
    with torch.no_grad():
        found = seq2seq.predict(model, batch, tokenizer, Config(task=TaskConfig(max_new_tokens=5)))
        loss = model(**batch).loss * 5
        ids = model.generate(batch["input_ids"][:1], max_new_tokens=5, do_sample=False)
    assert found["tokens"] == [3, 2]
    assert sum(found["nll"]) == pytest.approx(float(loss), rel=1e-5)
    assert found["prediction"][0] == tokenizer.decode(ids[0], skip_special_tokens=True).strip()
    assert found["target"] == ["xy", "z"]


def test_metrics_of_known_texts() -> None:
    """Exact match, ROUGE and loss per token, by hand."""
    metrics = seq2seq.evaluate(
        {"prediction": ["the cat", "a b"], "target": ["the cat", "b a"], "nll": [2.0, 4.0], "tokens": [1, 3]}
    )
    assert metrics == {"exact_match": 0.5, "rouge1": 1.0, "rougeL": 0.75, "nll": 1.5}


def test_zero_is_a_target_and_a_text() -> None:
    """Only null and blank are none."""
    zero, empty = formatted((0, 0), ("a", " "))
    assert (zero["target"], empty) == ("0", [])
