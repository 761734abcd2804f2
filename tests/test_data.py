"""Raw data: each format read, cuts and limits, and errors that say which file and line."""

import collections
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from ftcore import UserError
from ftcore.config import Config, HubData
from ftcore.data import fingerprint, guess_columns, label_names, load

JSONL = '{"text": "good", "label": "yes"}\n{"text": "bad, \\"so\\"", "label": "no"}\n'
CSV = 'text,label\ngood,yes\n"bad, ""so""",no\n'
ROWS = [{"text": "good", "label": "yes"}, {"text": 'bad, "so"', "label": "no"}]


def put(path: Path, content: str | bytes) -> str:
    """Write a file, with its directories."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def read(config: Any, path: str, **overrides: Any) -> list[dict[str, Any]]:
    """The training rows of a path."""
    return list(load(config({"data.train": path, **overrides}))["train"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", JSONL),
        ("rows.json", "[" + JSONL.strip().replace("\n", ",\n") + "]"),
        ("rows.csv", CSV),
        ("rows.tsv", 'text\tlabel\ngood\tyes\n"bad, ""so"""\tno\n'),
    ],
)
def test_each_text_format_gives_the_same_rows(config: Any, tmp_path: Path, name: str, content: str) -> None:
    """Quotes and commas in a field survive in every format."""
    assert read(config, put(tmp_path / name, content)) == ROWS


def test_parquet_is_read(config: Any, tmp_path: Path) -> None:
    """A parquet file gives its rows."""
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert read(config, str(tmp_path / "rows.parquet")) == ROWS


def test_directory_is_its_files_in_order(config: Any, tmp_path: Path) -> None:
    """Files of one kind are read by name; other files in the directory are not data."""
    put(tmp_path / "d" / "b.jsonl", '{"text": "second"}\n')
    put(tmp_path / "d" / "a.jsonl", '{"text": "first"}\n')
    put(tmp_path / "d" / "README.md", "about")
    assert read(config, str(tmp_path / "d")) == [{"text": "first"}, {"text": "second"}]


