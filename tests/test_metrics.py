"""Metrics, against scikit-learn and the `rouge-score` package."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer
from sklearn import metrics

from ftcore.metrics import classification, exact_match, rouge

WORDS = ["the", "cat", "sat", "on", "mat", "a", "Dog", "42", "it's", "x-ray", "end.", "...", "snake_case"]
TEXT = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)


@pytest.mark.parametrize("rows", [3, 7, 200])
@pytest.mark.parametrize("seed", range(5))
def test_classification_agrees_with_scikit_learn(rows: int, seed: int) -> None:
    """Accuracy, macro F1, MCC and log loss of random predictions over four classes, of which three occur."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 1, 3], size=rows).tolist()
    raw = rng.normal(size=(rows, 4))
    scores = raw - np.log(np.exp(raw).sum(axis=1, keepdims=True))
    predictions = scores.argmax(axis=1).tolist()
    found = classification(labels, predictions, scores.tolist())
    assert found == {
        "accuracy": pytest.approx(metrics.accuracy_score(labels, predictions)),
        "macro_f1": pytest.approx(metrics.f1_score(labels, predictions, average="macro", zero_division=0)),
        "mcc": pytest.approx(metrics.matthews_corrcoef(labels, predictions)),
        "nll": pytest.approx(metrics.log_loss(labels, np.exp(scores), labels=[0, 1, 2, 3])),
    }
    assert found["accuracy"] == np.mean(np.equal(labels, predictions))


def test_single_class_has_metrics_without_a_warning() -> None:
    """A group whose rows all have one label: MCC is 0 by convention, nothing is printed."""
    found = classification([1, 1], [1, 1], [[-3.0, -0.1]] * 2)
    assert found == {"accuracy": 1.0, "macro_f1": 1.0, "mcc": 0.0, "nll": pytest.approx(0.1)}


@settings(max_examples=100, deadline=None)
@given(pairs=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
def test_rouge_agrees_with_the_reference_package(pairs: list[tuple[str, str]]) -> None:
    """ROUGE-1 and ROUGE-L F-measures, unstemmed, mean over pairs, are those of `rouge-score`."""
    scorer = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    expected = [scorer.score(target, prediction) for prediction, target in pairs]
    for name, value in rouge(pairs).items():
        assert value == pytest.approx(np.mean([score[name].fmeasure for score in expected]), abs=1e-12)


def test_rouge_reads_words_of_any_language() -> None:
    """Where the reference package drops other letters, words in them count."""
    assert rouge([("Żółta łódź płynie", "żółta łódź stoi")])["rouge1"] == pytest.approx(2 / 3)


def test_rouge_l_is_in_order_and_rouge_1_is_not() -> None:
    """Reversed words share each unigram, but a subsequence of one."""
    assert rouge([("a b c d", "d c b a")]) == {"rouge1": 1.0, "rougeL": 0.25}


def test_exact_match_ignores_only_the_ends() -> None:
    """Spaces at the ends do not count; case and inner spaces do."""
    assert exact_match([(" yes ", "yes\n"), ("Yes", "yes"), ("a  b", "a b"), ("", " ")]) == 0.5
