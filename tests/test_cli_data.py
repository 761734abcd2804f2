"""Data as people have them, through the command line: one file, one command."""

import csv
import json
import random
from pathlib import Path

import pytest

from .cli import WORDS, result, run


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """`reviews (1), final.csv`: semicolons, cp1252, columns of other names; every fifth row comes twice."""
    rng = random.Random(0)
    rows = []
    for i in range(60):
        label = list(WORDS)[i % 3]
        rows.append((f"{' '.join(rng.choices(WORDS[label], k=9))} é, no {i}", label.title(), rng.random()))
    rows += [(f"{text.upper()}!", label, 0.5) for text, label, _ in rows[::5]]
    path = tmp_path / "reviews (1), final.csv"
    with path.open("w", encoding="cp1252", newline="") as file:
        csv.writer(file, delimiter=";").writerows([("Kommentar", "Klasse", "score"), *rows])
    return path


def test_a_file_that_nobody_prepared_trains_in_one_command(reviews: Path) -> None:
    """Guesses are said, the test figure is there; the file changed, the run is not taken for the same."""
    line = [f"data={reviews.name}", "model=tiny_bert", "train.steps=2", "data.columns.label=Klasse"]
    line.append("hydra.run.dir=run")
    ended = run(line, reviews.parent)
    assert ended.returncode == 0, ended.stderr
    said = ended.stderr.splitlines()
    short = f"data={reviews.name}  means  data=files data.train='{reviews.name}' data.split=[0.8,0.1,0.1]"
    assert said[0] == f"ftcore: {short}"
    assert said[1] == f"ftcore: {reviews.name}: cp1252, ';' between fields, \" quotes"
    assert said[2] == "ftcore: guessed data.columns.text=Kommentar (columns: Kommentar, Klasse, score)"
    assert said[3].startswith("ftcore: data.split: ")
    assert said[3].endswith("; 12 near-duplicates, each beside its like")
    assert "test/accuracy" in result(reviews.parent / "run")["metrics"]
    described = json.loads((reviews.parent / "run" / "run.json").read_text())["data"]
    assert described["labels"] == ["Late Delivery", "Praise", "Refund"]
    assert len({split["sha256"] for split in described["splits"].values()}) == 3
    assert "already finished" in run(line, reviews.parent).stdout

    with reviews.open("a", encoding="cp1252") as file:
        file.write("one more;Praise;1\n")
    changed = run(line, reviews.parent)
    assert changed.returncode == 2
    assert "the data files have changed since the run" in changed.stderr
    assert run([*line, "force=true"], reviews.parent).returncode == 0


def test_what_one_may_type_instead(reviews: Path) -> None:
    """A file as the command, and a file that is not there."""
    folder = reviews.parent
    bare = run([reviews.name], folder)
    assert (bare.returncode, bare.stdout) == (2, "")
    assert bare.stderr.endswith(f"to train on that file or directory: data='{reviews.name}'\n")
    missing = run(["data=reviews.csv"], folder)
    assert missing.returncode == 2
    assert "no such file or directory" in missing.stderr
