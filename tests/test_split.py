"""`data.split`: labels in proportion, near-duplicates together, by the split's seed alone."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftcore import UserError
from ftcore.data import load
from ftcore.split import assign

SHARES = [0.8, 0.1, 0.1]


def test_singles_are_shared_out_exactly() -> None:
    """Without duplicates each stratum has its rounded share of every part."""
    strata = ["often"] * 80 + ["rare"] * 20
    part = assign(range(100), strata, SHARES, seed=0)
    counts = Counter(zip(strata, part, strict=True))
    assert [counts["often", i] for i in range(3)] == [64, 8, 8]
    assert [counts["rare", i] for i in range(3)] == [16, 2, 2]


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 12), st.sampled_from("abc")), min_size=1, max_size=60),
    seed=st.integers(0, 3),
)
def test_groups_stay_together_and_every_stratum_is_trained(rows: list[tuple[int, str]], seed: int) -> None:
    """No group is on two sides; where rows are enough, no part is left to chance."""
    groups, strata = [g for g, _ in rows], [s for _, s in rows]
    part = assign(groups, strata, SHARES, seed)
    assert len(set(zip(groups, part, strict=True))) == len(set(groups))
    singles = assign(range(len(rows)), strata, SHARES, seed)
    assert {s for s, p in zip(strata, singles, strict=True) if p == 0} == set(strata)
    assert part == assign(groups, strata, SHARES, seed)


def test_part_without_a_share_gets_nothing() -> None:
    """A share of 0 is no row, however large a group."""
    assert set(assign([0] * 9 + [1], ["a"] * 10, [0.5, 0.5, 0.0], seed=0)) <= {0, 1}


def test_seed_decides_which_rows() -> None:
    """Another seed is another split, of the same sizes."""
    one, other = (assign(range(50), ["a"] * 50, SHARES, seed) for seed in (0, 1))
    assert one != other
    assert Counter(one) == Counter(other)


def test_near_duplicates_are_on_one_side(config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Reworded rows share the side of their originals; their number is said."""
    rng = np.random.default_rng(0)
    texts = [" ".join("".join(rng.choice(list("abcdefghij"), 6)) for _ in range(8)) for _ in range(60)]
    rows = [{"text": t, "label": "ab"[i % 2], "of": i} for i, t in enumerate(texts)]
    rows += [{"text": f"{texts[i].upper()}!", "label": "ab"[i % 2], "of": i} for i in range(0, 60, 2)]
    splits = load(config({"data.split": SHARES}, train=rows))
    where: dict[int, set[str]] = {}
    for name, split in splits.items():
        for row in split:
            where.setdefault(row["of"], set()).add(name)
    assert sum(len(split) for split in splits.values()) == len(rows)
    assert all(len(names) == 1 for names in where.values())
    assert "30 near-duplicates, each beside its like" in capsys.readouterr().err


def test_split_needs_the_whole_data(config: Any) -> None:
    """A stream can't be cut."""
    with pytest.raises(UserError, match=r"data\.split needs the whole data set"):
        load(config({"data.split": SHARES, "data.streaming": True}))


def test_hash_of_a_split_is_of_its_rows(config: Any, hooks: Any) -> None:
    """Arms of a comparison share it whatever they train; another split seed does not."""
    from ftcore.models import load_tokenizer
    from ftcore.prepare import prepare

    rows = [{"text": json.dumps(i) * 5, "label": "ab"[i % 2]} for i in range(40)]

    def hashes(**overrides: Any) -> list[str]:
        cfg = config({"data.split": SHARES, **overrides}, train=rows)
        return [audit.sha256 for audit in prepare(hooks(cfg), load_tokenizer(cfg)).audits.values()]

    first = hashes()
    assert len(set(first)) == 3
    assert hashes(**{"seed": 3, "data.max_length": 64, "model.path": "ftcore:tiny_llama"}) == first
    assert hashes(**{"data.split_seed": 1}) != first
