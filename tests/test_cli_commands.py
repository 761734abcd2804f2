"""What is done with a trained model: evaluate, predict, diff, export; and before one: preview, prepare."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from .cli import make_data, make_plugin, make_rows, result, run_each, start, write_rows

COMMON = ["train.batch_size=8", "optim.lr=5e-3"]
AVERAGE = """
import torch
from ftcore import hookimpl, plugin

@plugin()
class Plugin:
    @hookimpl
    def eval_weights(self, shards):
        return {s.name: s.value * 0.5 for s in shards}
"""
FORMATTER = """
import os
from ftcore import hookimpl, plugin

@plugin()
class Plugin:
    @hookimpl(wrapper=True)
    def format_examples(self, split):
        with open(os.environ["CALLS"], "a") as file:
            file.write(f"{os.getpid()} {split}\\n")
        return (yield)
"""


def command_lines(tmp: Path) -> dict[str, list[str]]:
    """Trainings, then what is asked of them, in this order; a name for each."""
    second = "data.columns.text_pair=second"
    pairs = [*make_data(tmp / "classify", "classify"), *COMMON, second]
    pairs += ["data.columns.group=shop", "train.epochs=3"]
    text = [*make_data(tmp / "causal_lm", "causal_lm"), *COMMON, "train.steps=3", "data.max_length=40"]
    target = [*make_data(tmp / "seq2seq", "seq2seq"), *COMMON, "train.steps=8"]
    rows = make_rows("classify", 5, seed=3)
    new = [{"text": r["text"], "second": r["second"]} for r in rows]
    write_rows(tmp / "new.jsonl", [*new[:4], {"text": " ", "second": "x"}, new[4]])
    write_rows(tmp / "unknown.jsonl", [*rows, {**rows[0], "label": "angry"}])
    write_rows(tmp / "words.jsonl", [{"text": "money back return card " * 4}, {"text": "great"}])
    write_rows(tmp / "wrong.jsonl", [{"body": "x"}])
    plain = [*make_data(tmp / "classify", "classify"), *COMMON, "train.steps=2"]
    return {
        "train pairs": [*pairs, "hydra.run.dir=pairs"],
        "train other": [*pairs, "optim.lr=2e-2", "hydra.run.dir=other"],
        "train text": [*text, "hydra.run.dir=text"],
        "train target": [*target, "hydra.run.dir=target"],
        "train ranks": [*pairs, "trainer=ddp", "trainer.devices=2", "hydra.run.dir=ranks"],
        "train average": [*plain, "+plugin=average", "hydra.run.dir=average"],
        "train bare": [*plain, "data.validation=null", "data.test=null", "hydra.run.dir=bare"],
        **{f"evaluate {run}": ["evaluate", run] for run in ("pairs", "text", "target", "ranks", "average")},
        "evaluate model": ["evaluate", "pairs/model", "data=classify/test.jsonl", second, "--json"],
        "evaluate other labels": ["evaluate", "pairs", "data=unknown.jsonl"],
        "evaluate bare": ["evaluate", "bare"],
        "evaluate no data": ["evaluate", "pairs/model"],
        "evaluate nothing": ["evaluate", "pairs", "optim.lr=1"],
        "predict pairs": ["predict", "pairs", "new.jsonl"],
        "predict model": ["predict", "pairs/model", "new.jsonl", second, "--to", "answers.parquet"],
        "predict text": ["predict", "text", "words.jsonl"],
        "predict target": ["predict", "target", "words.jsonl"],
        "predict wrong": ["predict", "pairs", "wrong.jsonl"],
        "predict nowhere": ["predict", "./nowhere", "new.jsonl"],
        "prepare nothing": ["prepare", "model=pretrained", "model.path=org/none"],
        "preview text": ["preview", *text, "--rows", "1", "--split", "validation"],
        "preview pairs": ["preview", *pairs, "--rows", "2"],
        "preview target": ["preview", *target, "--rows", "1"],
        "diff": ["diff", "pairs", "other", "--json"],
        "diff words": ["diff", "pairs", "other"],
        "diff same": ["diff", "pairs", "ranks"],
        "export": ["export", "target", "--to", "out/half", "--dtype", "bf16", "--shard-size", "50KB"],
        "export again": ["export", "target", "--to", "out/half"],
    }


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The directory of all runs, and each command line's outcome by name."""
    tmp = tmp_path_factory.mktemp("commands")
    make_plugin(tmp / "site", "average", AVERAGE)
    lines = command_lines(tmp)
    ended = run_each(list(lines.values()), tmp, {"PYTHONPATH": str(tmp / "site")})
    outcomes = dict(zip(lines, ended, strict=True))
    for name, one in outcomes.items():
        if name.startswith("train"):
            assert one.returncode == 0, f"{name}\n{one.stdout}\n{one.stderr}"
    return tmp, outcomes


