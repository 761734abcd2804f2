"""Near-duplicate texts: which rows must stay on one side of a split.

Candidates come from MinHash with banding (Broder, 1997; Indyk & Motwani, 1998), and each is checked by its
exact Jaccard similarity. The constants are fixed: two runs, or two machines, find the same groups.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.sparse.csgraph import connected_components

__all__ = ["group", "normalise"]

SIZE = 4  # characters of a shingle: a typo in 40 characters leaves a similarity of about 0.8
THRESHOLD = 0.7
BANDS, HASHES = 16, 4  # a pair at the threshold is missed with (1 - 0.7^4)^16 = 1.2%, at 0.8 with 0.02%
MAX_SHINGLES = 50_000_000  # of longer data an even share of all distinct shingles stands for all
NEIGHBOURS = 3  # within a bucket, a text is compared with the next few; chains join the rest
PAIRS = 100_000  # compared at once

Array = npt.NDArray[Any]


def normalise(text: str) -> str:
    """A text without regard to case, width, punctuation and space; one of nothing else keeps them."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"[\W_]+", " ", plain).strip() or plain.strip()


def group(texts: Sequence[str], threshold: float = THRESHOLD) -> Array:
    """The number of each text's group, int64 (rows,): those that a chain of near-duplicates joins.

    Two texts are near-duplicates where, normalised, they are equal or the Jaccard similarity of their
    sets of 4-grams is at least `threshold`.
    """
    index: dict[str, int] = {}
    distinct = np.array([index.setdefault(normalise(text), len(index)) for text in texts], dtype=np.int64)
    grams = _shingles(list(index))
    sizes = np.diff(grams.indptr)
    groups = np.arange(len(index))
    joined: list[Array] = []
    for pairs in _candidates(grams):
        pairs = pairs[:, groups[pairs[0]] != groups[pairs[1]]]  # what is joined need not be compared
        left, right = pairs
        common = _overlap(grams, left, right)
        joined.append(pairs[:, common >= threshold * (sizes[left] + sizes[right] - common)])
        first, second = np.concatenate(joined, axis=1)
        edges = sparse.coo_matrix((np.ones(len(first)), (first, second)), shape=(len(index), len(index)))
        groups = connected_components(edges, directed=False)[1]
    return np.asarray(groups[distinct], dtype=np.int64)


def _shingles(texts: Sequence[str]) -> Any:
    """Which text has which shingle, by hash: CSR of ones, int32 (texts, 2^31 - 1)."""
    share = np.uint32(-(-sum(map(len, texts)) // MAX_SHINGLES) or 1)
    rows, hashes = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
    for start in range(0, len(texts), 10_000):
        padded = [f" {text} ".ljust(SIZE) for text in texts[start : start + 10_000]]
        points = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), dtype="<u4")
        row = np.repeat(np.arange(len(padded)), [len(text) for text in padded])
        mixed = np.zeros(len(points) - SIZE + 1, dtype=np.uint64)
        for offset in range(SIZE):  # a polynomial modulo 2^64
            mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + points[offset : offset + len(mixed)]
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed >> np.uint64(33)) % np.uint64(2**31 - 1)
        kept = (row[: len(mixed)] == row[SIZE - 1 :]) & (mixed % share == 0)
        rows.append(start + row[: len(mixed)][kept])
        hashes.append(mixed[kept])
    where = (np.concatenate(rows), np.concatenate(hashes).astype(np.int32))
    ones = np.ones(len(where[0]), np.int32)
    found = sparse.csr_matrix((ones, where), shape=(len(texts), 2**31 - 1))
    found.data[:] = 1  # a shingle that a text has twice
    return found


def _candidates(grams: Any) -> Iterator[Array]:
    """Pairs of texts that agree on all hashes of a band, int64 (2, pairs), band by band."""
    full = np.flatnonzero(np.diff(grams.indptr))  # a text may have no shingle of the share
    starts = grams.indptr[full]
    if len(full) < 2:
        return
    values = grams.indices.astype(np.uint64)
    factors = np.random.default_rng(0).integers(2**62, 2**63, size=BANDS * HASHES, dtype=np.uint64) | 1
    for band in factors.reshape(BANDS, HASHES):
        key = np.zeros(len(full), dtype=np.uint64)
        for factor in band:
            mixed = values * factor
            mixed ^= mixed >> np.uint64(32)
            mixed *= factor
            key = key * np.uint64(0x9E3779B97F4A7C15) + np.minimum.reduceat(mixed, starts)
        order = np.argsort(key, kind="stable")
        found = []
        for distance in range(1, NEIGHBOURS + 1):
            same = np.flatnonzero(key[order[:-distance]] == key[order[distance:]])
            found.append(np.stack([full[order[same]], full[order[same + distance]]]))
        yield np.concatenate(found, axis=1)


def _overlap(grams: Any, left: Array, right: Array) -> Array:
    """Shingles that the texts of each pair have in common, int64 (pairs,)."""
    parts = [np.empty(0, np.int64)]
    for i in range(0, len(left), PAIRS):
        both = grams[left[i : i + PAIRS]].multiply(grams[right[i : i + PAIRS]])
        parts.append(np.asarray(both.sum(axis=1), dtype=np.int64).ravel())
    return np.concatenate(parts)
