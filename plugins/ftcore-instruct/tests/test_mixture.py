"""Mixtures: shares and caps, what a row is made of, and the same rows whenever they are drawn."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftcore import UserError
from ftcore_instruct._mixture import quotas

Open = Callable[..., Any]
Write = Callable[[str, Any], Path]


def rows(count: int, task: str, **extra: Any) -> list[dict[str, Any]]:
    """Rows of a task that are told apart by their texts."""
    return [
        {"instruction": f"Do {task}.", "input": f"{task}{i}?", "target": f"={i}", "task": task, **extra}
        for i in range(count)
    ]


def test_quotas_are_proportional_up_to_the_cap() -> None:
    """Flan's mixing: r = min(n, cap); weights scale it, fractions go to the largest remainders."""
    assert quotas([10, 1000, 50], [1, 1, 1], [None, 40, 40]) == [10, 40, 40]
    assert quotas([100, 100], [3, 1], [None, None]) == [150, 50]
    assert quotas([100, 100, 100], [1, 1, 1], [None] * 3, total=10) == [4, 3, 3]
    assert quotas([1, 10_000], [1, 1], [None, None], total=100) == [1, 99]
    assert quotas([5, 5], [0, 1], [None, None]) == [0, 10]
    with pytest.raises(UserError, match="weight 0"):
        quotas([5], [0], [None])


@settings(max_examples=100, deadline=None)
@given(
    sources=st.lists(
        st.tuples(st.integers(1, 500), st.floats(0.1, 9), st.none() | st.integers(1, 99)),
        min_size=1,
        max_size=9,
    )
)
def test_quotas_sum_up_and_stay_within_one_of_their_share(sources: list[Any]) -> None:
    """However many sources: nothing is lost to rounding, but that each source gives a row at least."""
    sizes, weights, caps = zip(*sources, strict=True)
    got = quotas(sizes, weights, caps)
    counts = np.minimum(sizes, [c or n for n, c in zip(sizes, caps, strict=True)])
    exact = counts.sum() * counts * weights / (counts * weights).sum()
    assert sum(got) == max(counts.sum(), sum(np.maximum(np.floor(exact), 1)))
    assert all(e - 1 <= g <= e + 1 for g, e in zip(got, exact, strict=True))


@pytest.fixture
def mixed(opened: Open, write: Write) -> Callable[..., Any]:
    """`mixed(overrides, option=...)`: three sources of 40, 400 and 8 rows, weighted and capped."""
    paths = {n: write(f"{n}.jsonl", rows(k, n)) for n, k in (("a", 40), ("b", 400), ("c", 8))}
    given = {"a": {"weight": 1.5}, "b": {"cap": 60}, "c": {"weight": 2.0}}

    def make(overrides: Any = None, **options: Any) -> Any:
        sources = {n: {"path": str(paths[n]), **given[n]} for n in paths}
        merged = {"train.epochs": 5, **(overrides or {})}
        return opened(merged, **{"sources": sources, "few_shot": 0.5, "shots": 3, **options})

    return make


def order(made: Any, seed: int = 0) -> Any:
    """The epochs' order, and the source and example of each stored row."""
    _, prepared, hooks = made
    train = prepared.splits["train"]
    sampler = hooks.build_sampler(train, 8, seed)
    return sampler.order, np.asarray(train.column("source")), np.asarray(train.column("example"))


def test_shares_of_every_epoch_and_of_its_beginning(mixed: Any) -> None:
    """Each epoch has the quotas exactly; any part of it within the error of sampling."""
    epochs, source, _ = order(mixed())
    assert epochs.rows_per_epoch == 40 + 60 + 8
    shares = np.array(epochs.quotas) / 108
    assert np.allclose(shares, np.array([60, 60, 16]) / 136, atol=1 / 108)
    for epoch in range(5):
        drawn = source[epochs(epoch)]
        assert np.bincount(drawn).tolist() == epochs.quotas
        half = np.bincount(drawn[:54], minlength=3) / 54
        assert np.all(np.abs(half - shares) < 4 * np.sqrt(shares * (1 - shares) / 54))