def ok(tree: tuple[Path, dict[str, Any]], name: str) -> str:
    """What a command that ended well printed."""
    ended = tree[1][name]
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    return str(ended.stdout)


def refused(tree: tuple[Path, dict[str, Any]], name: str) -> str:
    """The one line of a command that could not be followed."""
    ended = tree[1][name]
    assert (ended.returncode, ended.stdout) == (2, ""), f"{ended.stdout}\n{ended.stderr}"
    assert re.fullmatch(r"ftcore: error: [^\n]*\n", ended.stderr), ended.stderr
    return str(ended.stderr)


@pytest.mark.parametrize("run", ["pairs", "text", "target", "ranks", "average"])
def test_evaluate_gives_the_figures_of_the_run_to_the_last_digit(tree: Any, run: str) -> None:
    """Any task, two ranks, averaged weights: the exported model is the one that was evaluated."""
    assert "equal to result.json, to the last digit" in ok(tree, f"evaluate {run}")


def test_a_model_without_its_run_evaluates_the_same(tree: Any) -> None:
    """The model brings its labels and its task; batches may be others, so digits may differ."""
    metrics, ran = json.loads(ok(tree, "evaluate model")), result(tree[0] / "pairs")["metrics"]
    assert metrics["test/accuracy"] == ran["test/accuracy"]
    assert metrics["test/nll"] == pytest.approx(ran["test/nll"], rel=1e-6)


def test_evaluate_refuses_what_makes_no_figure(tree: Any) -> None:
    """Labels that the model does not know, no data, a setting that would do nothing."""
    assert re.search(
        r"unknown\.jsonl: .*know the labels 'angry' .*'praise'", refused(tree, "evaluate other labels")
    )
    assert "say data=FILE" in refused(tree, "evaluate bare")
    assert "data=FILE" in refused(tree, "evaluate no data")
    assert "'optim.lr=1' would do nothing here" in refused(tree, "evaluate nothing")


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_predict_agrees_with_plain_transformers_on_pairs(tree: Any) -> None:
    """Labels and probabilities of each row by itself; an empty text has its row, and null."""
    import torch
    import transformers

    answers = lines(ok(tree, "predict pairs"))
    folder = tree[0] / "pairs" / "model"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in (tree[0] / "new.jsonl").read_text().splitlines()]
    assert [a["row"] for a in answers] == list(range(6))
    assert answers[4] == {"row": 4, "prediction": None, "scores": None}
    assert "1 of 6 rows have an empty text" in tree[1]["predict pairs"].stderr
    for row, answer in zip(rows, answers, strict=True):
        if answer["prediction"] is None:
            continue
        inputs = tokenizer(row["text"], row["second"], return_tensors="pt")
        with torch.no_grad():
            chances = model(**inputs).logits[0].softmax(0).tolist()
        assert answer["scores"] == pytest.approx(
            dict(zip(model.config.id2label.values(), chances, strict=True)), rel=1e-5
        )
        assert answer["prediction"] == max(answer["scores"], key=answer["scores"].__getitem__)


