"""What a run leaves behind, what is done with it afterwards, and what a second run makes of it."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .cli import (
    CLASSES,
    environment,
    evaluations,
    make_data,
    make_rows,
    records,
    result,
    run,
    runs,
    start,
    steps,
    wait_for_step,
)

ELSEWHERE = """
import json, math, sys
sys.modules["ftcore"] = None  # as where it is not installed
import torch, transformers
from transformers import AutoTokenizer

answer, todo = [], json.loads(sys.argv[1])
for folder, auto, rows in todo:
    model = getattr(transformers, auto).from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    hits, nll, units = 0, 0.0, 0
    for row in rows:
        texts = [row["text"], row["second"]] if "Classification" in auto else [row["text"]]
        inputs = tokenizer(*texts, return_tensors="pt")
        if "Classification" in auto:
            logits, label = model(**inputs).logits[0], model.config.label2id[row["label"]]
            hits += model.config.id2label[int(logits.argmax())] == row["label"]
            nll, units = nll - float(logits.log_softmax(0)[label]), units + 1
        elif "CausalLM" in auto:
            ids = torch.tensor([inputs["input_ids"][0].tolist() + [tokenizer.eos_token_id]])
            count = ids.shape[1] - 1
            nll, units = nll + count * float(model(input_ids=ids, labels=ids).loss), units + count
        else:
            labels = tokenizer(text_target=row["target"], return_tensors="pt")["input_ids"]
            made = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
            hits += tokenizer.decode(made, skip_special_tokens=True).strip() == row["target"]
            count = labels.shape[1]
            nll, units = nll + count * float(model(**inputs, labels=labels).loss), units + count
    answer.append([nll / units, hits / len(rows)])
print(json.dumps(answer))
"""
COMMON = ["train.log_every=1", "train.batch_size=8", "optim.lr=5e-3"]
PAIRS = ["data.columns.text_pair=second", "data.columns.group=shop", "train.epochs=12", "seed=7", "name=mine"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four finished runs: pairs with groups; language modelling without validation; targets; too fast."""
    tmp = tmp_path_factory.mktemp("tree")
    pairs = [*make_data(tmp / "classify", "classify"), *COMMON]
    text = [*make_data(tmp / "causal_lm", "causal_lm"), *COMMON, "data.validation=null", "train.steps=3"]
    target = [*make_data(tmp / "seq2seq", "seq2seq"), *COMMON, "train.epochs=1"]
    fast = [*pairs, *PAIRS, "name=fast", "optim.lr=0.3", "task.metric=-nll"]
    runs(
        [
            [*pairs, *PAIRS],
            [*text, "hydra.run.dir=text"],
            [*target, "hydra.run.dir=target"],
            [*fast, "train.eval_every=1", "train.early_stop=3", "hydra.run.dir=fast"],
        ],
        tmp,
    )
    return tmp


def pairs_run(tree: Path) -> Path:
    """The directory of the run on pairs, named by its overrides."""
    (found,) = (tree / "runs" / "mine").iterdir()
    return found


