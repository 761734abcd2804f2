"""Classification: rows and labels of texts and pairs, its loss, its metrics."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ftcore import Batch, UserError, tiny
from ftcore.config import Columns, Config, FilesData, TaskConfig
from ftcore.models import load_tokenizer
from ftcore.prepare import prepare
from ftcore.tasks import classify

LABELS = ["no", "yes"]


def formatted(examples: list[dict[str, Any]], labels: Any = LABELS, pair: str | None = None) -> Any:
    """Rows of the tiny BERT's byte tokenizer, 16 tokens at most."""
    cfg = Config(data=FilesData(max_length=16, columns=Columns(text_pair=pair)))
    return classify.format_examples(examples, tiny.tokenizer("tiny_bert"), cfg, labels)


def smoothed(logits: torch.Tensor, label: int, smoothing: float) -> float:
    """Cross entropy of one row in float64, term by term."""
    values = logits.double().tolist()
    log_sum = math.log(sum(math.exp(v) for v in values))
    share = smoothing / len(values)
    return sum(((1 - smoothing if i == label else 0.0) + share) * (log_sum - v) for i, v in enumerate(values))


def test_text_becomes_bytes_with_its_labels_index() -> None:
    """One row per example, with nothing cut."""
    (row,) = formatted([{"text": "ab", "label": "yes"}])
    assert tiny.tokenizer("tiny_bert").decode(row["input_ids"]) == "<s>ab</s>"
    assert row == {"input_ids": row["input_ids"], "labels": 1, "truncated": 0}


def test_long_text_is_cut_with_its_end_token_and_counted() -> None:
    """Tokens cut off are counted; the row still ends as the model expects."""
    (row,) = formatted([{"text": "a" * 20, "label": "no"}])
    assert (len(row["input_ids"]), row["truncated"]) == (16, 6)
    assert row["input_ids"][-1] == tiny.EOS


def test_pair_has_segments_and_is_cut_from_its_longer_text() -> None:
    """Both texts are in one row, marked by `token_type_ids`; truncation keeps the shorter one whole."""
    short, long = formatted(
        [{"text": "ab", "q": "c", "label": "no"}, {"text": "ab", "q": "c" * 30, "label": "no"}], pair="q"
    )
    assert tiny.tokenizer("tiny_bert").decode(short["input_ids"]) == "<s>ab</s>c</s>"
    assert short["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    assert tiny.tokenizer("tiny_bert").decode(long["input_ids"]) == "<s>ab</s>" + "c" * 11 + "</s>"
    assert long["token_type_ids"] == [0] * 4 + [1] * 12
    assert long["truncated"] == (1 + 2 + 1 + 30 + 1) - 16


@pytest.mark.parametrize("text", ["", "  ", None])
def test_unusable_example_is_dropped_in_its_place(text: str | None) -> None:
    """An empty text or a missing label makes an empty entry; the rest keep their places."""
    good = {"text": "ab", "label": "yes"}
    entries = formatted([{"text": text, "label": "no"}, good, {"text": "ab", "label": None}])
    assert entries[0] == entries[2] == []
    assert entries[1]["labels"] == 1
    assert formatted([{"text": text, "label": "no"}]) == [[]]


@pytest.mark.parametrize(
    ("label", "labels"),
    [("maybe", ["no", "yes"]), (0, ["1", "2", "3"]), (2, ["3", "5", "7"]), (-1, ["1", "2"])],
)
def test_label_that_training_does_not_have_is_an_error(label: Any, labels: list[str]) -> None:
    """A number that is no label is not taken for the index of one."""
    with pytest.raises(UserError, match=f"label '{label}' does not occur in the training data"):
        formatted([{"text": "ab", "label": label}], labels)


def test_class_labels_index_stands_whatever_the_names_are(config: Any, hooks: Any, tmp_path: Path) -> None:
    """A `ClassLabel` column named 1, 2, 3 holds indices 0, 1, 2: they are not read as the names."""
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["1", "2", "3"])}
    )
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 2]}, features)
    data.to_parquet(tmp_path / "stars.parquet")
    cfg = config({"data.train": str(tmp_path / "stars.parquet")})
    prepared = prepare(hooks(cfg), load_tokenizer(cfg))
    assert prepared.labels == ["1", "2", "3"]
    assert prepared.splits["train"].column("labels") == [0, 1, 2]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_sum_over_rows(smoothing: float) -> None:
    """Against a naive loop in float64; half precision is summed in fp32."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(7, 4, generator=generator) * 3
    labels = torch.tensor([0, 3, 1, 1, 2, 0, 3])
    cfg = Config(task=TaskConfig(label_smoothing=smoothing))
    term = classify.loss(Batch({"labels": labels}), SimpleNamespace(logits=logits), cfg)
    expected = sum(smoothed(row, int(label), smoothing) for row, label in zip(logits, labels, strict=True))
    assert float(term.sum) == pytest.approx(expected, rel=1e-6)
    assert (term.unit, term.sum.ndim) == ("examples", 0)
    half = classify.loss(Batch({"labels": labels}), SimpleNamespace(logits=logits.bfloat16()), cfg)
    assert half.sum.dtype == torch.float32


def test_tokens_are_those_read(hooks: Any) -> None:
    """Padding does not count."""
    assert classify.count_tokens(Batch({"attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])})) == 3


def test_predictions_are_log_probabilities_and_their_argmax() -> None:
    """What `predict` returns of known logits, and the metrics of it by hand."""
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])

    def model(**inputs: torch.Tensor) -> Any:
        assert set(inputs) == {"input_ids"}
        return SimpleNamespace(logits=logits)

    batch = Batch({"input_ids": torch.ones(3, 2), "labels": torch.tensor([0, 1, 1])})
    predictions = classify.predict(model, batch, None, Config())
    assert (predictions["label"], predictions["prediction"]) == ([0, 1, 1], [0, 1, 0])
    metrics = classify.evaluate(predictions)
    nll = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(-1)), math.log(1 + math.exp(3))]
    assert metrics["nll"] == pytest.approx(sum(nll) / 3, rel=1e-6)
    assert metrics["accuracy"] == pytest.approx(2 / 3)


def test_what_is_no_text_is_an_error_and_blank_labels_drop_the_row() -> None:
    """The Python form of a list is nothing to train on; bytes are the text that they encode."""
    with pytest.raises(UserError, match="'text' holds a list"):
        formatted([{"text": ["a", "b"], "label": "yes"}])
    (row, dropped) = formatted([{"text": "é".encode(), "label": "yes"}, {"text": "a", "label": " "}])
    assert tiny.tokenizer("tiny_bert").decode(row["input_ids"]) == "<s>é</s>"
    assert dropped == []