def test_capped_source_walks_on_and_a_small_one_starts_over(mixed: Any) -> None:
    """Epochs of a capped source take other rows until all were had; a repeated one has each equally often."""
    epochs, source, example = order(mixed())
    seen = {s: Counter[int]() for s in range(3)}
    for epoch in range(5):
        drawn = epochs(epoch)
        for s in range(3):
            seen[s].update(example[drawn[source[drawn] == s]].tolist())
    assert max(seen[1].values()) == 1
    assert len(seen[1]) == 5 * epochs.quotas[1] < 400
    assert max(seen[2].values()) - min(seen[2].values()) <= 1
    assert len(seen[2]) == 8


def test_each_time_an_example_is_trained_it_has_another_form(mixed: Any) -> None:
    """The k-th pass takes the k-th form of up to `variants`: other exemplars, templates and separators."""
    prepared = mixed(variants=3)[1]
    train = prepared.splits["train"]
    forms: dict[tuple[int, int], set[bytes]] = {}
    for i in range(len(train)):
        row = train[i]
        forms.setdefault((row["source"], row["example"]), set()).add(row["input_ids"].tobytes())
    small = [len(f) for (s, _), f in forms.items() if s == 2]
    assert len(small) == 8
    assert np.mean(small) > 2
    assert max(train.column("variant")) == 2


