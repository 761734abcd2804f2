"""What a person may get wrong: one line that says what, where and what to write instead; exit 2."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .cli import environment, make_plugin, make_rows, run, run_each, write_rows

OWN_DATA = "data=files data.validation=null data.test=null data.train"
MASKING = '''
from ftcore import hookimpl, plugin


@plugin()
class Plugin:
    """Mask every label."""

    share: float = 0.5

    @hookimpl
    def format_examples(self, examples, tokenizer, cfg):
        rows = [tokenizer(e["text"])["input_ids"] for e in examples]
        return [{"input_ids": ids, "labels": [-100] * len(ids)} for ids in rows]
'''

CONFIG = {  # found before torch is imported
    "misspelt key": ("train.batch_sise=4", r"'train\.batch_sise'.*train\.batch_size"),
    "misspelt group of a key": ("trian.batch_size=4", r"'trian\.batch_size'.*train\.batch_size"),
    "key of another tool": ("learning_rate=1e-4", r"'learning_rate'.*optim\.lr"),
    "key with a plus": ("+train.batch_sise=4", r"'train\.batch_sise'.*train\.batch_size"),
    "known key with a plus": ("+train.batch_size=4", r"train\.batch_size.*without the \+"),
    "wrong type": ("train.batch_size=many", r"train\.batch_size: wrong type.*many"),
    "wrong type, float": ("optim.lr=fast", r"optim\.lr: wrong type.*fast"),
    "wrong type, a list": ("train.steps=[1,2]", r"train\.steps: wrong type"),
    "wrong type, null": ("train.batch_size=null", r"train\.batch_size"),
    "a group's name as a file": ("train=fast", r"\btrain\b"),
    "misspelt plugin": ("+plugin=maskng", r"no plugin 'maskng'.*'masking'"),
    "misspelt trainer": ("trainer=dpp", r"no trainer 'dpp'.*'ddp'"),
    "misspelt model": ("model=tiny_bret", r"no model 'tiny_bret'.*'tiny_bert'"),
    "misspelt task": ("task=clasify", r"no task 'clasify'.*'classify'"),
    "unknown experiment": ("+experiment=mine", r"experiment.*mine"),
    "unknown experiment, no plus": ("experiment=mine", r"no experiment 'mine'"),
    "plugin without a plus": ("plugin=masking", r"\+plugin=masking"),
    "plugin unknown, without a plus": ("plugin=maskng", r"\+plugin="),
    "two plugin arguments": ("+plugin=masking +plugin=second", r"one list: '\+plugin=\[a,b\]'"),
    "option of a plugin not chosen": (
        "++plugin.masking.share=0.9",
        r"'masking' is not chosen.*\+plugin=masking",
    ),
    "the same with one plus": ("+plugin.masking.share=0.9", r"'masking' is not chosen.*\+plugin=masking"),
    "the same with none": ("plugin.masking.share=0.9", r"'masking' is not chosen.*\+plugin=masking"),
    "option of no plugin at all": ("++plugin.mskng.share=1", r"'mskng'.*('masking'|not chosen)"),
    "misspelt option": ("+plugin=masking plugin.masking.shar=1", r"masking.*'shar'.*'share'"),
    "misspelt option, added": ("+plugin=masking ++plugin.masking.shar=1", r"masking.*'shar'.*'share'"),
    "option of a wrong type": ("+plugin=masking plugin.masking.share=lots", r"plugin\.masking\.share.*lots"),
    "no equals sign": ("seed=1 train.steps", r"train\.steps.*key=value"),
    "a broken override": ("train.steps=[1", r"can't read 'train\.steps=\[1'"),
    "batch of nothing": ("train.batch_size=0", r"train\.batch_size must be at least 1, got 0"),
    "micro-batch of nothing": ("train.micro_batch_size=0", r"train\.micro_batch_size must be at least 1"),
    "micro-batch above the batch": ("train.micro_batch_size=99", r"micro_batch_size must be at most.*16"),
    "learning rate below zero": ("optim.lr=-1", r"optim\.lr \(the learning rate\) must be above 0, got -1"),
    "learning rate that is no number": ("optim.lr=nan", r"optim\.lr"),
    "no precision of this name": ("train.precision=fp8", r"train\.precision.*bf16.*fp8"),
    "no schedule of this name": ("optim.schedule=step", r"optim\.schedule.*cosine.*step"),
    "dropout of one": ("model.dropout=1", r"model\.dropout must be in \[0, 1\)"),
    "shares above one": ("data.split=[0.8,0.2,0.2]", r"data\.split must be.*sum to 1"),
    "devices of one process": ("trainer.devices=2", r"trainer\.devices=2.*trainer=ddp"),
    "no such command": ("plugin", r"no command 'plugin'; did you mean 'plugins'"),
    "no such command, a word": ("train", r"no command 'train'"),
    "no such option": ("--bogus seed=1", r"--bogus"),
    "no such option of a command": ("plan --bogus seed=1", r"--bogus"),
    "resume without a directory": ("resume", r"run_dir|directory"),
    "resume of nothing": ("resume {d}", r"is no run directory"),
    "resume of what is not there": ("resume {d}/none", r"none.*(no such|is no run) directory"),
    "plan with a misspelt key": ("plan train.batch_sise=4", r"'train\.batch_sise'.*train\.batch_size"),
}

DATA = {  # found when the data is read, before the weights are
    "missing file": (f"{OWN_DATA}=/nope.jsonl", r"data\.train: no such file: /nope\.jsonl"),
    "missing file, a near name": (f"{OWN_DATA}={{d}}/god.jsonl", r"no such file.*'good\.jsonl'"),
    "no data named": ("data=files data.validation=null", r"data\.train"),
    "empty file": (f"{OWN_DATA}={{d}}/empty.jsonl", r"empty\.jsonl is empty"),
    "broken JSON": (f"{OWN_DATA}={{d}}/broken.jsonl", r"broken\.jsonl line 3 is broken JSON"),
    "a file of another kind": (f"{OWN_DATA}={{d}}/rows.txt", r"rows\.txt.*jsonl, .*csv"),
    "csv of uneven rows": (f"{OWN_DATA}={{d}}/uneven.csv", r"uneven\.csv line 3: 3 fields, the header has 2"),
    "missing label": (
        f"{OWN_DATA}={{d}}/good.jsonl data.columns.label=tag",
        r"no column 'tag'.*shop, label.*data\.columns\.label",
    ),
    "missing text": (f"{OWN_DATA}={{d}}/good.jsonl data.columns.text=body", r"no column 'body'.*text.*shop"),
    "missing group": (f"{OWN_DATA}={{d}}/good.jsonl data.columns.group=land", r"no column 'land'.*shop"),
    "label unseen in training": (
        f"{OWN_DATA}={{d}}/good.jsonl data.validation={{d}}/unseen.jsonl",
        r"validation data, row 1 .*label 'angry' does not occur in the training data \(.*praise",
    ),
    "one label only": (f"{OWN_DATA}={{d}}/praise.jsonl", r"only the label.*praise"),
    "labels that are fractions": (f"{OWN_DATA}={{d}}/scores.jsonl", r"'label' holds fractions"),
    "empty texts": (f"{OWN_DATA}={{d}}/blank.jsonl", r"train data.*empty text"),
    "one empty text": (f"{OWN_DATA}={{d}}/hole.jsonl", r"1 of 12 rows .*rows \[5\].*data\.max_dropped="),
    "every row truncated": (
        f"{OWN_DATA}={{d}}/good.jsonl data.max_length=8",
        r"12 of 12 rows in the train data are truncated.*raise data\.max_length.*data\.max_truncated=1",
    ),
    "every label masked": (
        f"{OWN_DATA}={{d}}/good.jsonl task=causal_lm model=tiny_llama +plugin=masking",
        r"train data trains on nothing: every label of its 12 rows is masked",
    ),
}

MODEL = {
    "model without weights": ("model.path={d}/nomodel", r"nomodel has no weights"),
    "model directory that is not there": ("model.path={d}/gone", r"no such directory.*gone"),
    "directory that is no model": ("model.path={d}", r"no config\.json"),
    "no path": ("model=pretrained", r"model\.path is not set"),
    "repository out of reach": ("model=pretrained model.path=org/nothing", r"org/nothing"),
    "encoder for causal_lm": ("task=causal_lm", r"bert model, which can't do task=causal_lm.*decoder"),
    "encoder for seq2seq": (
        f"task=seq2seq {OWN_DATA}={{d}}/good.jsonl data.columns.target=label",
        r"bert model, which can't do task=seq2seq.*encoder-decoder",
    ),
    "metric that is not there": (
        f"{OWN_DATA}={{d}}/good.jsonl data.validation={{d}}/good.jsonl task.metric=acc train.steps=1",
        r"task\.metric\b.*'acc'.*(accuracy|mcc)",
    ),
    "a sweep's key without -m": ("hydra.sweep.dir={d}/x", r"hydra\.sweep\.dir has no effect without -m"),
    "a config to see with -m": ("seed=0,1 -m --cfg job", r"show one run; leave -m"),
    "a launcher's value": (
        "seed=0,1 -m hydra.sweeper.max_batch_size=0",
        r"can't be run by .*max_batch_size=0",
    ),
    "a run's key with -m": ("seed=0,1 hydra.run.dir={d}/x -m", r"no effect with -m; set hydra\.sweep\.dir"),
    "a file's name for a run": (
        "hydra.run.dir={d}/good.jsonl",
        r"File exists: .*\.jsonl; set hydra\.run\.dir",
    ),
    "a file's name for a sweep": (
        "hydra.sweep.dir={d}/good.jsonl -m",
        r"File exists.*; set hydra\.sweep\.dir",
    ),
    "no such device": ("trainer.device=tpu", r"trainer\.device=tpu is not there.*cpu"),
}


def make_files(d: Path) -> None:
    """Every bad file of the tables, good ones beside them, and the plugin `masking`."""
    rows = make_rows("classify", 12)
    write_rows(d / "good.jsonl", rows)
    (d / "empty.jsonl").touch()
    (d / "broken.jsonl").write_text(f'{json.dumps(rows[0])}\n\n{{"text": "no end\n{json.dumps(rows[1])}\n')
    (d / "rows.txt").write_text("text\n")
    (d / "uneven.csv").write_text("text,label\ngood,praise\nlate, late,late delivery\n")
    write_rows(d / "unseen.jsonl", [rows[0], {**rows[1], "label": "angry"}])
    write_rows(d / "praise.jsonl", [{**row, "label": "praise"} for row in rows])
    write_rows(d / "scores.jsonl", [{**row, "label": i / 2} for i, row in enumerate(rows)])
    write_rows(d / "blank.jsonl", [{**row, "text": " "} for row in rows])
    write_rows(
        d / "hole.jsonl", [{**row, "text": "" if i == 5 else row["text"]} for i, row in enumerate(rows)]
    )
    (d / "nomodel").mkdir()
    (d / "nomodel" / "config.json").write_text('{"model_type": "bert"}')
    make_plugin(d / "site", "masking", MASKING, "share: 0.5")
    make_plugin(d / "site", "second", MASKING, "share: 0.5")


Answer = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """The answer to each bad command line."""
    d = tmp_path_factory.mktemp("bad")
    make_files(d)
    env = {"PYTHONPATH": str(d / "site")}

    def words(line: str) -> list[str]:
        found = line.format(d=d).split()
        given = {word.partition("=")[0] for word in found}
        is_run = "=" in found[0]
        return found + ["model=tiny_bert"] * (is_run and not given & {"model", "model.path"})

    tables = [[words(line) for line, _ in table.values()] for table in (CONFIG, DATA | MODEL)]
    with ThreadPoolExecutor(2) as pool:
        halves = list(pool.map(lambda lines: run_each(lines, d, env), tables))
    return dict(zip([*CONFIG, *DATA, *MODEL], halves[0] + halves[1], strict=True))


@pytest.mark.parametrize("name", [*CONFIG, *DATA, *MODEL])
def test_bad_input_is_answered_in_one_line(answers: dict[str, Answer], name: str) -> None:
    """Exit 2 and one line on stderr, which names the trouble and the cure."""
    answer, (line, wanted) = answers[name], (CONFIG | DATA | MODEL)[name]
    said = f"{line}\n{answer.stdout[-2000:]}{answer.stderr}"
    assert answer.returncode == 2, said
    assert re.fullmatch(r"ftcore: error: [^\n]+\n", answer.stderr), said
    assert re.search(wanted, answer.stderr), said
    assert "Traceback" not in answer.stdout, said


def test_bad_input_loses_nothing(tmp_path: Path) -> None:
    """A finished run is as before after bad input meant to replace it; with good input it is replaced."""
    line = ["model=tiny_bert", "train.steps=1", "data.limit.train=20", "hydra.run.dir=run", "force=true"]
    result = tmp_path / "run" / "result.json"
    assert run(line, tmp_path).returncode == 0
    before = result.read_text()
    for bad in ("train.batch_size=0", "data.train=/nope.jsonl"):
        assert run([*line, bad], tmp_path).returncode == 2
        assert result.is_file(), bad
        assert result.read_text() == before
        assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_a_bad_job_of_a_sweep_does_not_stop_the_others(tmp_path: Path) -> None:
    """The good job ends with a result; the sweep names the bad one and its error, and exits with 1."""
    sweep = [
        "-m",
        "model=tiny_bert",
        "train.batch_size=0,8",
        "train.steps=1",
        "hydra.sweep.subdir=${hydra.job.num}",
    ]
    ended = run(sweep, tmp_path)
    assert ended.returncode == 1
    assert "  failed: 0: train.batch_size must be at least 1, got 0\n" in ended.stdout
    assert "1 of 2 jobs failed" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert [f.parent.name for f in tmp_path.glob("runs/default/*/result.json")] == ["1"]


@pytest.mark.parametrize(("option", "wanted"), [("--help", "ftcore COMMAND"), ("--version", "ftcore 0.")])
def test_help_and_version_import_nothing_heavy(tmp_path: Path, option: str, wanted: str) -> None:
    """Both answer without torch, transformers, datasets or Hydra."""
    command = [sys.executable, "-X", "importtime", "-m", "ftcore", option]
    ended = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert ended.returncode == 0
    assert wanted in ended.stdout
    assert "ftcore.cli" in imported
    assert not imported & {"torch", "transformers", "datasets", "hydra", "omegaconf", "numpy"}


def test_help_names_what_can_be_chosen(tmp_path: Path) -> None:
    """`--help` lists commands, models, tasks and installed plugins."""
    make_plugin(tmp_path / "site", "masking", MASKING, "share: 0.5")
    said = run(["--help"], tmp_path, {"PYTHONPATH": str(tmp_path / "site")}).stdout
    for word in ("plugins", "plan", "resume", "tiny_bert", "seq2seq", "ddp", "masking", "train.batch_size"):
        assert re.search(rf"\b{word}\b", said), word


def test_options_may_stand_between_settings(tmp_path: Path) -> None:
    """`--cfg job` between two settings prints the config, with both."""
    ended = run(["seed=5", "--cfg", "job", "model=tiny_bert"], tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "seed: 5" in ended.stdout
    assert "ftcore:tiny_bert" in ended.stdout


def test_a_broken_plugin_harms_no_other_run(tmp_path: Path) -> None:
    """A plugin whose import fails: runs that don't choose it, help and the list of plugins all work."""
    env = {"PYTHONPATH": str(tmp_path / "site")}
    make_plugin(tmp_path / "site", "broken", "raise RuntimeError('no such library')\n")
    make_plugin(tmp_path / "site", "masking", MASKING, "share: 0.5")
    good = run(
        ["model=tiny_bert", "train.steps=1", "data.limit.train=20", "hydra.run.dir=run"], tmp_path, env
    )
    assert (good.returncode, good.stderr) == (0, "")
    listed = {row["name"]: row for row in json.loads(run(["plugins", "--json"], tmp_path, env).stdout)}
    assert listed["broken"]["error"] == "RuntimeError: no such library"
    assert listed["masking"]["summary"] == "Mask every label."
    text = run(["plugins"], tmp_path, env).stdout
    assert re.search(r"^broken +ftcore-broken 1\.2 .*no such library$", text, re.M), text
    chosen = run(["model=tiny_bert", "+plugin=broken"], tmp_path, env)
    assert chosen.returncode == 2
    assert re.search(r"error: plugin 'broken'.*does not import: RuntimeError: no such library", chosen.stderr)