def test_predict_by_the_model_writes_the_same_to_a_file(tree: Any) -> None:
    """`--to FILE.parquet`, from the model's directory instead of the run's."""
    ok(tree, "predict model")
    written = pyarrow.parquet.read_table(tree[0] / "answers.parquet").to_pylist()
    printed = lines(ok(tree, "predict pairs"))
    assert [w["prediction"] for w in written] == [p["prediction"] for p in printed]
    assert written[0]["scores"] == pytest.approx(printed[0]["scores"], rel=1e-6)


def test_predict_scores_texts_and_generates_targets(tree: Any) -> None:
    """A text longer than a window has one line, with the sums; `generate` needs no arguments to agree."""
    import torch
    import transformers

    folder = tree[0] / "text" / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    long, short = lines(ok(tree, "predict text"))
    ids = torch.tensor([tokenizer("great")["input_ids"] + [tokenizer.eos_token_id]])
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert short == {"row": 1, "nll": pytest.approx(loss * 6, rel=1e-5), "tokens": 6}
    assert (long["row"], long["tokens"]) == (0, 23 * 4 + 1)

    folder = tree[0] / "target" / "model"
    seq2seq = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    made = seq2seq.generate(**tokenizer("great", return_tensors="pt"))[0]
    answer = lines(ok(tree, "predict target"))[1]
    assert answer == {"row": 1, "prediction": tokenizer.decode(made, skip_special_tokens=True).strip()}


def test_predict_says_what_is_missing(tree: Any) -> None:
    """A column, a model."""
    assert "no column 'text'" in refused(tree, "predict wrong")
    assert "no such directory: " in refused(tree, "predict nowhere")


def test_prepare_says_what_it_can_not_fetch(tree: Any) -> None:
    """A hub's model without a network, in one line."""
    assert "model.path=org/none can't be fetched: " in refused(tree, "prepare nothing")


def test_preview_marks_what_is_trained(tree: Any) -> None:
    """All but the first token of a text, a label's name, a target under its source; then the audit."""
    text = make_rows("causal_lm", 12, seed=1)[0]["text"]
    shown = ok(tree, "preview text")
    assert f"<s>⟦{text}"[:30] in shown
    assert re.search(r"^validation +\d+ rows, [\d,]+ tokens, \d+% trained, longest \d+", shown, re.M)
    pairs = ok(tree, "preview pairs")
    assert "train example 1 " in pairs
    assert "label late delivery" in pairs
    assert "⟦" not in pairs
    assert re.search(r"^\w.*\n⟦late delivery</s>⟧$", ok(tree, "preview target"), re.M)


def test_diff_names_what_differs_and_the_rows_that_flipped(tree: Any) -> None:
    """Against the two prediction files; runs that differ in nothing that counts flip nothing."""
    report = json.loads(ok(tree, "diff"))
    assert report["config"] == {"optim.lr": [5e-3, 2e-2]}
    tables = [
        pyarrow.parquet.read_table(tree[0] / run / "predictions" / "test.parquet").to_pylist()
        for run in ("pairs", "other")
    ]
    pairs = list(zip(*tables, strict=True))
    flipped = [a["row"] for a, b in pairs if a["prediction"] != b["prediction"]]
    assert [f["row"] for f in report["rows"]["test"]["which"]] == flipped
    gained = sum(b["prediction"] == b["label"] != a["prediction"] for a, b in pairs)
    assert report["rows"]["test"]["only_second_right"] == gained
    assert f"test rows: {len(flipped)} of 12 have another prediction" in ok(tree, "diff words")
    same = ok(tree, "diff same")
    assert "trainer.strategy  single  |  ddp" in re.sub(r" +", "  ", same).replace("  |  ", "  |  ")
    assert "test rows: 0 of 12" in same


