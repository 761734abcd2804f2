"""Noise in texts: what each kind changes, how much, and that it is always the same."""

from types import SimpleNamespace
from typing import Any

import pytest

from ftcore import UserError
from ftcore_contrastive._noise import TextNoise, disturb

TEXT = " ".join(f"word{i}" for i in range(400))


@pytest.mark.parametrize("strength", [0.05, 0.1, 0.2, 0.4])
def test_as_many_words_change_as_the_strength_says(strength: float) -> None:
    """Within what chance allows for 400 words (four standard deviations)."""
    chance = 4 * (400 * strength * (1 - strength)) ** 0.5
    words = TEXT.split()
    typos = disturb(TEXT, "typo", strength).split()
    assert abs(sum(a != b for a, b in zip(words, typos, strict=True)) - 400 * strength) <= chance
    assert abs(400 - len(disturb(TEXT, "drop", strength).split()) - 400 * strength) <= chance
    swapped = disturb(TEXT, "swap", strength).split()
    assert sorted(swapped) == sorted(words)
    assert swapped != words


def test_a_text_gives_the_same_answer_whatever_came_before() -> None:
    """By text, kind and seed; at strength 0 it is the text itself, spaces and all."""
    assert disturb(TEXT, "typo", 0.3) == disturb(TEXT, "typo", 0.3)
    assert disturb(TEXT, "typo", 0.3, seed=1) != disturb(TEXT, "typo", 0.3)
    assert disturb("two  spaces\n", "drop", 0.0) == "two  spaces\n"


@pytest.mark.parametrize("kind", ["typo", "drop", "swap"])
def test_something_always_remains(kind: str) -> None:
    """Of one word, of one letter; an empty text stays empty, for the audit to count."""
    assert disturb("a", kind, 1.0)
    assert disturb("word", kind, 1.0)
    assert disturb("", kind, 1.0) == ""


def test_a_strength_is_a_probability() -> None:
    """Others are refused."""
    with pytest.raises(ValueError, match=r"strength must be in \[0, 1\], got 2"):
        TextNoise(strength=2)


def test_texts_that_are_not_there_are_not_passed_over() -> None:
    """Another plugin's formatter reads other columns, which would stay as they are without a word."""
    columns = SimpleNamespace(text="text", text_pair=None)
    cfg: Any = SimpleNamespace(data=SimpleNamespace(columns=columns))
    for columns.text, ends in (("text", StopIteration), ("body", UserError)):
        formatting: Any = TextNoise().format_examples([{"text": "some words"}], cfg, "train")
        next(formatting)
        with pytest.raises(ends) as raised:
            formatting.send([{}])
    assert "which is 'body'; there is no such column among text" in str(raised.value)
