"""What the predictions of a run say of each test row. Tables come from the disk: any column may be odd."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["is_degenerate", "row_scores"]


def row_scores(table: pa.Table, metric: str) -> NDArray[np.float64] | None:
    """One score a row, fp64 [rows], whose mean is `accuracy`, `exact_match` or `nll`; None for others.

    Whether the mean is the metric that the run recorded is for the caller to see to.
    """
    columns = set(table.column_names)
    if metric == "accuracy" and {"label", "prediction"} <= columns:
        return _equal(table, "label")
    if metric == "exact_match" and {"target", "prediction"} <= columns:
        return _equal(table, "target")
    if metric == "nll" and {"label", "scores"} <= columns:
        rows = zip(table.column("label").to_pylist(), table.column("scores").to_pylist(), strict=True)
        chances = [scores.get(label) if isinstance(scores, dict) else None for label, scores in rows]
        if all(chance is not None and chance > 0 for chance in chances):
            return -np.log(np.array(chances, dtype=np.float64))
    return None


def _equal(table: pa.Table, answer: str) -> NDArray[np.float64]:
    pairs = zip(table.column(answer).to_pylist(), table.column("prediction").to_pylist(), strict=True)
    return np.array([str(a).strip() == str(b).strip() for a, b in pairs], dtype=np.float64)


def is_degenerate(table: pa.Table | None) -> bool | None:
    """Whether a classifier is no better than always saying the commonest label; None: can't be told."""
    if table is None or not {"label", "prediction", "scores"} <= set(table.column_names) or not len(table):
        return None
    right = _equal(table, "label").sum()
    _, counts = np.unique(np.array(table.column("label").to_pylist()).astype(str), return_counts=True)
    return bool(right <= counts.max())
