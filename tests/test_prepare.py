"""Prepared data: what the cache's key depends on, what the audit counts, and when it fails the run."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftcore import Dropped, UserError, hookimpl, plugin
from ftcore.batches import make_batch
from ftcore.models import load_tokenizer
from ftcore.prepare import Prepared, cache_root, prepare
from ftcore.tasks import TASKS

ROWS = [{"text": "abcd" * (1 + i % 3), "label": "yn"[i % 2]} for i in range(12)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own cache for each test."""
    monkeypatch.setenv("FTCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


@pytest.fixture
def made(config: Any, hooks: Any) -> Any:
    """`made(overrides, plugin, ..., train=ROWS)`: prepared data."""

    def make(overrides: dict[str, Any] | None = None, *plugins: Any, **splits: Any) -> Prepared:
        cfg = config(overrides, **{"train": ROWS, **splits})
        return prepare(hooks(cfg, *plugins), load_tokenizer(cfg))

    return make


def rows(prepared: Prepared, split: str = "train") -> list[dict[str, Any]]:
    """The rows of a split as plain values."""
    found = [prepared.splits[split][i] for i in range(len(prepared.splits[split]))]
    return [{k: v.tolist() if hasattr(v, "tolist") else v for k, v in row.items()} for row in found]


@plugin()
class Numbers:
    """Formats every text as `count` tokens; fails on the text that it is told."""

    count: int = 2
    hates: str = "nothing"

    @hookimpl
    def format_examples(self, examples: Any) -> Any:
        for example in examples:
            if example["text"] == self.hates:
                raise ValueError(f"{self.hates} has no turns")
        return [{"input_ids": [7] * self.count, "labels": 0} for _ in examples]


def test_rows_are_the_texts_bytes_between_start_and_end(made: Any) -> None:
    """The byte tokenizer's rows, checked by hand; labels are indices of the sorted names."""
    prepared = made(train=[{"text": "ab", "label": "y"}, {"text": "é", "label": "n"}])
    a, b = rows(prepared)
    assert prepared.labels == ["n", "y"]
    assert (len(a["input_ids"]), a["labels"], a["row"]) == (4, 1, 0)
    assert (len(b["input_ids"]), b["labels"], b["row"]) == (4, 0, 1)
    assert a["input_ids"][0] == b["input_ids"][0] == 1
    assert a["input_ids"][-1] == b["input_ids"][-1] == 2


def test_second_time_comes_from_the_cache_with_equal_rows(made: Any, cache: Path) -> None:
    """Nothing is written again: the files are the same ones, and no scratch is left."""
    first = made()
    before = {f: f.stat().st_mtime_ns for f in cache.rglob("*") if f.is_file()}
    second = made()
    assert {f: f.stat().st_mtime_ns for f in cache.rglob("*") if f.is_file()} == before
    assert rows(first) == rows(second)
    assert first.audits == second.audits
    left = [d.name for d in cache.iterdir() if not d.name.startswith(".lock-")]
    assert left == [first.fingerprint]


def test_key_depends_on_whatever_changes_the_rows(made: Any) -> None:
    """Length, tokenizer, columns, data, task, and the formatter's options each make other files."""
    more = [{**row, "other": row["text"]} for row in ROWS]
    plain = made(train=more).fingerprint
    others = [
        made({"data.max_length": 64}, train=more),
        made({"model.path": "ftcore:tiny_llama"}, train=more),
        made({"data.columns.text": "other"}, train=more),
        made({"task.name": "causal_lm"}, train=more),
        made({}, Numbers(), train=more),
        made(train=more[1:]),
    ]
    assert len({plain, *(p.fingerprint for p in others)}) == 1 + len(others)
    assert made({"seed": 5, "optim.lr": 0.1}, train=more).fingerprint == plain
    # The source is of the data alone: equal where only the formatting differs.
    assert [p.source == made(train=more).source for p in others] == [True] * 5 + [False]


def test_data_of_a_plugin_is_not_taken_for_that_of_the_files(made: Any) -> None:
    """A plugin that reads other data beside the same config gets its own rows, not the cached ones."""

    @plugin()
    class Loads:
        text: str = "from a plugin"

        @hookimpl
        def load_data(self) -> Any:
            import datasets

            return {"train": datasets.Dataset.from_dict({"text": [self.text] * 2, "label": ["n", "y"]})}

    files = made()
    by_plugin, by_other = made({}, Loads()), made({}, Loads(text="other"))
    assert [len(r["input_ids"]) for r in rows(by_plugin)] == [15, 15]
    assert [len(r["input_ids"]) for r in rows(by_other)] == [7, 7]
    assert len({files.fingerprint, by_plugin.fingerprint, by_other.fingerprint}) == 3


def test_file_that_changes_while_it_is_read_is_an_error(made: Any, tmp_path: Path, cache: Path) -> None:
    """Rows of new bytes are never kept under the name of the old ones."""

    @plugin()
    class Appends:
        @hookimpl
        def format_examples(self, examples: Any) -> Any:
            with (tmp_path / "train.jsonl").open("a") as file:
                file.write('{"text": "late", "label": "y"}\n')
            return [{"input_ids": [1], "labels": 0} for _ in examples]

    with pytest.raises(UserError, match="changed while it was read"):
        made({}, Appends())
    assert not list(cache.rglob("meta.json"))
    assert not list(cache.parent.glob(".making-*"))


def test_audit_counts_what_became_of_every_example(made: Any) -> None:
    """Rows, tokens, cut tokens and dropped examples, checked by hand."""
    texts = ["abc", "a" * 10, " ", "ab"]  # 5, 12 and 4 tokens with start and end; one is empty
    overrides = {"data.max_length": 8, "data.max_dropped": 0.5}
    audit = made(overrides, train=[{"text": t, "label": "yn"[i % 2]} for i, t in enumerate(texts)]).audits[
        "train"
    ]
    assert (audit.examples, audit.rows, audit.dropped, audit.masked) == (4, 3, 1, 0)
    assert (audit.tokens, audit.trained_tokens, audit.longest) == (5 + 8 + 4, 17, 12)
    assert (audit.truncated, audit.truncated_tokens) == (1, 4)
    assert audit.unusable == [2]


@plugin()
class Picky:
    """Drops empty texts with a reason, and names the place where the text is `far`."""

    @hookimpl
    def format_examples(self, examples: Any) -> Any:
        good = {"input_ids": [7], "labels": 0}
        bad = {"": Dropped("empty text"), "far": Dropped("empty text", "b.jsonl row 9")}
        return [bad.get(e["text"], good) for e in examples]


def test_reasons_of_dropped_examples_are_counted_and_shown(made: Any) -> None:
    """A formatter's `Dropped` reaches the error, with its own place or the row's number."""
    train = [{"text": t, "label": "yn"[i % 2]} for i, t in enumerate(["a", "", "b", "far"])]
    with pytest.raises(UserError, match=r"2 of 4 .*: 2 empty text \(row 1, b.jsonl row 9\); mend them"):
        made({}, Picky(), train=train)
    audit = made({"data.max_dropped": 0.5}, Picky(), train=train).audits["train"]
    assert (audit.rows, audit.dropped, audit.reasons) == (2, 2, {"empty text": [2, "row 1", "b.jsonl row 9"]})


def test_a_split_may_be_any_iterable_with_a_fingerprint(made: Any) -> None:
    """`load_data` may return an own type: the rows are read by iterating, and kept by its fingerprint."""

    class Own:
        column_names = ("text", "label")

        def __init__(self, fingerprint: str) -> None:
            self.fingerprint, self.reads = fingerprint, 0

        def __iter__(self) -> Any:
            self.reads += 1
            return iter([{"text": "a", "label": "y"}, {"text": "b", "label": "n"}])

    @plugin()
    class Brings:
        split: Any = None

        @hookimpl
        def load_data(self) -> Any:
            return {"train": self.split}

    splits = [Own("one"), Own("one"), Own("two")]
    one, again, two = (made({}, Brings(split=s)).fingerprint for s in splits)
    assert one == again != two
    assert splits[1].reads == 0


@pytest.mark.parametrize("path", ["ftcore:tiny_llama", "ftcore:tiny_t5", "ftcore:tiny_bert"])
def test_audited_tokens_are_those_that_training_counts(open_tiny: Any, path: str) -> None:
    """`trained_tokens` is the sum of the loop's unit `tokens` over one epoch."""
    task = {"ftcore:tiny_llama": "causal_lm", "ftcore:tiny_t5": "seq2seq"}.get(path, "classify")
    train = [{**row, "target": "xyz"} for row in ROWS]
    overrides = {"task.name": task, "data.max_length": 9, "data.max_truncated": 1.0}
    job = open_tiny({"model.path": path, **overrides}, train=train)
    source = job.prepared.splits["train"]
    batches = [make_batch(job, source, np.array([row]), 0) for row in range(len(source))]
    counted = sum(TASKS[task].count_tokens(batch) for batch in batches)
    assert job.prepared.audits["train"].trained_tokens == counted


def test_masked_rows_are_counted_and_fail_the_run(made: Any) -> None:
    """A row whose labels are all -100 trains on nothing: it is unusable, with its number."""

    @plugin()
    class Masks:
        @hookimpl
        def format_examples(self, examples: Any) -> Any:
            labels = [[-100, -100] if len(e["text"]) == 12 else [-100, 5] for e in examples]
            return [{"input_ids": [4, 5], "labels": one} for one in labels]

    with pytest.raises(UserError, match=r"4 of 12 rows .*\(rows \[2, 5, 8, 11\], 0-based\)"):
        made({"model.path": "ftcore:tiny_llama", "task.name": "causal_lm"}, Masks())


@pytest.mark.parametrize("bad", [1, 2, 3, 5])
def test_cure_that_the_error_proposes_works(made: Any, bad: int) -> None:
    """Setting what the message says, to the digit, lets the run go on."""
    long = [{**row, "text": "a" * 40} if i < bad else row for i, row in enumerate(ROWS)]
    empty = [{**row, "text": " "} if i < bad else row for i, row in enumerate(ROWS)]
    for key, data in (("data.max_truncated", long), ("data.max_dropped", empty)):
        overrides = {"data.max_length": 30, key: 0.0}
        with pytest.raises(UserError, match=rf"{bad} of 12 rows in the train data") as caught:
            made(overrides, train=data)
        proposed = re.search(rf"{key}=([0-9.e-]+)", str(caught.value))
        assert proposed is not None
        made({**overrides, key: float(proposed[1])}, train=data)


def test_rows_cut_to_length_are_named(made: Any) -> None:
    """Too many truncated rows: how many, the limit, the longest, which, and both ways out."""
    train = [{**row, "text": "a" * (3 if i != 7 else 60)} for i, row in enumerate(ROWS)]
    expected = r"1 of 12 rows .*data\.max_length=20 tokens \(the longest has 62.*raise data\.max_length.*"
    with pytest.raises(UserError, match=expected) as caught:
        made({"data.max_length": 20, "data.max_truncated": 0.0}, train=train)
    assert re.search(r"\b7\b", str(caught.value)), "the row is not named"


def test_error_of_a_formatter_names_the_row(made: Any) -> None:
    """One bad example among many is found, in the split that it is in."""
    bad = [*ROWS[:5], {"text": "poison", "label": "y"}, *ROWS]
    with pytest.raises(UserError, match=r"validation data, row 5 \(0-based\): poison has no turns"):
        made({}, Numbers(hates="poison"), validation=bad)


def test_workers_make_the_same_rows_and_errors(made: Any, cache: Path) -> None:
    """Byte for byte, in order, under the same key; a refused row is named as by one process."""
    many = [{"text": f"{i} " + "ab" * (i % 40), "label": "yn"[i % 2]} for i in range(2500)]
    many[7]["text"], many[2049]["text"] = " ", "hated"

    def files() -> dict[str, bytes]:
        return {str(f.relative_to(cache)): f.read_bytes() for f in cache.rglob("*") if f.is_file()}

    overrides = {"data.max_dropped": 0.5}
    one = made(overrides, train=many)
    before = files()
    shutil.rmtree(cache)
    three = made(overrides | {"data.workers": 3}, train=many)
    assert files() == before
    assert three.fingerprint == one.fingerprint
    errors = []
    for workers in (1, 3):
        with pytest.raises(UserError, match=r"train data, row 2049 \(0-based\): hated has") as error:
            made({"data.workers": workers}, Numbers(hates="hated"), train=many)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_formatter_that_loses_examples_is_an_error(made: Any) -> None:
    """One entry per example is the contract; fewer would shift every row."""

    @plugin()
    class Loses:
        @hookimpl
        def format_examples(self, examples: Any) -> Any:
            return [{"input_ids": [1], "labels": 0} for _ in examples[1:]]

    with pytest.raises(UserError, match="loses returned 11 entries for 12 examples"):
        made({}, Loses())


def test_single_label_or_missing_column_is_an_error(made: Any) -> None:
    """Classification needs two classes and its column, and says which key names the column."""
    with pytest.raises(UserError, match=r"'label' has only the label \['y'\]"):
        made(train=[{"text": "a", "label": "y"}] * 2)
    with pytest.raises(UserError, match=r"no column 'txet' .*there are: text, label .*data\.columns\.text"):
        made({"data.columns.text": "txet"})


def test_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """FTCORE_CACHE, else XDG_CACHE_HOME."""
    assert cache_root() == tmp_path / "cache"
    monkeypatch.delenv("FTCORE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "ftcore"
