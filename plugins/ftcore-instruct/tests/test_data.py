"""Splits: directories as sources, held-out tasks, overlapping rows, limits, streams, wrong configs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftcore import UserError

Open = Callable[..., Any]
Write = Callable[[str, Any], Path]
LONG = "the {} of {} that was seen on the hills near the old town last {}"


def rows(count: int, task: str) -> list[dict[str, Any]]:
    """Rows with long inputs that share no 8-gram."""
    words = [(f"{task}thing{i}", f"{task}kind{i}", f"{task}day{i}") for i in range(count)]
    return [
        {
            "input": " ".join(f"{w} {task}{i}{j}" for j, w in enumerate(words[i] * 4)),
            "target": f"a{i}",
            "task": task,
        }
        for i in range(count)
    ]


@pytest.fixture
def folder(write: Write) -> Path:
    """Three task files; the third has rows of the first, one turned around."""
    a, b, c = rows(8, "alpha/one"), rows(6, "beta/two"), rows(5, "gamma/three")
    c[1]["input"], c[1]["target"] = a[2]["target"], a[2]["input"]
    c[3]["input"] = "Please say: " + a[5]["input"]
    for name, part in (("a", a), ("b", b), ("c", c)):
        path = write(f"tasks/{name}.jsonl", part)
    return path.parent


def kept(plugin: Any, split: str = "train") -> dict[str, list[int]]:
    """The rows of each source that are used."""
    return {s.name: s.kept.tolist() for s in plugin._splits.items[split].sources}


def test_held_out_tasks_are_evaluated_and_kept_out_with_what_overlaps(opened: Open, folder: Path) -> None:
    """By id, and by n-grams: the turned-around row too; the report names both."""
    plugin, prepared, _ = opened({"data.train": folder}, held_out=["alpha/*"], overlap="drop")
    assert kept(plugin) == {"b": list(range(6)), "c": [0, 2, 4]}
    assert kept(plugin, "validation") == {"a": list(range(8))}
    report = plugin._splits.overlap
    assert (report["rows"], report["evaluated"], report["evaluated_overlapping"]) == (2, 8, 2)
    assert report["by_source"] == {"c": 2}
    assert report["by_evaluated_task"] == {"alpha/one": 2}
    assert report["first"] == ["c row 1 and a row 2", "c row 3 and a row 5"]
    assert prepared.splits["validation"].column("task") == ["alpha/one"] * 8


def test_overlap_policies(opened: Open, folder: Path) -> None:
    """Report leaves the rows, error ends the run, off does not look."""
    options: dict[str, Any] = {"held_out": ["alpha/*"]}
    plugin, _, _ = opened({"data.train": folder}, overlap="report", **options)
    assert (kept(plugin)["c"], plugin._splits.overlap["rows"]) == (list(range(5)), 2)
    with pytest.raises(UserError, match=r"2 training rows overlap .* \(the first: c row 1 and a row 2\)"):
        opened({"data.train": folder}, overlap="error", **options)
    assert opened({"data.train": folder}, overlap="off", **options)[0]._splits.overlap == {}


def test_search_is_made_once_for_the_same_data(opened: Open, folder: Path, monkeypatch: Any) -> None:
    """Every rank opens the data; only the first process looks for overlap."""
    from ftcore_instruct import _data

    opened({"data.train": folder}, held_out=["beta/*"], overlap="drop", overlap_share=0.4)
    monkeypatch.setattr(_data, "_search", None)
    opened({"data.train": folder}, held_out=["beta/*"], overlap="drop", overlap_share=0.4)


def test_held_out_pattern_that_fits_nothing_is_an_error(opened: Open, folder: Path) -> None:
    """A misspelt task would be trained on, and not be evaluated."""
    with pytest.raises(UserError, match="held_out: no task is named 'alhpa/"):
        opened({"data.train": folder}, held_out=["alhpa/*"])
    with pytest.raises(UserError, match="nothing is left to train on"):
        opened({"data.train": folder}, held_out=["*"])


def test_number_of_tasks_grows_by_adding(opened: Open, folder: Path) -> None:
    """The tasks of a small run are among those of a larger one."""
    names = [set(kept(opened({"data.train": folder}, num_tasks=n)[0])) for n in (1, 2, 3)]
    assert [len(n) for n in names] == [1, 2, 3]
    assert names[0] < names[1] < names[2]
    with pytest.raises(UserError, match="num_tasks=4: there are 3 sources to choose from"):
        opened({"data.train": folder}, num_tasks=4)


def test_sources_with_reasons_are_beside_the_number_of_tasks(
    opened: Open, folder: Path, write: Write
) -> None:
    """So a run on one task can be had with and without chains of thought."""
    write("tasks/why.jsonl", [{**r, "rationale": "so"} for r in rows(4, "why")])
    plugin, prepared, _ = opened({"data.train": folder}, num_tasks=1, cot=1.0)
    assert len(kept(plugin)) == 2
    assert "why" in kept(plugin)
    assert sum(prepared.splits["train"].column("cot")) == 4


def test_held_out_tasks_are_evaluated_beside_a_split(opened: Open, folder: Path) -> None:
    """The rows that `data.split` gives to validation, and every held-out one; none is trained on."""
    shares = {"data.train": folder, "data.split": [0.5, 0.5, 0.0]}
    plugin, _, _ = opened(shares, held_out=["alpha/*"])
    assert kept(plugin, "validation")["a"] == list(range(8))
    assert "a" not in kept(plugin)
    assert [len(kept(plugin, s)["b"]) for s in ("train", "validation")] == [3, 3]
    with pytest.raises(UserError, match="cuts the training data; take"):
        opened({**shares, "data.validation": folder})


def test_floor_of_a_task_that_is_not_evaluated(opened: Open, folder: Path) -> None:
    """A misspelt one would leave the average as it is; other rows may be evaluated later."""
    given = {"data.train": folder, "data.validation": folder / "a.jsonl"}
    assert opened(given, floors={"alpha/one": 5.0})[0]._splits.no_floor == ""
    plugin = opened(given, floors={"alpha/on": 5.0})[0]
    with pytest.raises(UserError, match=r"no evaluated task is named 'alpha/on'; did you mean 'alpha/one'\?"):
        plugin.on_train_start(None)


def test_limit_and_split_are_over_all_sources(opened: Open, folder: Path) -> None:
    """`data.limit` keeps so many rows of a split, `data.split` cuts each source by its shares."""
    plugin, prepared, _ = opened({"data.train": folder, "data.limit.train": 7})
    assert sum(map(len, kept(plugin).values())) == len(prepared.splits["train"]) == 7
    plugin, _, _ = opened({"data.train": folder, "data.split": [0.5, 0.25, 0.25]})
    parts = [kept(plugin, s) for s in ("train", "validation", "test")]
    assert sorted(parts[0]["a"] + parts[1]["a"] + parts[2]["a"]) == list(range(8))
    assert [len(p["a"]) for p in parts] == [4, 2, 2]


def test_streams_and_other_files_are_read_like_json_lines(opened: Open, write: Write, tmp_path: Path) -> None:
    """A streamed parquet file, a JSON array and JSON lines give the same rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = rows(9, "t")
    lines = write("x/t.jsonl", data)
    parquet, array = tmp_path / "y" / "t.parquet", tmp_path / "z" / "t.json"
    for path in (parquet, array):
        path.parent.mkdir()
    pq.write_table(pa.Table.from_pylist(data), parquet)
    array.write_text(json.dumps(data))
    made = [
        opened({"data.train": p, "data.streaming": s})[1].splits["train"]
        for p, s in ((lines, False), (array, False), (parquet, False), (parquet, True))
    ]
    texts = [[m[i]["input_ids"].tolist() for i in range(9)] for m in made]
    assert texts[0] == texts[1] == texts[2] == texts[3]


