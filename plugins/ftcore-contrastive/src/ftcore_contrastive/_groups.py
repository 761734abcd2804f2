"""Who is contrasted with whom: the rows of a step, grouped by where they are, and brought together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ftcore_contrastive._loss import ABSENT, count_positives

__all__ = ["Group", "Groups", "gather_padded", "gather_ragged", "world_size"]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Rows that are contrasted with one another, as one rank sees them.

    Attributes:
        labels: of all ranks' rows, int64 [ranks · rows a rank], short ranks padded with `ABSENT`.
        rows: where this rank's are.
        per_rank: rows a rank, padding included.
    """

    labels: Tensor
    rows: slice
    per_rank: int


@dataclass(frozen=True, kw_only=True)
class Groups:
    """This rank's groups of a step, and what the whole step holds, the same on all ranks.

    Attributes:
        own: one for each of this rank's micro-batches; a single one where the step is contrasted whole.
        rows: labelled rows of the step.
        anchors: those of them that have a positive in their group.
        count: groups that hold rows.
    """

    own: list[Group]
    rows: int
    anchors: int
    count: int

    @classmethod
    def of(cls, labels: Sequence[Sequence[Tensor]], rank: int, *, gather: bool, whole: bool) -> Groups:
        """Form groups.

        Args:
            labels: int64 [rows] of each micro-batch of each rank; all ranks have equally many micro-batches.
            rank: this one's.
            gather: contrast over ranks; else each rank's rows among themselves.
            whole: contrast over the micro-batches of the step; else each by itself.
        """
        split = [[torch.cat(list(one))] for one in labels] if whole else labels
        sides = [list(side) for side in zip(*split, strict=True)]  # [group][rank]
        teams = sides if gather else [[part] for side in sides for part in side]
        everyone = [_pad(team).flatten() for team in teams]
        return cls(
            own=[_group(side, rank) if gather else _group([side[rank]], 0) for side in sides],
            rows=sum(int((one >= 0).sum()) for one in everyone),
            anchors=sum(int((count_positives(one) > 0).sum()) for one in everyone),
            count=sum(bool((one >= 0).any()) for one in everyone),
        )


def _pad(parts: Sequence[Tensor]) -> Tensor:
    """Ranks' labels as one rectangle, [ranks, rows a rank]."""
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True, padding_value=ABSENT)


def _group(parts: Sequence[Tensor], rank: int) -> Group:
    labels = _pad(parts)
    start = rank * labels.shape[1]
    return Group(
        labels=labels.flatten(), rows=slice(start, start + len(parts[rank])), per_rank=labels.shape[1]
    )


def world_size() -> int:
    """Ranks that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_padded(local: Tensor, per_rank: int) -> Tensor:
    """This rank's [own, ...] to all ranks' [ranks · per_rank, ...], zeros where a rank has fewer."""
    padded = local.new_zeros((per_rank, *local.shape[1:]))
    padded[: len(local)] = local
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return torch.cat(parts)


def gather_ragged(parts: Sequence[Tensor], device: torch.device) -> list[list[Tensor]]:
    """Every rank's list of int64 vectors, on the CPU; all ranks have equally many, of any lengths."""
    if world_size() == 1:
        return [list(parts)]
    sizes = torch.tensor([len(part) for part in parts], device=device)
    lengths = gather_padded(sizes, len(parts)).view(-1, len(parts)).cpu()
    longest = int(lengths.sum(dim=1).max())
    values = gather_padded(torch.cat(list(parts)).to(device), longest).view(-1, longest).cpu()
    return [list(row[: n.sum()].split(n.tolist())) for row, n in zip(values, lengths, strict=True)]
