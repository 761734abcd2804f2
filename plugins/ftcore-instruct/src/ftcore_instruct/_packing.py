"""Packing: which rows share a forward pass, and rows as one batch, flat or padded. Knows no model.

Rows are laid end to end with no padding between them. What keeps them apart is their lengths, which go
to the attention (`_attention`), and positions that start anew with each row.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ftcore import Batch
from ftcore.collate import pad
from ftcore_instruct._loss import kept_positions

__all__ = ["PackSampler", "best_fit_decreasing", "flatten", "padded"]

Ints = npt.NDArray[np.integer[Any]]
IGNORED = -100
TOKENS = ("input_ids", "labels", "weights")


def best_fit_decreasing(lengths: Ints, capacity: int) -> tuple[Ints, Ints]:
    """Distribute rows over packs of at most `capacity` tokens, few of them.

    Best fit decreasing (Johnson, 1973): the longest row first, each into the fullest pack that has
    room. Packs are found by their remaining space, whose values in use are the bits of an integer, so
    that a row costs a few integer operations.

    Args:
        lengths: tokens of each row, [rows], all in 1..capacity.

    Returns:
        The indices of all rows, int32, pack by pack, and where each pack begins, int64 [packs + 1]: pack
        i has the rows of places [starts[i], starts[i + 1]). (An array of its own for each pack would take
        more memory than the rows.)

    Raises:
        ValueError: a row that is empty or longer than a pack.
    """
    if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= capacity:
        raise ValueError(f"lengths must be in 1..{capacity}, got {lengths.min()} to {lengths.max()}")
    order = np.argsort(-lengths, kind="stable")
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]  # packs, by tokens left
    bit = [1 << space for space in range(capacity + 1)]
    in_use, count = 0, 0
    pack_of = array("i")
    for length in map(int, lengths[order]):
        if fits := in_use >> length:
            space = length + (fits & -fits).bit_length() - 1
            packs = by_space[space]
            pack = packs.pop()
            if not packs:
                in_use ^= bit[space]
        else:
            pack, space, count = count, capacity, count + 1
        pack_of.append(pack)
        if space := space - length:
            by_space[space].append(pack)
            in_use |= bit[space]
    packed = np.asarray(pack_of)
    rows = order[np.argsort(packed, kind="stable")].astype(np.int32)
    return rows, np.append(0, np.cumsum(np.bincount(packed, minlength=count)))


class PackSampler:
    """Steps of `batch_size` packs. Each row of an epoch is in one pack of it, none is left out.

    An epoch's rows may differ from one epoch to the next (mixtures), and so may the number of its packs. The
    number of steps is that of epoch 0; each epoch's packs are spread evenly over them.

    Args:
        order: the rows of an epoch, int64, in the order drawn. Which rows meet in a pack changes with it.
        lengths: tokens of every row of the data set, the longer side where there are two.
        capacity: tokens of a pack.
        batch_size: packs per optimiser step, over all ranks.
    """

    def __init__(
        self, order: Callable[[int], Ints], lengths: Ints, capacity: int, batch_size: int, seed: int
    ) -> None:
        self.order = order
        self.lengths = lengths
        self.capacity = capacity
        self.seed = seed
        self._epoch = 0, *self._packs(0)
        self.steps_per_epoch = -(-len(self._epoch[3]) // batch_size)

    def __call__(self, epoch: int, step: int) -> list[Ints]:
        """The packs of a step, each the data-set rows of one."""
        if self._epoch[0] != epoch:
            self._epoch = epoch, *self._packs(epoch)
        _, rows, starts, packs = self._epoch
        first, end = (len(packs) * s // self.steps_per_epoch for s in (step, step + 1))
        return [rows[starts[i] : starts[i + 1]].astype(np.int64) for i in packs[first:end]]

    def _packs(self, epoch: int) -> tuple[Ints, Ints, Ints]:
        """The epoch's rows, pack by pack; where each pack begins; the packs in the order of training."""
        rows = self.order(epoch).astype(np.int32)
        members, starts = best_fit_decreasing(self.lengths[rows], self.capacity)
        # Best fit makes full packs first and of the longest rows: shuffled, steps are alike.
        shuffled = np.random.default_rng([self.seed, epoch]).permutation(len(starts) - 1)
        return rows[members], starts, shuffled


def flatten(examples: Sequence[Mapping[str, Any]], decoder: bool) -> Batch:
    """Rows laid end to end, as one row without padding.

    The batch holds `input_ids`, `labels` (and `weights`, where rows have them) as [1, tokens].
    `columns["length"]` has the tokens of each row, `columns["target_length"]` those of its labels;
    other columns are lists, one entry a row.

    Args:
        decoder: labels are aligned with the input, of a decoder-only model. Then there are `position_ids`
            that start anew with each row, no row's first token is a label, as nothing in it predicts it, and
            `kept` has the positions whose next token is trained.
    """
    lengths = [len(e["input_ids"]) for e in examples]
    targets = [len(e["labels"]) for e in examples]
    tensors: dict[str, torch.Tensor] = {}
    for name in (n for n in TOKENS if n in examples[0]):
        dtype = np.float32 if name == "weights" else np.int64
        tensors[name] = torch.from_numpy(np.concatenate([e[name] for e in examples]).astype(dtype))[None]
    if decoder:
        starts = np.cumsum([0, *lengths[:-1]])
        tensors["labels"][0, starts] = IGNORED
        tensors["position_ids"] = torch.from_numpy(np.arange(sum(lengths)) - np.repeat(starts, lengths))[None]
        tensors["kept"] = kept_positions(tensors["labels"])
    return Batch(tensors, columns={**_columns(examples), "length": lengths, "target_length": targets})


def padded(examples: Sequence[Mapping[str, Any]], decoder: bool, pad_token_id: int) -> Batch:
    """Rows padded to the longest: `input_ids`, `attention_mask`, `labels` (and `weights`)."""
    only = [{name: e[name] for name in TOKENS if name in e} for e in examples]
    batch = pad(only, pad_token_id)
    if decoder:
        batch["kept"] = kept_positions(batch["labels"])
    batch.columns.update(_columns(examples))
    return batch


def _columns(examples: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """What is no token, one entry a row."""
    names = [name for name in examples[0] if name not in (*TOKENS, "row")]
    return {
        name: [e[name].tolist() if isinstance(e[name], np.ndarray) else e[name] for e in examples]
        for name in names
    }