def again(tree: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """The command line of the run on pairs, in another order, and more."""
    pairs = [*make_data(tree / "classify", "classify"), *COMMON, *PAIRS]
    return run([*reversed(pairs), *more], tree)


def test_a_run_directory_has_these_files(tree: Path) -> None:
    """The files of a run, under a name made of its overrides, and `runs/latest` pointing to the newest."""
    run_dir = pairs_run(tree)
    names = {f.name for f in run_dir.iterdir() if not f.name.startswith(".")}
    assert names == {"config.yaml", "run.json", "metrics.jsonl", "result.json", "model", "predictions"}
    assert re.fullmatch(r"[A-Za-z0-9._-]+", run_dir.name)
    assert run_dir.name.startswith("model-tiny_bert__optim.lr-5e-3__seed-7__")
    assert (tree / "runs" / "latest").resolve() == run_dir
    assert "${" not in (run_dir / "config.yaml").read_text()
    assert "seed: 7" in (run_dir / "config.yaml").read_text()


def test_run_json_says_what_ran(tree: Path) -> None:
    """Versions, data, model, machine; the audit has counted the tokens of both texts of a pair."""
    written = json.loads((pairs_run(tree) / "run.json").read_text())
    assert {"plugins", "packages", "data", "model", "git_commit", "machine"} <= written.keys()
    assert {"torch", "transformers", "datasets", "hydra-core"} <= written["packages"].keys()
    assert written["model"]["class"] == "BertForSequenceClassification"
    assert written["data"]["labels"] == sorted(CLASSES)
    assert re.fullmatch(r"[0-9a-f]{16,}", written["data"]["fingerprint"])
    lengths = [len(row["text"]) + len(row["second"]) + 3 for row in make_rows("classify", 41)]
    assert written["data"]["splits"]["train"]["tokens"] == sum(lengths)
    assert written["data"]["splits"]["train"]["longest"] == max(lengths)


def test_metrics_are_records_of_training_or_of_evaluation(tree: Path) -> None:
    """A training record has these keys; an evaluation has its metrics, and never `loss`."""
    run_dir = pairs_run(tree)
    assert [r["step"] for r in steps(run_dir)] == list(range(1, 73))  # 41 rows by 8, 12 times
    keys = {"step", "loss", "loss/task", "grad_norm", "lr", "tokens_per_second"}
    assert all(keys <= r.keys() for r in steps(run_dir))
    assert [r["step"] for r in evaluations(run_dir)] == list(range(6, 73, 6))
    for record in evaluations(run_dir):
        assert {"eval/accuracy", "eval/macro_f1", "eval/mcc"} <= record.keys()
        assert not [key for key in record if key.startswith("loss")]


def test_result_json_is_the_outcome(tree: Path) -> None:
    """The keys of a result; the metric is the best evaluation's, examples and tokens are all trained ones."""
    run_dir, read = pairs_run(tree), result(pairs_run(tree))
    keys = {
        "status",
        "metric",
        "metrics",
        "steps",
        "examples",
        "tokens",
        "seconds",
        "plugins",
        "order",
        "seed",
    }
    assert keys <= read.keys()
    assert (read["status"], read["seed"], read["steps"], read["order"]) == ("finished", 7, 72, [])
    best = max(r["eval/accuracy"] for r in evaluations(run_dir))
    assert read["metric"] == {"name": "eval/accuracy", "value": best}
    assert best > 0.4, "it has learned nothing, so the tests here would show nothing"
    written = json.loads((run_dir / "run.json").read_text())
    assert read["examples"] == 12 * 41
    assert read["tokens"] == 12 * written["data"]["splits"]["train"]["tokens"]


def test_groups_have_their_own_metrics(tree: Path) -> None:
    """Two groups of equal size: their mean is the whole, and the worse one is named so."""
    for split in ("eval", "test"):
        metrics = result(pairs_run(tree))["metrics"]
        groups = [metrics[f"{split}/group/{name}/accuracy"] for name in ("a", "b")]
        assert sum(groups) / 2 == pytest.approx(metrics[f"{split}/accuracy"])
        assert metrics[f"{split}/worst_group/accuracy"] == min(groups)
        assert f"{split}/group/a/macro_f1" in metrics
    assert "eval/worst_group/accuracy" in evaluations(pairs_run(tree))[0]


def test_the_exported_model_needs_no_ftcore(tree: Path) -> None:
    """Plain transformers, where ftcore can't be imported, gets the result's metrics: the best weights'."""
    runs_made = {
        pairs_run(tree): ("AutoModelForSequenceClassification", "classify", "accuracy"),
        tree / "fast": ("AutoModelForSequenceClassification", "classify", "accuracy"),
        tree / "text": ("AutoModelForCausalLM", "causal_lm", ""),
        tree / "target": ("AutoModelForSeq2SeqLM", "seq2seq", "exact_match"),
    }
    seeds = {"eval": 1, "test": 2}  # of `make_data`
    cases = [(d, split, *how) for d, how in runs_made.items() for split in seeds]
    cases.remove((tree / "text", "eval", *runs_made[tree / "text"]))  # it had no validation data
    todo = [(str(d / "model"), auto, make_rows(task, 12, seeds[split])) for d, split, auto, task, _ in cases]
    command = [sys.executable, "-c", ELSEWHERE, json.dumps(todo)]
    ended = subprocess.run(command, cwd=tree, env=environment(tree), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    for (run_dir, split, *_, hits), (nll, share) in zip(cases, json.loads(ended.stdout), strict=True):
        metrics = result(run_dir)["metrics"]
        assert nll == pytest.approx(metrics[f"{split}/nll"], rel=1e-5), (run_dir, split)
        assert not hits or share == pytest.approx(metrics[f"{split}/{hits}"]), (run_dir, split)
        assert f"{metrics[f'{split}/nll']:.4f}" in (run_dir / "model" / "README.md").read_text()


def test_without_validation_data_the_last_weights_count(tree: Path) -> None:
    """No evaluation while training; the metric is that of the test data."""
    read = result(tree / "text")
    assert records(tree / "text") == steps(tree / "text")
    assert read["metric"] == {"name": "test/perplexity", "value": read["metrics"]["test/perplexity"]}
    assert (read["steps"], read["best_step"]) == (3, 3)


def test_targets_are_generated_and_compared(tree: Path) -> None:
    """A seq2seq evaluation has exact match and ROUGE of what was generated."""
    names = {"test/exact_match", "test/rouge1", "test/rougeL", "test/nll"}
    assert names <= result(tree / "target")["metrics"].keys()


def test_early_stop_keeps_the_best_weights(tree: Path) -> None:
    """Three evaluations without a new best end the run; the best step is the one with the least loss."""
    read, curve = result(tree / "fast"), [r["eval/nll"] for r in evaluations(tree / "fast")]
    assert read["steps"] == len(curve) == read["best_step"] + 3 < 72
    assert read["best_step"] == curve.index(min(curve)) + 1
    assert read["metric"] == {"name": "eval/nll", "value": min(curve)}


def test_a_finished_run_is_not_run_again(tree: Path) -> None:
    """The same command line prints the result and ends well; nothing is written."""
    run_dir = pairs_run(tree)
    before = {f: f.stat().st_mtime_ns for f in run_dir.rglob("*") if f.is_file()}
    ended = again(tree)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "already finished" in ended.stdout
    assert f"{result(run_dir)['metrics']['test/accuracy']:.4f}" in ended.stdout
    assert str(run_dir) in ended.stdout
    assert {f: f.stat().st_mtime_ns for f in before} == before
    assert pairs_run(tree) == run_dir


def test_force_runs_a_finished_run_again(tree: Path) -> None:
    """`force=true` trains again in the same directory, to the same metrics."""
    before = result(pairs_run(tree))
    (pairs_run(tree) / "result.json").write_text("{}")
    ended = again(tree, "force=true")
    assert ended.returncode == 0, ended.stderr
    assert result(pairs_run(tree))["metrics"] == before["metrics"]
    assert len(steps(pairs_run(tree))) == 72


def test_another_config_in_the_same_directory_is_an_error(tree: Path) -> None:
    """The key that differs is named, with both values; the run there is left alone."""
    before = (tree / "text" / "result.json").read_bytes()
    text = [*make_data(tree / "causal_lm", "causal_lm"), *COMMON, "data.validation=null", "train.steps=3"]
    first = run([*text, "optim.weight_decay=0.5", "hydra.run.dir=text"], tree)
    more = ["data.limit.train=30", "name=other", "train.log_every=2"]
    second = run([*text, *more, "hydra.run.dir=text"], tree)
    assert (first.returncode, second.returncode) == (2, 2)
    assert re.fullmatch(
        r"ftcore: error: .*text .*optim\.weight_decay: 0\.01 there, 0\.5 now.*\n", first.stderr
    )
    assert re.search(r"data\.limit\.train: None there, 30 now", second.stderr)
    assert (tree / "text" / "result.json").read_bytes() == before


def test_a_directory_in_use_is_an_error(tmp_path: Path) -> None:
    """While a run has its directory, another one is refused in one line, and the first goes on."""
    line = [*make_data(tmp_path, "classify"), "train.steps=100000", "train.save_every=5", "hydra.run.dir=run"]
    first = start(line, tmp_path)
    try:
        wait_for_step(first, tmp_path / "run", 5)
        second, resumed = run(line, tmp_path), run(["resume", "run"], tmp_path)
        for ended in (second, resumed):
            assert ended.returncode == 2
            assert re.fullmatch(r"ftcore: error: \S+/run is in use by another run[^\n]*\n", ended.stderr)
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGTERM)
        output = first.communicate(timeout=60)[0]
    assert first.returncode == 75, output


def test_a_plugin_ends_a_run(tmp_path: Path) -> None:
    """`should_stop`: both ranks end, the reason is kept, nothing is tested or exported, and it stays so."""
    example = Path(__file__).resolve().parents[1] / "docs" / "examples" / "should_stop.py"
    short = ["train.steps=12", "train.eval_every=3", "train.batch_size=8", "name=pruned"]
    given = ["--plugin-file", str(example), "+plugin=give_up", "plugin.give_up.floor=2"]
    line = [*given, "plugin.give_up.after=3", *make_data(tmp_path, "classify"), *short, "trainer=ddp"]
    ended = run([*line, "trainer.devices=2"], tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "pruned at step 6: accuracy" in ended.stdout
    assert "next: ftcore predict" not in ended.stdout
    run_dir = (tmp_path / "runs" / "latest").resolve()
    found = result(run_dir)
    assert (found["status"], found["steps"], len(evaluations(run_dir))) == ("pruned", 6, 2)
    assert re.fullmatch(r"accuracy 0\.\d+ is below 2\.0 after step 3", found["reason"])
    assert found["metric"]["name"] == "eval/accuracy"
    assert not [key for key in found["metrics"] if key.startswith("test/")]
    assert not (run_dir / "model").exists()
    assert not (run_dir / "checkpoints").exists()
    written = (run_dir / "result.json").stat().st_mtime_ns
    again = run([*line, "trainer.devices=2"], tmp_path)
    assert "already pruned (eval/accuracy" in again.stdout
    assert (run_dir / "result.json").stat().st_mtime_ns == written
