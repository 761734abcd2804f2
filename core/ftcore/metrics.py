"""Metrics as functions of predictions."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["classification", "exact_match", "rouge"]


def classification(
    labels: Sequence[int], predictions: Sequence[int], scores: Sequence[Sequence[float]]
) -> dict[str, float]:
    """Accuracy, F1 averaged over the classes that occur, Matthews correlation, mean NLL.

    The correlation for several classes is that of Gorodkin (2004); 0 where labels or predictions are all one.
    (scikit-learn has the same figures, and takes a sixth of the time that a run needs to start.)

    Args:
        labels: class indices, [rows].
        predictions: class indices, [rows].
        scores: log-probabilities, [rows, classes].
    """
    classes = max(max(labels), max(predictions)) + 1
    counts = np.zeros((classes, classes))  # [label, prediction]
    np.add.at(counts, (labels, predictions), 1)
    hits, wanted, given, rows = counts.diagonal(), counts.sum(1), counts.sum(0), len(labels)
    occurs = wanted + given > 0
    spread = (rows**2 - given @ given) * (rows**2 - wanted @ wanted)  # 0 where all are of one class
    picked: Any = np.asarray(scores)[np.arange(rows), labels]
    return {
        "accuracy": float(hits.sum() / rows),
        "macro_f1": float(np.mean(2 * hits[occurs] / (wanted + given)[occurs])),
        "mcc": float((rows * hits.sum() - wanted @ given) / spread**0.5) if spread > 0 else 0.0,
        "nll": float(-picked.mean()),
    }


def exact_match(pairs: Sequence[tuple[str, str]]) -> float:
    """Share of (prediction, target) pairs that are equal, spaces at the ends aside."""
    return sum(p.strip() == t.strip() for p, t in pairs) / len(pairs)


def rouge(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """ROUGE-1 and ROUGE-L F-measures (Lin, 2004), mean over (prediction, target) pairs, unstemmed."""
    unigram, longest = [], []
    for prediction, target in pairs:
        a, b = _words(prediction), _words(target)
        unigram.append(_f_measure(sum((Counter(a) & Counter(b)).values()), len(a), len(b)))
        longest.append(_f_measure(_common_subsequence(a, b), len(a), len(b)))
    return {"rouge1": float(np.mean(unigram)), "rougeL": float(np.mean(longest))}


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower()) if text.isascii() else re.findall(r"\w+", text.lower())


def _f_measure(hits: int, predicted: int, wanted: int) -> float:
    return 2 * hits / (predicted + wanted) if hits else 0.0


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = 0  # the cell up and to the left
        for j, y in enumerate(b, start=1):
            before, row[j] = row[j], before + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]