def test_mixture_is_the_same_anywhere_and_after_a_resume(
    mixed: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    """Made again elsewhere, rows and order are equal; an epoch in the middle needs none before it."""
    first = mixed()
    monkeypatch.setenv("FTCORE_CACHE", str(tmp_path / "elsewhere"))
    again = mixed()
    a, b = first[1].splits["train"], again[1].splits["train"]
    assert first[1].fingerprint == again[1].fingerprint
    assert [a[i]["input_ids"].tolist() for i in range(len(a))] == [
        b[i]["input_ids"].tolist() for i in range(len(b))
    ]
    one, two = order(first)[0], order(again)[0]
    before = [one(e).tolist() for e in range(4)]
    assert two(3).tolist() == before[3]
    assert order(first, seed=1)[0](3).tolist() != before[3]


def test_cache_key_holds_every_choice(mixed: Any) -> None:
    """Another seed of the forms, share or epoch count makes other files; the run's seed does not."""
    keys = [
        mixed()[1].fingerprint,
        mixed({"data.split_seed": 1})[1].fingerprint,
        mixed({"train.epochs": 9})[1].fingerprint,
        mixed(few_shot=0.4)[1].fingerprint,
        mixed(variants=2)[1].fingerprint,
    ]
    assert len(set(keys)) == len(keys)
    assert mixed({"seed": 5})[1].fingerprint == keys[0]


def items(plugin: Any) -> list[dict[str, Any]]:
    """What the mixture hands to the encoder."""
    return list(plugin._splits.items["train"])


def test_exemplars_are_of_the_same_task_and_never_the_row_or_its_double(opened: Open, write: Write) -> None:
    """Rows of two tasks in one file, one row doubled: exemplars never give the answer away."""
    data = rows(6, "sum") + rows(6, "word") + rows(1, "sum") + rows(1, "lonely")
    plugin, _, _ = opened(
        {"data.train": write("t.jsonl", data), "train.epochs": 8}, few_shot=1.0, shots=5, variants=8
    )
    shown = Counter[int]()
    for item in items(plugin):
        task, own = item["task"], item["prompt"].split("?")[0].split()[-1]
        shown[len(item["shots"])] += 1
        for shot in item["shots"]:
            assert ("lonely" in task) is False
            assert task in shot
            assert f"{own}?" not in shot
        assert len(set(item["shots"])) == len(item["shots"])
    assert shown.keys() == {0, 1, 2, 3, 4, 5}
    assert shown[0] == 8  # the task of one row has no exemplars


def test_shares_of_forms(opened: Open, write: Write) -> None:
    """Few-shot, options, reasoning and inversion occur as often as asked, within the error of sampling."""
    data = [{**r, "rationale": "Because.", "choices": ["=1", "x"]} for r in rows(400, "a")]
    path = write("t.jsonl", data)
    plugin, _, _ = opened({"data.train": path}, few_shot=0.3, options=0.6, cot=0.2, shots=2)
    got = items(plugin)
    share = {
        "few": np.mean([bool(i["shots"]) for i in got]),
        "options": np.mean(["Options:" in i["prompt"] for i in got]),
        "cot": np.mean([i["answer"].startswith("Because.") for i in got]),
    }
    for name, wanted in (("few", 0.3), ("options", 0.6), ("cot", 0.2)):
        assert abs(share[name] - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / 400), name
    write("t.jsonl", rows(400, "a"))
    turned = items(opened({"data.train": path}, invert=0.25, few_shot=0.0)[0])
    assert abs(np.mean([i["answer"].startswith("a") for i in turned]) - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 400)


def test_listed_options_are_shuffled(opened: Open, write: Write) -> None:
    """The right answer has no fixed place in the list."""
    data = [{**r, "target": "yes", "choices": ["yes", "no", "maybe"]} for r in rows(60, "a")]
    plugin, _, _ = opened({"data.train": write("t.jsonl", data)}, options=1.0, few_shot=0.0)
    places = Counter(i["prompt"].split("Options:\n")[1].split("\n").index("- yes") for i in items(plugin))
    assert min(places[p] for p in range(3)) > 8


def test_source_that_runs_dry(mixed: Any) -> None:
    """It is repeated, or its share shrinks, or the run fails with its name: never the mixture ends."""
    assert order(mixed(dry="drop"))[0].quotas[2] == 8
    assert order(mixed())[0].quotas[2] == 13
    with pytest.raises(UserError, match="source 'a' runs dry: an epoch takes 48 rows, it has 40"):
        order(mixed(dry="error"))


def test_unusable_rows_of_a_source_leave_its_others_once_an_epoch(opened: Open, write: Write) -> None:
    """Bad rows are dropped by name, and nothing takes their place a second time."""
    data = rows(20, "a")
    data[3]["target"] = data[11]["target"] = ""
    path = write("t.jsonl", data)
    with pytest.raises(UserError, match=r"2 of 20 .*2 empty answer \(t row 3, t row 11\); mend them"):
        opened({"data.train": path})
    epochs, _, example = order(opened({"data.train": path, "data.max_dropped": 0.1}))
    assert sorted(example[epochs(0)].tolist()) == [i for i in range(20) if i not in (3, 11)]


def test_short_run_formats_only_what_it_can_train_on(opened: Open, write: Write) -> None:
    """With `train.steps` an epoch is no longer than the run; shares stay."""
    paths = write("many/a.jsonl", rows(300, "a")), write("many/b.jsonl", rows(100, "b"))
    made = opened({"data.train": paths[0].parent, "train.steps": 5, "train.batch_size": 8})
    assert len(made[1].splits["train"]) == 40
    epochs, source, _ = order(made)
    assert np.bincount(source[epochs(0)]).tolist() == [30, 10]


def test_table_counts_what_the_rows_were_made_with(mixed: Any) -> None:
    """Rows of each source, those of an epoch, and how many have exemplars, options, reasons."""
    made = mixed()
    order(made)
    table = {row["source"]: row for row in made[0]._table}
    assert [table[name]["rows"] for name in "abc"] == [40, 400, 8]
    assert [table[name]["per_epoch"] for name in "abc"] == [48, 47, 13]
    drawn = items(made[0])
    for number, name in enumerate("abc"):
        own = [item for item in drawn if item["source"] == number]
        assert table[name]["formatted"] == len(own)
        assert table[name]["few_shot"] == sum(bool(item["shots"]) for item in own) > 0
        assert table[name]["options"] == table[name]["cot"] == table[name]["inverted"] == 0


def test_exemplars_without_tasks_share_the_instruction(opened: Open, write: Write) -> None:
    """Alpaca's rows have nothing in common; what has no input is told apart by its choices."""
    alpaca = [{"instruction": f"Do {i % 2}.", "input": f"n{i}", "output": "x"} for i in range(12)]
    alpaca += [{"instruction": f"Alone {i}?", "output": "y"} for i in range(4)]
    path = write("t.jsonl", alpaca)
    for item in items(opened({"data.train": path}, few_shot=1.0, shots=3)[0]):
        own = item["prompt"].split(".")[0].split()[-1]
        assert all(f"Do {own}." in shot for shot in item["shots"])
        assert bool(item["shots"]) is ("Alone" not in item["prompt"])
        assert "Input:" not in item["prompt"] or "n" in item["prompt"]
    chosen = [{"instruction": "Which?", "choices": [f"{i} a", f"{i} b"]} for i in range(5)]
    chosen = [{**r, "input": "", "target": r["choices"][0], "task": "w"} for r in (*chosen, chosen[0])]
    shown = [i["shots"] for i in items(opened({"data.train": write("w.jsonl", chosen)}, few_shot=1.0)[0])]
    assert all(shots for shots in shown)
    assert not any("0 a" in shot for shots in (shown[0], shown[5]) for shot in shots)


@pytest.mark.parametrize("number", range(4))
def test_templates_of_rows_without_input_have_no_empty_field(number: int) -> None:
    """The instruction is the question; with an input both are there."""
    from ftcore_instruct._formats import Task
    from ftcore_instruct._templates import Choice, Templates

    def prompt(**fields: str) -> str:
        task = Task(task="t", target="t", instruction="Say it.", **fields)
        return Templates().render(task, Choice(template=number))[0]

    without, both = prompt(input=""), prompt(input="This.")
    assert without.count("Say it.") == both.count("Say it.") == both.count("This.") == 1
    assert "Input:" not in without
    assert "\n\n" not in without
    assert not without.startswith("\n")


def test_exemplars_of_rows_with_an_instruction_alone(opened: Open, write: Write) -> None:
    """Where it is the question, rows of a task are each other's exemplars."""
    data = [{"instruction": f"Say {i}.", "input": "", "target": f"={i}", "task": "say"} for i in range(5)]
    drawn = items(opened({"data.train": write("t.jsonl", [*data, data[0]])}, few_shot=1.0)[0])
    assert all(item["shots"] for item in drawn)
    assert not any("Say 0." in shot for i in (0, 5) for shot in drawn[i]["shots"])


def test_exemplars_have_what_their_form_is_made_of(opened: Open, write: Write) -> None:
    """Turned around to its reasons, a row has exemplars with reasons; to its input, with inputs."""
    data = [{**r, "rationale": "Because." if i % 2 else ""} for i, r in enumerate(rows(30, "a"))]
    data += [{"instruction": f"Alone {i}?", "input": "", "target": "x", "task": "a"} for i in range(30)]
    plugin, _, _ = opened(
        {"data.train": write("t.jsonl", data), "train.epochs": 4}, few_shot=1.0, invert=1.0, cot=0.0
    )
    turned = [item for item in items(plugin) if item["form"]["inverted"]]
    reasoned = [item for item in turned if "Because." in item["prompt"] + item["answer"]]
    assert len(reasoned) > 10
    assert all("Because." in shot for item in reasoned for shot in item["shots"])
    assert not any("Alone" in shot for item in turned for shot in item["shots"])


def test_evaluated_answers_are_those_of_the_template(opened: Open, write: Write, tmp_path: Path) -> None:
    """Targets and choices are compared as the model was taught to say them, without reasons."""
    (tmp_path / "t.yaml").write_text(
        "'*':\n- prompt: '{{ input }}{% if cot %} Why?{% endif %}'\n"
        "  answer: '{% if cot %}{{ rationale }} {% endif %}= {{ target }}'\n"
    )
    row = {"input": "1 + 1", "target": "2", "targets": ["two"], "choices": ["1", "2"], "rationale": "So."}
    path, template = write("t.jsonl", [row]), str(tmp_path / "t.yaml")
    given = {"data.train": path, "data.validation": path}
    plugin, prepared, _ = opened(given, templates=template)
    (item,) = plugin._splits.items["validation"]
    assert (item["answer"], item["targets"]) == ("= 2", ["= 2", "= two"])
    assert (item["choices"], item["choice"]) == (["= 1", "= 2"], 1)
    found = prepared.splits["validation"][0]
    ends = found["choice_lengths"].cumsum()
    assert (
        found["choice_ids"][ends[0] : ends[1]].tolist() == found["labels"][found["labels"] != -100].tolist()
    )
    assert (found["target"], found["choice"]) == ("= 2", 1)
    (item,) = opened(given, templates=template, eval_cot=True)[0]._splits.items["validation"]
    assert (item["prompt"], item["answer"]) == ("1 + 1 Why?", "So. = 2")
    assert (item["targets"], item["choices"]) == (["= 2", "= two"], [])  # not scored before the reasons
