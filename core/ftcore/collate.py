"""Rows to one padded micro-batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ftcore.contract import Batch

__all__ = ["pad"]

IGNORED = -100  # a label that is not trained, as in torch's cross entropy


def pad(examples: Sequence[Mapping[str, Any]], pad_token_id: int, side: str = "right") -> Batch:
    """Pad list columns to the longest row and stack numbers.

    `input_ids` is padded with `pad_token_id`, `labels` with -100, other columns with 0;
    `attention_mask` marks what is no padding. Strings go to `Batch.columns`.

    Returns:
        A batch of int64 (or float32) tensors, [rows, longest] for lists and [rows] for numbers.
    """
    fill = {"input_ids": pad_token_id, "labels": IGNORED}
    tensors: dict[str, torch.Tensor] = {}
    columns: dict[str, list[Any]] = {}
    for name, first in examples[0].items():
        values = [e[name] for e in examples]
        if name == "row":
            continue
        if isinstance(first, str):
            columns[name] = values
        elif np.ndim(first) == 0:
            tensors[name] = torch.tensor(values)
        else:
            tensors[name] = _stack(values, fill.get(name, 0), side)
            if name == "input_ids":
                tensors["attention_mask"] = _stack([np.ones(len(v), np.int64) for v in values], 0, side)
    return Batch(tensors, columns=columns)


def _stack(values: Sequence[Any], fill: int, side: str) -> torch.Tensor:
    longest = max(len(v) for v in values)
    dtype = np.float32 if values[0].dtype.kind == "f" else np.int64
    out = np.full((len(values), longest), fill, dtype=dtype)
    for row, value in zip(out, values, strict=True):
        if side == "right":
            row[: len(value)] = value
        else:
            row[longest - len(value) :] = value
    return torch.from_numpy(out)
