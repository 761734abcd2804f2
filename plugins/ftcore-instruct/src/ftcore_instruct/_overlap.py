"""Training rows that hold what is evaluated: found by n-grams of words, whichever way round they are.

A row is its texts (input, target, reasoning; a chat's contents) without the instruction, which all rows
of a task share; where there is no input, the instruction is the question. An n-gram says nothing of which
text is the question, so turned-around forms are found too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ftcore_instruct._formats import Chat, Task

__all__ = ["Overlap", "grams", "texts"]

# A word, a character of a script that writes none, or a sign that arithmetic depends on.
WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|[-+*/=<>%^]"
)
BASE = np.uint64(0x9E3779B97F4A7C15)


def texts(row: Chat | Task) -> list[str]:
    """The texts by which a row is compared."""
    if isinstance(row, Chat):
        return [m["content"] for m in row.messages if m["role"] != "system"]
    return [row.input.strip() or row.instruction, row.target, row.rationale]


def grams(parts: Sequence[str], n: int) -> npt.NDArray[np.uint64]:
    """Hashes of the distinct n-grams of words of a row's texts, sorted.

    A row of fewer than n words is one gram: its words in sorted order.
    """
    words = [np.array([hash(w) for w in WORD.findall(p.lower())], np.int64).view(np.uint64) for p in parts]
    total = sum(map(len, words))
    if total == 0:
        return np.array([hash("".join(parts).strip())], np.int64).view(np.uint64)
    joined = np.concatenate(words)
    if total < n:
        return _rolled(np.sort(joined), total)
    return np.unique(_rolled(joined, n))


def _rolled(words: npt.NDArray[np.uint64], n: int) -> npt.NDArray[np.uint64]:
    """A hash of each window of n words: a polynomial in the words' hashes, modulo 2**64."""
    out = np.zeros(len(words) - n + 1, np.uint64)
    for i in range(n):
        out = out * BASE + words[i : len(words) - n + 1 + i]
    return out ^ (out >> np.uint64(29))


@dataclass
class Overlap:
    """What is evaluated, by its n-grams; `hits` asks whether a training row holds any of it.

    Args:
        n: words of a gram.
        share: a training row overlaps an evaluated one where it holds more than this share of its grams.
    """

    n: int = 8
    share: float = 0.5
    names: list[str] = field(default_factory=list)  # of each evaluated row: its task
    sizes: list[int] = field(default_factory=list)  # and its number of grams
    _parts: list[npt.NDArray[np.uint64]] = field(default_factory=list)
    _sorted: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = None

    def add(self, parts: Sequence[str], name: str) -> None:
        """Add a row that is evaluated."""
        found = grams(parts, self.n)
        self.names.append(name)
        self.sizes.append(len(found))
        self._parts.append(found)
        self._sorted = None

    def hits(self, rows: Iterable[Sequence[str]]) -> Iterator[list[int]]:
        """For each training row, the evaluated rows that it overlaps."""
        if not self._parts:
            yield from ([] for _ in rows)
            return
        if self._sorted is None:
            owners = np.repeat(np.arange(len(self.sizes)), self.sizes)
            everything = np.concatenate(self._parts)
            order = np.argsort(everything, kind="stable")
            self._sorted = everything[order], owners[order]
        known, owners = self._sorted
        for parts in rows:
            found = grams(parts, self.n)
            low, high = np.searchsorted(known, found, "left"), np.searchsorted(known, found, "right")
            here = np.flatnonzero(high > low)
            if not len(here):
                yield []
                continue
            count = Counter(o for i in here for o in owners[low[i] : high[i]].tolist())
            yield sorted(o for o, k in count.items() if k > self.share * self.sizes[o])
