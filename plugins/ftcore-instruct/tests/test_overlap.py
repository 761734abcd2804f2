"""Overlap: equal to counting n-grams by hand, whichever way round a row is."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftcore_instruct._formats import Chat, Task
from ftcore_instruct._overlap import Overlap, texts

words = st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f"]), max_size=14).map(" ".join)


def naive(text: str, n: int) -> set[tuple[str, ...]]:
    """The n-grams of a text; a shorter one is its sorted words."""
    found = re.findall(r"\w+", text.lower())
    if not found:
        return {(text.strip(),)}
    if len(found) < n:
        return {tuple(sorted(found))}
    return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}


@settings(max_examples=150, deadline=None)
@given(
    evaluated=st.lists(words, min_size=1, max_size=4),
    trained=st.lists(words, max_size=5),
    n=st.integers(1, 5),
)
def test_hits_are_those_of_brute_force(evaluated: list[str], trained: list[str], n: int) -> None:
    """A training row hits where it holds more than the share of an evaluated row's grams."""
    known = Overlap(n=n, share=0.4)
    for i, text in enumerate(evaluated):
        known.add([text], str(i))
    expected = [
        [i for i, e in enumerate(evaluated) if len(naive(e, n) & naive(t, n)) > 0.4 * len(naive(e, n))]
        for t in trained
    ]
    assert list(known.hits([t] for t in trained)) == expected


QUESTION = "Which of the two rivers that meet at Koblenz is the longer one, and by how much?"


@pytest.mark.parametrize(
    "row",
    [
        Task(task="t", input=QUESTION, target="the Rhine"),
        Task(task="t", input="the Rhine", target=QUESTION),
        Task(task="t", input="Answer: the Rhine. What was asked?", target=QUESTION),
        Task(task="t", input="x", target="y", rationale=f"We ask: {QUESTION.lower()} The Rhine!"),
        Chat(
            messages=[
                {"role": "user", "content": "Once more: " + QUESTION},
                {"role": "assistant", "content": "Rhine"},
            ]
        ),
    ],
)
def test_turned_around_forms_are_found(row: Task | Chat) -> None:
    """Question to answer, answer to question, inside reasoning or a chat."""
    known = Overlap()
    known.add(texts(Task(task="rivers", input=QUESTION, target="the Rhine")), "rivers")
    assert list(known.hits([texts(row)])) == [[0]]


def test_short_rows_match_as_a_whole_in_any_order() -> None:
    """Below n words a row is compared whole: '2 + 3' is not '2 + 4', and signs count."""
    known = Overlap()
    known.add(["2 + 3", "5"], "sums")
    rows = [["5", "2 + 3"], ["2 + 4", "6"], ["2 - 3", "5"], ["2 + 3", "5", ""]]
    assert list(known.hits(rows)) == [[0], [], [], [0]]


def test_nothing_evaluated_nothing_hit() -> None:
    """Without evaluated rows no row overlaps."""
    assert list(Overlap().hits([["a b c"]])) == [[]]


def test_a_question_without_input_is_its_instruction() -> None:
    """Short answers alone do not make two of Alpaca's rows alike."""
    one, other = (Task(task="t", input="", instruction=f"Is {x} so?", target="Yes") for x in "ab")
    known = Overlap()
    known.add(texts(one), "t")
    assert list(known.hits([texts(one), texts(other)])) == [[0], []]