def test_export_shards_and_casts_and_never_overwrites(tree: Any) -> None:
    """It loads in the dtype asked for, with its card and its generation settings."""
    import torch
    import transformers

    ok(tree, "export")
    folder = tree[0] / "out" / "half"
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    whole = transformers.AutoModelForSeq2SeqLM.from_pretrained(tree[0] / "target" / "model")
    assert model.dtype == torch.bfloat16
    assert len(list(folder.glob("*.safetensors"))) > 1
    for name, value in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], value.to(torch.bfloat16)), name
    assert model.generation_config.max_new_tokens == 8
    assert "T5ForConditionalGeneration" in (folder / "README.md").read_text()
    assert [f.name for f in (tree[0] / "out").iterdir()] == ["half"]
    assert "is there already" in refused(tree, "export again")


def test_a_run_says_what_to_do_next(tree: Any) -> None:
    """The last line has commands that work as they stand; plugins have their time."""
    assert (
        ok(tree, "train pairs")
        .splitlines()[-1]
        .startswith("next: ftcore predict pairs FILE   ftcore evaluate pairs")
    )
    assert re.search(
        r"backward passes not counted\): average \d+\.\d\d ms a step \(\d+%\)", ok(tree, "train average")
    )


def test_twenty_prepare_at_once_make_nothing_twice(tmp_path: Path) -> None:
    """One of them formats, all end well; `offline=true` then finds everything there."""
    make_plugin(tmp_path / "site", "counting", FORMATTER)
    more = {"PYTHONPATH": str(tmp_path / "site"), "CALLS": str(tmp_path / "calls")}
    line = ["prepare", *make_data(tmp_path, "classify"), "+plugin=counting", "offline=true"]
    processes = [start(line, tmp_path, more) for _ in range(20)]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 20, said
    calls = (tmp_path / "calls").read_text().splitlines()
    assert sorted(c.split()[1] for c in calls) == ["test", "train", "validation"]
    assert len({c.split()[0] for c in calls}) == 1


def test_a_run_with_its_task_found_out_predicts_in_larger_batches(tmp_path: Path) -> None:
    """`task=auto` is settled by the model; nothing is trained, so any micro-batch will do."""
    rows = write_rows(tmp_path / "rows.jsonl", [{"content": f"a text {i}"} for i in range(9)])
    settings = ["task=auto", "model=tiny_llama", "data=files", f"data.train={rows}", "train.steps=2"]
    trained, predicted = run_each(
        [
            [*settings, "hydra.run.dir=run", "train.batch_size=4"],
            ["predict", "run", rows, "train.micro_batch_size=64"],
        ],
        tmp_path,
    )
    assert trained.returncode == 0, trained.stderr
    assert predicted.returncode == 0, predicted.stderr
    assert len(lines(predicted.stdout)) == 9


def test_own_configs_are_planned_and_previewed(tmp_path: Path) -> None:
    """`--config-dir`, as for a run; the jobs of a sweep are told as they were given."""
    own = tmp_path / "own" / "experiment" / "mine.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("# @package _global_\ndefaults:\n  - override /model: tiny_bert\ntrain:\n  steps: 3\n")
    asked = ["--config-dir", "own", "experiment=mine"]
    sweep, shown, missing = run_each(
        [
            ["plan", "--json", "-m", *asked, "seed=1,2"],
            ["preview", *asked, "--rows", "1"],
            ["plan", "--config-dir", "nope", "experiment=mine"],
        ],
        tmp_path,
    )
    assert [j["overrides"] for j in json.loads(sweep.stdout)["jobs"]] == [
        ["experiment=mine", "seed=1"],
        ["experiment=mine", "seed=2"],
    ]
    assert shown.stdout.startswith("train example 0"), shown.stderr
    assert missing.stderr == "ftcore: error: --config-dir: no such directory: nope\n"