@pytest.mark.parametrize("other", ["a.csv", "a.tsv"])
def test_directory_of_several_kinds_is_an_error(config: Any, tmp_path: Path, other: str) -> None:
    """Kinds are not mixed: a tab-separated file is not read with commas, either."""
    put(tmp_path / "d" / other, CSV if other == "a.csv" else CSV.replace(",", "\t"))
    put(tmp_path / "d" / "b.jsonl" if other == "a.csv" else tmp_path / "d" / "b.csv", JSONL)
    with pytest.raises(UserError, match="mixes"):
        read(config, str(tmp_path / "d"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", JSONL + '{"text": "cut o\n', r"a\.jsonl line 3 is broken JSON"),
        ("a.jsonl", JSONL + "7\n", r"a\.jsonl line 3 is no JSON object"),
        ("a.csv", CSV + "one,two,three\n", r"a\.csv line 4: 3 fields, the header has 2"),
        ("a.csv", CSV + "one\n", r"a\.csv line 4: 1 fields, the header has 2"),
        ("a.csv", "text,text\na,b\n", r"a\.csv: 2 columns are called 'text'"),
        (
            "a.jsonl",
            JSONL + '{"text": "half \\ud83d"}\n',
            r"a\.jsonl line 3 holds a lone surrogate \(\\ud83d\)",
        ),
        ("a.json", '[{"text": "a"}, 7]', r"a\.json, entry 1 \(0-based\) is no JSON object"),
        ("a.csv", "text,label\n", r"a\.csv has no rows"),
        ("a.jsonl", "", r"a\.jsonl is empty"),
        ("a.txt", "text", r"can't read '\.txt' files .*known: \.jsonl"),
        ("b.jsonl", JSONL, r"no such file: .*a\.jsonl; did you mean 'b\.jsonl'\?"),
    ],
)
def test_broken_file_is_named_with_its_line(
    config: Any, tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    """What is wrong with a file, where, in one line."""
    put(tmp_path / "data" / name, content)
    wanted = "a.jsonl" if name == "b.jsonl" else name
    with pytest.raises(UserError, match=message) as caught:
        read(config, str(tmp_path / "data" / wanted))
    assert "\n" not in str(caught.value)


def test_words_that_pandas_takes_for_missing_stay_words(config: Any, tmp_path: Path) -> None:
    """A label `None` or a text `NA` of a CSV file is that word; an empty field is empty."""
    rows = read(config, put(tmp_path / "a.csv", "text,label\nNA,None\nnull,yes\n"))
    assert rows == [{"text": "NA", "label": "None"}, {"text": "null", "label": "yes"}]


def split_ids(config: Any, path: str, **overrides: Any) -> dict[str, list[int]]:
    """The `id` column of every split."""
    return {name: list(rows["id"]) for name, rows in load(config({"data.train": path, **overrides})).items()}


@pytest.fixture
def numbered(tmp_path: Path) -> str:
    """100 rows without a common word, of which every fifth is rare."""
    words = [hashlib.sha256(bytes([i])).hexdigest() for i in range(100)]
    lines = [
        f'{{"id": {i}, "text": "{word}", "label": "{"often" if i % 5 else "rare"}"}}'
        for i, word in enumerate(words)
    ]
    return put(tmp_path / "numbered.jsonl", "\n".join(lines))


def test_cut_keeps_each_label_in_proportion_and_every_row_once(config: Any, numbered: str) -> None:
    """80/10/10 of 100 rows with 20 rare ones has 16, 2 and 2 of those."""
    parts = split_ids(config, numbered, **{"data.split": [0.8, 0.1, 0.1]})
    assert {name: len(ids) for name, ids in parts.items()} == {"train": 80, "validation": 10, "test": 10}
    assert sorted(i for ids in parts.values() for i in ids) == list(range(100))
    rare = {name: sum(i % 5 == 0 for i in ids) for name, ids in parts.items()}
    assert rare == {"train": 16, "validation": 2, "test": 2}


def test_cut_depends_on_the_split_seed_alone(config: Any, numbered: str) -> None:
    """Another training seed leaves the splits; another split seed does not."""
    first, again, other = (
        split_ids(config, numbered, **{"data.split": [0.5, 0.5, 0.0], "data.split_seed": s, "seed": t})
        for s, t in ((1, 0), (1, 9), (2, 0))
    )
    assert first == again
    assert first != other
    assert list(first) == ["train", "validation"]


def test_cut_of_given_splits_is_an_error(config: Any, numbered: str) -> None:
    """`data.split` beside a validation file is refused with the cure."""
    overrides = {"data.split": [0.8, 0.1, 0.1], "data.validation": numbered}
    with pytest.raises(UserError, match=r"data\.split cuts data\.train alone.*=null"):
        split_ids(config, numbered, **overrides)


def test_limit_takes_a_shuffled_part_of_each_split(config: Any, numbered: str) -> None:
    """A limit draws rows by the split seed, not the file's first; a larger one keeps all."""
    overrides = {"data.validation": numbered, "data.limit.train": 10, "data.limit.validation": 1000}
    parts = split_ids(config, numbered, **overrides)
    assert len(set(parts["train"])) == 10
    assert sorted(parts["train"]) != list(range(10))
    assert parts["validation"] == list(range(100))
    assert split_ids(config, numbered, **overrides) == parts


@pytest.mark.parametrize(("count", "expected"), [(20, [18, 2]), (50, [45, 5]), (3, [2, 1]), (1, [1, 0])])
def test_limit_keeps_the_labels_in_proportion(
    config: Any, tmp_path: Path, count: int, expected: list[int]
) -> None:
    """Of 90 rows to 10, and each at least once; a smaller draw is part of a larger one, a seed's differ."""
    rows = [{"text": str(i), "label": "rare" if i % 10 == 0 else "usual"} for i in range(100)]
    path = put(tmp_path / "uneven.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def drawn(limit: int, seed: int = 0) -> Any:
        overrides = {"data.train": path, "data.limit.train": limit, "data.split_seed": seed}
        return load(config(overrides))["train"]

    labels = list(drawn(count)["label"])
    counts = sorted((labels.count("usual"), labels.count("rare")), reverse=True)
    assert counts == expected
    assert set(drawn(count)["text"]) <= set(drawn(count + 20)["text"])
    assert count == 1 or set(drawn(count)["text"]) != set(drawn(count, 1)["text"])


@pytest.mark.parametrize(
    ("values", "expected"),
    [(["b", "a", "b"], ["a", "b"]), ([10, 2, 10], ["2", "10"]), ([True, False], ["False", "True"])],
)
def test_label_names_are_sorted_distinct_values(values: list[Any], expected: list[str]) -> None:
    """Numbers sort as numbers; a missing label is no class."""
    import datasets

    assert label_names(datasets.Dataset.from_dict({"label": [*values, None]}), "label") == expected


def test_label_names_of_a_class_label_and_of_fractions() -> None:
    """A feature's own order stands; fractions are no classes, but whole numbers read as such are."""
    import datasets

    feature = datasets.Features({"label": datasets.ClassLabel(names=["world", "sports"])})
    assert label_names(datasets.Dataset.from_dict({"label": [1]}, feature), "label") == ["world", "sports"]
    for values in ([0.5, 1.0], ["0.5", "1"], ["-1e-3", "2"]):
        with pytest.raises(
            UserError, match=r"'label' holds fractions \(.*which task is meant\?.*task=classify"
        ):
            label_names(datasets.Dataset.from_dict({"label": values}), "label")
    with pytest.raises(UserError, match="'label' holds lists; classification takes one label a row"):
        label_names(datasets.Dataset.from_dict({"label": [["a"], ["a", "b"]]}), "label")


def test_label_names_of_numbers_written_as_text() -> None:
    """The fields of a CSV file sort as the numbers that they are, one word among them makes all words."""
    import datasets

    for values, expected in ((["10", "9"], ["9", "10"]), (["10", "9", "x"], ["10", "9", "x"])):
        assert label_names(datasets.Dataset.from_dict({"label": values}), "label") == expected


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_streamed_rows_are_those_that_are_loaded(config: Any, tmp_path: Path, name: str) -> None:
    """Several files of a kind, in order, with the limit; nothing is left in the cache."""
    import pandas

    from ftcore.readers import cache_root

    for part in (1, 2):
        frame = pandas.DataFrame({"text": [f"{part} {i}" for i in range(30)], "label": "y"})
        path = tmp_path / "d" / f"{part}{name}"
        path.parent.mkdir(exist_ok=True)
        if name == "a.csv":
            frame.to_csv(path, index=False)
        elif name == "a.jsonl":
            frame.to_json(path, orient="records", lines=True)
        else:
            frame.to_parquet(path, row_group_size=7)
    loaded = read(config, str(tmp_path / "d"))
    assert [row["text"] for row in loaded] == [f"{part} {i}" for part in (1, 2) for i in range(30)]
    assert read(config, str(tmp_path / "d"), **{"data.streaming": True}) == loaded
    streamed = {"data.streaming": True, "data.limit.train": 40}
    assert read(config, str(tmp_path / "d"), **streamed) == loaded[:40]
    assert not list(cache_root().glob(".making-*"))


def test_files_of_a_directory_need_the_same_columns(config: Any, tmp_path: Path) -> None:
    """Columns in another order would put texts where labels belong."""
    put(tmp_path / "d" / "a.csv", CSV)
    put(tmp_path / "d" / "b.csv", "label,text\nyes,good\n")
    with pytest.raises(UserError, match=r"b\.csv has columns label, text; .*a\.csv has text, label"):
        read(config, str(tmp_path / "d"))


def test_how_a_csv_is_written_may_be_said(config: Any, tmp_path: Path) -> None:
    """`data.csv` is taken as it is; what Python does not know is named."""
    path = put(tmp_path / "a.csv", "text#label\n'tis #ä\n".encode("cp1250"))
    said = {"data.csv.delimiter": "#", "data.csv.quote": "", "data.csv.encoding": "cp1250"}
    assert read(config, path, **said) == [{"text": "'tis ", "label": "ä"}]
    with pytest.raises(UserError, match=r"data\.csv\.encoding: Python has no encoding 'cp125'"):
        read(config, path, **{"data.csv.encoding": "cp125"})


def test_text_of_a_csv_is_never_taken_for_a_number(config: Any, tmp_path: Path) -> None:
    """007 keeps its zeros, 1e3 and 2024-01-01 stay as they are written."""
    rows = read(config, put(tmp_path / "a.csv", "text,label\n007,1\n1e3,02\n2024-01-01,3\n"))
    assert [tuple(row.values()) for row in rows] == [("007", "1"), ("1e3", "02"), ("2024-01-01", "3")]


def test_zero_bytes_in_text_are_text(config: Any, tmp_path: Path) -> None:
    """A NUL is a character like others, in every format."""
    path = put(tmp_path / "a.jsonl", '{"text": "a\\u0000b", "label": "yes"}\n')
    assert read(config, path)[0]["text"] == "a\0b"
    assert read(config, put(tmp_path / "a.csv", "text,label\na\0b,yes\n"))[0]["text"] == "a\0b"


def test_cache_that_cannot_be_written_is_named(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What to set, in one line."""
    monkeypatch.setenv("FTCORE_CACHE", put(tmp_path / "file", "no directory"))
    with pytest.raises(UserError, match=r"can't write to the cache .*file .*set FTCORE_CACHE"):
        read(config, put(tmp_path / "a.jsonl", JSONL))


COLUMNS = "Kommentar;Klasse;id\nsehr gut;1;a\nschlecht gemacht;0;b\nnie wieder das;0;c\nimmer wieder;1;d\n"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "Message,Intent,channel\nhello there,a,mail\n", ("Message", "Intent")),
        ("a.jsonl", '{"sentence": "x", "stars": 3}\n', ("sentence", "stars")),
        ("a.json", '[{"review text": "x", "text": "y", "class": 3}]', ("text", "class")),
        ("a.csv", COLUMNS, ("Kommentar", "Klasse")),
        ("a.csv", CSV, ("text", "label")),
    ],
)
def test_columns_are_guessed_and_said(
    config: Any, tmp_path: Path, name: str, content: str, expected: tuple[str, str]
) -> None:
    """By usual names, else by what they hold; what the user set stays."""
    cfg = config({"data.train": put(tmp_path / name, content)})
    notes = guess_columns(cfg, [])
    assert (cfg.data.columns.text, cfg.data.columns.label) == expected
    assert any("guessed" in one and expected[0] in one for one in notes) is (expected != ("text", "label"))
    assert any("between fields" in one for one in notes) is (name == "a.csv")
    cfg = config({"data.train": put(tmp_path / name, content)})
    guess_columns(cfg, ["text", "label"])
    assert (cfg.data.columns.text, cfg.data.columns.label) == ("text", "label")


def test_columns_of_a_parquet_file_and_of_pairs_are_guessed(config: Any, tmp_path: Path) -> None:
    """The second text of a pair comes with the first."""
    import pandas

    frame = pandas.DataFrame({"premise": ["a"], "hypothesis": ["b"], "label": [1]})
    frame.to_parquet(tmp_path / "a.parquet")
    cfg = config({"data.train": str(tmp_path / "a.parquet")})
    assert guess_columns(cfg, []) == [
        "guessed data.columns.text=premise data.columns.text_pair=hypothesis"
        " (columns: premise, hypothesis, label)"
    ]
    assert (cfg.data.columns.text, cfg.data.columns.text_pair) == ("premise", "hypothesis")


def test_fingerprint_is_of_the_content(config: Any, tmp_path: Path) -> None:
    """One byte, a limit, or another split makes another fingerprint; another directory does not."""
    prints = [
        fingerprint(config({"data.train": put(tmp_path / folder / "a.jsonl", content), **more}), None)
        for folder, content, more in [
            ("one", JSONL, {}),
            ("two", JSONL, {}),
            ("three", JSONL.replace("good", "gold"), {}),
            ("one", JSONL, {"data.limit.train": 1}),
            ("one", JSONL, {"data.split_seed": 1}),
        ]
    ]
    assert prints[0] == prints[1]
    assert len(collections.Counter(prints)) == 4


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_text_that_looks_like_a_date_stays_as_it_is(
    config: Any, tmp_path: Path, name: str, streaming: bool
) -> None:
    """Arrow would take it for a time, and write it otherwise; also inside of lists."""
    rows = [
        {"text": "2024-05-01T10:00:00Z", "label": "2024-05-01", "n": 1, "turns": [{"content": "2023-01-02"}]},
        {"text": None, "label": "2024-06-02", "n": "two", "turns": []},  # a column of mixed kinds
    ]
    content = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(r) + "\n" for r in rows)
    assert read(config, put(tmp_path / name, content), **{"data.streaming": streaming}) == rows


def test_a_limit_of_a_stream_is_other_data_than_a_limit(config: Any, tmp_path: Path) -> None:
    """One takes the first rows, the other draws: they never share formatted rows."""
    cut = {"data.train": put(tmp_path / "a.jsonl", JSONL), "data.limit.train": 1}
    stream, whole = (fingerprint(config({**cut, "data.streaming": s}), None) for s in (True, False))
    assert stream != whole


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_data_are_known_by_their_bytes(config: Any, tmp_path: Path, suffix: str) -> None:
    """Not by path and time, as `datasets` does: a copy may keep the time."""
    seen, texts = [], ("good", "evil")
    for text in (*texts, *texts):
        content = f'{{"text": "{text}"}}\n' if suffix == ".jsonl" else f"text,n\n{text},1\n"
        path = put(tmp_path / f"rows{suffix}", content)
        os.utime(path, (1e9, 1e9))
        seen.append(load(config({"data.train": path}))["train"]._fingerprint)
    assert seen[:2] == seen[2:]
    assert seen[0] != seen[1]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_local_directory_as_hub_data_is_known_by_its_bytes(tmp_path: Path, streaming: bool) -> None:
    """Also where it is streamed, which leaves `datasets` nothing to tell it by."""
    cfg = Config(data=HubData(path=str(tmp_path / "hub"), streaming=streaming))
    seen = []
    for text in ("good", "evil", "good"):
        path = put(tmp_path / "hub" / "train.jsonl", f'{{"text": "{text}", "label": "a"}}\n')
        os.utime(path, (1e9, 1e9))
        seen.append(fingerprint(cfg, load(cfg)))
    assert seen[0] == seen[2] != seen[1]


def test_a_blank_label_is_none_and_padded_ones_are_an_error() -> None:
    """A class of its own would be made of each otherwise."""
    rows = [{"label": value} for value in ("yes", "", " ", None, "no")]
    assert label_names(rows, "label") == ["no", "yes"]
    with pytest.raises(UserError, match="outer space"):
        label_names([*rows, {"label": "yes "}], "label")