def test_streamed_directory_has_a_source_a_file(opened: Open, folder: Path, write: Write) -> None:
    """Files of unlike columns too; `data.limit` takes the first rows of all of them."""
    write("tasks/d.jsonl", [{"prompt": f"{i}?", "completion": "x"} for i in range(4)])
    stream = {"data.train": folder, "data.streaming": True}
    assert kept(opened(stream)[0]) == kept(opened({"data.train": folder})[0])
    assert {n: len(r) for n, r in kept(opened({**stream, "data.limit.train": 11})[0]).items()} == {
        "a": 8,
        "b": 3,
    }


def test_stream_is_written_once_and_limited_to_its_first_rows(
    opened: Open, write: Write, monkeypatch: Any, tmp_path: Path
) -> None:
    """No more of a stream is read than is asked for; later processes read what the first wrote."""
    from ftcore.prepare import cache_root

    def written() -> dict[Path, int]:
        return {f: f.stat().st_mtime_ns for f in (cache_root() / "instruct").rglob("train*")}

    monkeypatch.setenv("FTCORE_CACHE", str(tmp_path / "own"))
    path = write("t.jsonl", rows(9, "t"))
    stream = {"data.train": path, "data.streaming": True}
    assert len(opened({**stream, "data.limit.train": 4})[1].splits["train"]) == 4
    assert kept(opened({**stream, "data.limit.train": 4})[0]) == {"t": [0, 1, 2, 3]}
    assert len(opened(stream)[1].splits["train"]) == 9
    before = written()
    assert len(before) == 2
    opened(stream)
    assert written() == before


