"""Short forms and awkward paths, as they come from the shell."""

from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from ftcore import UserError
from ftcore.shortforms import expand

CHOICES = {"data": ["demo", "files", "hub"], "model": ["minilm", "pretrained", "tiny_bert"]}
SPLIT = "data.split=[0.8,0.1,0.1]"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with data of several kinds."""
    monkeypatch.chdir(tmp_path)
    for name in ("reviews.csv", "a (1).csv", "a,b=c.csv", "demo", "parts/train.jsonl", "parts/dev.jsonl",
                 "parts/test.jsonl", "parts/README.md", "loose/b.csv", "loose/a.csv", "weights/config.json",
                 "nested/train/1.csv", "nested/val/1.csv", "runs/done/config.yaml",
                 "runs/done/model/config.json", "runs/begun/config.yaml"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["data=reviews.csv"], ["data=files", "data.train=reviews.csv", SPLIT]),
        (["data=a (1).csv"], ["data=files", "data.train='a (1).csv'", SPLIT]),
        (["data=a,b=c.csv"], ["data=files", "data.train='a,b=c.csv'", SPLIT]),
        (["data=loose"], ["data=files", "data.train=loose", SPLIT]),
        (["data=loose/"], ["data=files", "data.train=loose/", SPLIT]),
        (["data=parts"], ["data=files", "data.train=parts/train.jsonl", "data.validation=parts/dev.jsonl",
                          "data.test=parts/test.jsonl"]),
        (["data=nested"], ["data=files", "data.train=nested/train", "data.validation=nested/val"]),
        (["data=reviews.csv", "data.split=[0.5,0.5,0]"],
         ["data=files", "data.train=reviews.csv", "data.split=[0.5,0.5,0]"]),
        (["data=reviews.csv", "data.validation=loose/a.csv"],
         ["data=files", "data.train=reviews.csv", "data.validation=loose/a.csv"]),
        (["data=reviews.csv", "data.streaming=true"],
         ["data=files", "data.train=reviews.csv", "data.streaming=true"]),
        (["model=org/name"], ["model=pretrained", "model.path=org/name"]),
        (["model=./weights"], ["model=pretrained", "model.path=./weights"]),
        (["model=weights"], ["model=pretrained", "model.path=weights"]),
        (["model=runs/done"], ["model=pretrained", "model.path=runs/done/model"]),
        (["data=demo", "model=tiny_bert"], ["data=demo", "model=tiny_bert"]),
        (["data=./demo"], ["data=files", "data.train=./demo", SPLIT]),
        (["data=filse", "model=tiny_brt"], ["data=filse", "model=tiny_brt"]),
        (["data=files", "data.train=a (1).csv", "data.validation=null", "data.test='a (1).csv'"],
         ["data=files", "data.train='a (1).csv'", "data.validation=null", "data.test='a (1).csv'"]),
        (["seed=1", "+plugin=[a,b]", "optim.betas=[0.9, 0.9]"],
         ["seed=1", "+plugin=[a,b]", "optim.betas=[0.9, 0.9]"]),
    ],
)  # fmt: skip
def test_short_forms_in_full(folder: Path, arguments: list[str], expected: list[str]) -> None:
    """A name of the group goes first; what is a file, a directory or a repository is that; others stay."""
    full, notes = expand(arguments, CHOICES)
    assert full == expected
    changed = [a for a in arguments if a.partition("=")[0] in ("data", "model") and a not in expected]
    assert [note.partition("  means  ")[0] for note in notes] == changed


def test_sweep_over_files_and_models(folder: Path) -> None:
    """Under -m commas part values, unless the whole is a file's name."""
    full, _ = expand(["data=reviews.csv,a (1).csv", "model=org/a,./weights"], CHOICES, sweep=True)
    assert full == [
        "data=files",
        "data.train=reviews.csv,'a (1).csv'",
        SPLIT,
        "model=pretrained",
        "model.path=org/a,./weights",
    ]
    full, _ = expand(["data=a,b=c.csv", "model=tiny_bert,minilm"], CHOICES, sweep=True)
    assert full == ["data=files", "data.train='a,b=c.csv'", SPLIT, "model=tiny_bert,minilm"]


def test_file_that_is_not_there_is_named_with_the_nearest(folder: Path) -> None:
    """Not Hydra's list of choices: this was meant as a path."""
    with pytest.raises(UserError, match=r"data=review\.csv: no such file .*did you mean 'reviews\.csv'\?"):
        expand(["data=review.csv"], CHOICES)


def test_a_run_without_a_model_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"model=runs/begun: that run has no model/"):
        expand(["model=runs/begun"], CHOICES)


@settings(max_examples=300, deadline=None)
@given(name=st.text(st.sampled_from("ab '\"\\,()=[]{}:;$%&#!@~+*?.-é/"), min_size=1, max_size=9))
def test_any_path_reaches_hydra_as_it_was_typed(name: str) -> None:
    """Whatever the grammar makes of its characters; what is in quotes already stays so."""
    if len(name) > 1 and name[0] == name[-1] and name[0] in "'\"":
        return
    (argument,), _ = expand([f"data.train={name}"], CHOICES)
    value = OverridesParser.create().parse_override(argument).value()
    assert str(getattr(value, "text", value)) == name


def test_splits_in_other_spellings_are_found_or_asked_about(folder: Path) -> None:
    """Never cut anew, which would put test rows into training."""
    for name in ("train.ndjson", "validation.NDJSON", "test-00000-of-00001.parquet"):
        (folder / "other").mkdir(exist_ok=True)
        (folder / "other" / name).touch()
    full, _ = expand(["data=other"], CHOICES)
    assert full[1:] == [
        "data.train=other/train.ndjson",
        "data.validation=other/validation.NDJSON",
        "data.test=other/test-00000-of-00001.parquet",
    ]
    (folder / "loose" / "test_2.csv").touch()
    with pytest.raises(UserError, match=r"is test_2.csv its test split\?"):
        expand(["data=loose"], CHOICES)
    (folder / "parts" / "train.csv").touch()
    with pytest.raises(UserError, match=r"is train.jsonl its train split, or train.csv\?"):
        expand(["data=parts"], CHOICES)
