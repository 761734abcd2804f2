"""The noise: its size, where it goes, and that a row's is its own."""

import pytest
import torch

from ftcore import Batch, Step, UserError
from ftcore_neftune import NEFTune, noise, row_masks


@pytest.mark.parametrize(("length", "width"), [(50, 40), (400, 16)])
def test_its_size_depends_on_alpha_alone(length: int, width: int) -> None:
    """Every element is within alpha / √(L·d), and the norm is alpha / √3."""
    drawn = noise(length, width, 5.0, torch.Generator().manual_seed(0))
    bound = 5 / (length * width) ** 0.5
    assert drawn.abs().max() <= bound
    assert drawn.abs().max() > 0.98 * bound
    assert float(drawn.norm()) == pytest.approx(5 / 3**0.5, rel=0.05)


def _noise_of(rows: list[int], mask: list[list[int]]) -> torch.Tensor:
    batch = Batch({"attention_mask": torch.tensor(mask)})
    batch.rows = rows
    step = Step(index=2, total=9, epoch=0, seed=1)
    return NEFTune()._of(batch, step, torch.zeros(len(rows), len(mask[0]), 4))


def test_a_row_has_its_noise_wherever_it_is() -> None:
    """Alone or beside others, padded on either side; padding has none."""
    alone = _noise_of([7], [[1, 1]])
    right, left = _noise_of([3, 7], [[1, 1, 1], [1, 1, 0]]), _noise_of([7, 3], [[0, 1, 1], [1, 1, 1]])
    assert torch.equal(right[1, :2], alone[0])
    assert torch.equal(left[0, 1:], alone[0])
    assert torch.equal(left[1], right[0])
    assert not right[1, 2].any()
    assert not torch.equal(right[0, :2], alone[0])


def test_packed_rows_are_told_by_their_positions() -> None:
    """L is that of each row, not of the pack."""
    batch = Batch({"position_ids": torch.tensor([[0, 1, 2, 0, 1]])})
    assert [mask.tolist() for _, mask in row_masks(batch)] == [
        [True] * 3 + [False] * 2,
        [False] * 3 + [True] * 2,
    ]
    with pytest.raises(UserError, match="can't tell rows apart"):
        row_masks(Batch({}))
