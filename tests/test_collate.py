"""Rows to one padded batch."""

from typing import Any

import numpy as np
import pytest
import torch

from ftcore.collate import pad

ROWS: list[dict[str, Any]] = [
    {
        "row": 4,
        "input_ids": np.array([5, 6, 7], np.int32),
        "labels": np.array([1, 2], np.int32),
        "group": "a",
    },
    {"row": 2, "input_ids": np.array([8], np.int32), "labels": np.array([3], np.int32), "group": "b"},
]


@pytest.mark.parametrize(
    ("side", "ids", "mask", "labels"),
    [
        ("right", [[5, 6, 7], [8, 9, 9]], [[1, 1, 1], [1, 0, 0]], [[1, 2], [3, -100]]),
        ("left", [[5, 6, 7], [9, 9, 8]], [[1, 1, 1], [0, 0, 1]], [[1, 2], [-100, 3]]),
    ],
)
def test_lists_are_padded_on_the_tokenizers_side(side: str, ids: Any, mask: Any, labels: Any) -> None:
    """Ids get the padding token, labels -100, and the mask marks what is no padding."""
    batch = pad(ROWS, pad_token_id=9, side=side)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_strings_are_columns_and_no_tensors() -> None:
    """What the model can't take is kept beside it, in the rows' order."""
    assert pad(ROWS, 0).columns == {"group": ["a", "b"]}


def test_other_columns_are_padded_with_zero() -> None:
    """`token_type_ids` and weights; numbers become one vector, floats stay floats."""
    rows = [
        {"input_ids": np.ones(n, np.int32), "token_type_ids": np.ones(n, np.int32), "labels": n, "w": 0.5}
        | {"token_weights": np.full(n, 0.25, np.float32)}
        for n in (1, 3)
    ]
    batch = pad(rows, 0)
    assert batch["token_type_ids"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["token_weights"].tolist() == [[0.25, 0.0, 0.0], [0.25] * 3]
    assert (batch["labels"].tolist(), batch["w"].tolist()) == ([1, 3], [0.5, 0.5])
    assert (batch["token_weights"].dtype, batch["w"].dtype) == (torch.float32, torch.float32)


def test_padding_token_that_occurs_in_a_text_is_still_attended_to() -> None:
    """The mask comes from lengths, not from ids: models that pad with their end token work."""
    batch = pad([{"input_ids": np.array([2, 0])}, {"input_ids": np.array([2])}], pad_token_id=2)
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