def test_encoder_decoder_rows(opened: Open, folder: Path) -> None:
    """T5's rows: the prompt for the encoder, the answer with its end as labels, all usable."""
    t5 = {"model.path": "ftcore:tiny_t5", "task.name": "seq2seq"}
    _, prepared, hooks = opened({"data.train": folder, **t5}, held_out=["alpha/*"])
    tokenizer, row = hooks.load_tokenizer(), prepared.splits["validation"][0]
    assert tokenizer.decode(row["labels"]) == "a0</s>"
    assert tokenizer.decode(row["input_ids"]).endswith("\n</s>")
    assert prepared.audits["train"].dropped == 0


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        ({}, {"sources": {"x": {"pat": "a"}}}, "sources.x has no 'pat'; did you mean 'path'"),
        ({}, {"sources": {"x": {"path": "./no.jsonl"}}}, "sources.x.path: no such file"),
        ({}, {"sources": {"x": {"path": "tasks", "few_shot": 2}}}, "few_shot must be a share, 0 to 1, got 2"),
        ({}, {"sources": {"x": {}}}, "sources.x has no path"),
        (
            {"data.train": "tasks"},
            {"sources": {"x": {"path": "tasks"}}},
            "both data.train and plugin.instruct.sources",
        ),
        ({}, {"sources": {"x": "tasks/"}}, "sources.x must be {path: ...}, got 'tasks/'"),
        ({}, {"sources": {"x": {"path": "tasks", "cap": 2.5}}}, "cap must be a whole number"),
        ({}, {"sources": {"x": {"path": "tasks", "cap": 0}}}, "cap must be a whole number, at least 1"),
        ({}, {"sources": {"x": {"path": "tasks", "shots": 1.5}}}, "shots must be a whole number"),
        ({}, {"sources": {"x": {"path": "tasks", "weight": "two"}}}, "weight must be a number"),
        ({}, {"sources": {"x": {"path": "tasks", "format": "tsk"}}}, "format must be one of auto"),
        ({}, {"sources": {"x": {"path": "tasks", "split": "dev"}}}, "sources.x.split is for a hub id"),
        (
            {"data.streaming": True},
            {"sources": {"x": {"path": "tasks"}}},
            "data.streaming does nothing for plugin.instruct.sources",
        ),
        ({"data.train": "tasks"}, {"system": "Be short."}, "plugin.instruct.system does nothing"),
        ({"data.train": "tasks", "data.columns.group": "g"}, {}, "data.columns.group does nothing"),
        (
            {"data.train": "tasks", "task.name": "seq2seq", "model.path": "ftcore:tiny_t5"},
            {"generate": False},
            "plugin.instruct.generate=false makes no answers to measure rougeL by",
        ),
        ({"data.train": "tasks"}, {"templates": "none.yaml"}, "templates: can't read none.yaml"),
        ({"data.train": "tasks"}, {"chat_template": "none.jinja"}, "chat_template: can't read none.jinja"),
    ],
)
def test_wrong_configs_are_one_line(
    opened: Open, folder: Path, monkeypatch: Any, overrides: Any, options: Any, message: str
) -> None:
    """What can't work, or would do nothing, is refused before any row is formatted."""
    monkeypatch.chdir(folder.parent)
    with pytest.raises(UserError) as caught:
        opened(overrides, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_broken_line_is_named(opened: Open, write: Write) -> None:
    """File and row of what is no JSON."""
    path = write("t.jsonl", rows(3, "t"))
    path.write_text(path.read_text() + '{"input": "x", \n')
    with pytest.raises(UserError, match=r"t.jsonl row 3 \(0-based\) is broken JSON"):
        opened({"data.train": path})
    path.write_text('{"input": "\\ud83d", "target": "x"}\n')
    with pytest.raises(UserError, match=r"t.jsonl row 0 \(0-based\) holds a lone surrogate \(.ud83d\)"):
        opened({"data.train": path})


def test_blank_lines_are_no_rows(opened: Open, tmp_path: Path) -> None:
    """Lines of white space alone, and those of Windows, whatever ends the file."""
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'\r\n{"input": "a", "target": "b"}\r\n \t\n\n {"input": "c", "target": "d"}\r\n  ')
    plugin, _, _ = opened({"data.train": path})
    assert [item["answer"] for item in plugin._splits.items["train"]] == ["b", "d"]


def test_delimiter_of_csv_files_is_the_configs(opened: Open, tmp_path: Path) -> None:
    """As core reads them: a file that could be read in two ways is read in the one that is said."""
    (tmp_path / "t.csv").write_text("input,a;target,b\n1,2;3,4\n")
    with pytest.raises(UserError, match="columns input, a;target, b"):
        opened({"data.train": tmp_path / "t.csv", "data.csv.delimiter": ","})
    with pytest.raises(UserError, match="columns input,a, target,b"):
        opened({"data.train": tmp_path / "t.csv", "data.csv.delimiter": ";"})
