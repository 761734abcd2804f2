"""Near-duplicates: equal to a comparison of every pair, whatever the order of rows."""

import random
from itertools import combinations

import numpy as np
import pytest

from ftcore.duplicates import group, normalise

WORDS = [
    "".join(random.Random(i).choices("abcdefghijklmnop", k=random.Random(i).randint(2, 9)))
    for i in range(300)
]


def similarity(one: str, other: str) -> float:
    """Jaccard similarity of two texts' 4-grams, by sets of strings."""
    padded = (f" {normalise(text)} ".ljust(4) for text in (one, other))
    a, b = ({text[i : i + 4] for i in range(len(text) - 3)} for text in padded)
    return len(a & b) / len(a | b)


def brute_force(texts: list[str], threshold: float) -> list[int]:
    """Groups by comparing all pairs: each row's is the smallest index that it is joined to."""
    of = list(range(len(texts)))
    for i, j in combinations(range(len(texts)), 2):
        if similarity(texts[i], texts[j]) >= threshold:
            of = [of[i] if group == of[j] else group for group in of]
    return of


def is_same(one: list[int], other: list[int]) -> bool:
    """Whether two labellings part the rows alike."""
    return len(set(zip(one, other, strict=True))) == len(set(one)) == len(set(other))


@pytest.fixture
def texts() -> list[str]:
    """90 texts, and of every third one or more changed versions."""
    rng = random.Random(3)
    made = []
    for i in range(90):
        words = rng.choices(WORDS, k=rng.randint(1, 25))
        made.append(" ".join(words))
        for _ in range(i % 3):
            changed = list(words)
            changed[rng.randrange(len(words))] = rng.choice(WORDS)
            made.append(" ".join(changed).upper() + "!" * rng.randint(0, 2))
    rng.shuffle(made)
    return made


@pytest.mark.parametrize("threshold", [0.7, 0.85])
def test_groups_are_those_of_all_pairs(texts: list[str], threshold: float) -> None:
    """The exact similarity decides; no group of two texts is missed in this set."""
    found = group(texts, threshold).tolist()
    expected = brute_force(texts, threshold)
    assert len(set(expected)) < len(texts)
    assert is_same(found, expected)


def test_groups_do_not_depend_on_the_order(texts: list[str]) -> None:
    """The same texts in another order fall into the same groups."""
    order = np.random.default_rng(0).permutation(len(texts))
    assert is_same(group([texts[i] for i in order]).tolist(), group(texts)[order].tolist())


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("Where is my parcel?", "where is  my PARCEL", True),
        ("Ｗｈｅｒｅ is my parcel", "where is my parcel", True),  # noqa: RUF001
        ("Where is my parcel, I ordered it on Monday", "Where is my parcle, I ordered it on Monday", True),
        ("Where is my parcel", "I want my money back", False),
        ("set an alarm for 7 am", "set an alarm for 8 pm", False),
        ("!!", "??", False),
        ("a", "a.", True),
        ("a", "b", False),
    ],
)
def test_what_counts_as_alike(one: str, other: str, alike: bool) -> None:
    """Case, width, punctuation and a typo do not make another text; another number or word does."""
    first, second = group([one, other]).tolist()
    assert (first == second) is alike


def test_many_copies_are_one_group() -> None:
    """A bucket as large as the data costs no comparison of all pairs."""
    found = group([f"{'the same words again and again ' * 3}{i}" for i in range(3000)])
    assert len(set(found.tolist())) == 1


@pytest.mark.parametrize("texts", [[], [""], ["", " "], ["a"]])
def test_next_to_nothing_has_groups(texts: list[str]) -> None:
    """No row, one row, empty rows."""
    assert len(group(texts)) == len(texts)
