"""One file in three parts: `data.split`, by `data.split_seed` alone."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ftcore.config import Config
from ftcore.data import SPLITS
from ftcore.duplicates import group
from ftcore.errors import UserError, note

__all__ = ["assign", "cut"]


def cut(splits: dict[str, Any], cfg: Config) -> dict[str, Any]:
    """Cut `train` by `data.split`: each label in proportion (classification), near-duplicates on one side.

    Raises:
        UserError: there are other splits already, or the data are streamed.
    """
    if set(splits) != {"train"}:
        raise UserError("data.split cuts data.train alone; take data.validation and data.test away (=null)")
    if cfg.data.streaming:
        raise UserError("data.split needs the whole data set; it can't be used with data.streaming")
    train, columns = splits["train"], cfg.data.columns
    there = [name for name in (columns.text, columns.text_pair) if name in train.column_names]
    rows = zip(*(train[name] for name in there or train.column_names), strict=True)
    texts = [" ".join("" if value is None else str(value) for value in row) for row in rows]
    groups = group(texts)
    blank = np.flatnonzero([not text.strip() for text in texts])
    groups[blank] = len(texts) + np.arange(len(blank))  # nothing is no duplicate of nothing
    strata = [""] * len(train)
    if cfg.task.name == "classify" and columns.label in train.column_names:
        strata = [str(value) for value in train[columns.label]]
    part = np.array(assign(groups.tolist(), strata, cfg.data.split, cfg.data.split_seed))
    parts = {split: np.flatnonzero(part == i) for i, split in enumerate(SPLITS)}
    said = ", ".join(f"{len(rows)} {split}" for split, rows in parts.items())
    alike = int((np.unique(groups, return_counts=True)[1] - 1).sum())
    note(f"data.split: {said} rows" + (f"; {alike} near-duplicates, each beside its like" if alike else ""))
    return {s: train.select(rows, keep_in_memory=True) for s, rows in parts.items() if len(rows)}


def assign(groups: Sequence[int], strata: Sequence[str], shares: Sequence[float], seed: int) -> list[int]:
    """The part (index into `shares`) of each row; rows of one group share it.

    Every stratum is shared out as `shares` say, as near as whole groups allow; the first part gets a row
    of each. Larger groups go first, each to where most of its rows are still wanted; `seed` orders the rest.
    """
    wanted: dict[str, list[int]] = {}
    for stratum, count in sorted(Counter(strata).items()):
        ends = np.rint(np.cumsum(shares) * count).astype(int)
        wanted[stratum] = np.diff(ends, prepend=0).tolist()
        if wanted[stratum][0] == 0 and shares[0]:
            wanted[stratum][int(np.argmax(wanted[stratum]))] -= 1
            wanted[stratum][0] = 1
    members: dict[int, list[int]] = {}
    for row, number in enumerate(groups):
        members.setdefault(number, []).append(row)
    whole = list(members.values())
    shuffled = [whole[i] for i in np.random.default_rng(seed).permutation(len(whole))]
    able = [i for i, share in enumerate(shares) if share]
    part = [0] * len(groups)
    for rows in sorted(shuffled, key=len, reverse=True):
        counts = Counter(strata[row] for row in rows)
        best = max(able, key=lambda i: sum(wanted[s][i] * n for s, n in counts.items()))
        for stratum, count in counts.items():
            wanted[stratum][best] -= count
        for row in rows:
            part[row] = best
    return part
