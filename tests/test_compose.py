"""From overrides to `Config`: names of runs, which plugins were chosen, and errors that say what to write."""

import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from ftcore import UserError
from ftcore.compose import UNNAMED, compose, explain, known_keys, slug
from ftcore.hints import HINTS

KEYS = ["seed", "optim.lr", "model", "+plugin", "train.batch_size", "data.train", "+plugin.a_b.rate", "task"]
VALUE = st.one_of(
    st.text("ab1._-=+,[]/ ", max_size=12), st.text(max_size=6), st.sampled_from(["1e-4", "a__b", "1", "a"])
)
OVERRIDES = st.dictionaries(st.sampled_from(KEYS), VALUE, max_size=4).map(
    lambda chosen: [f"{key}={value}" for key, value in chosen.items()]
)


@settings(max_examples=300, deadline=None)
@example(one=["data.train=a/|task=b/"], other=["data.train=a/", "task=b/"])
@example(one=["+plugin=[a/]|task=b"], other=["+plugin=[a/]", "task=b"])
@given(one=OVERRIDES, other=OVERRIDES)
def test_different_overrides_never_share_a_name(one: list[str], other: list[str]) -> None:
    """Whatever the values hold, two sets of overrides have two names."""
    assume(sorted(one) != sorted(other))
    assert slug(one) != slug(other)


@settings(max_examples=200, deadline=None)
@example(overrides=["model=a/"], seed=Random(0))
@given(overrides=OVERRIDES, seed=st.randoms(use_true_random=False))
def test_name_is_a_directorys_and_does_not_depend_on_the_order(overrides: list[str], seed: Any) -> None:
    """Letters, digits, dot, dash and underscore, of bounded length, never hidden, the same in any order."""
    name = slug(overrides)
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,119}", name)
    shuffled = list(overrides)
    seed.shuffle(shuffled)
    assert slug(shuffled) == name
    assert slug([*shuffled, *(f"{key}=x" for key in UNNAMED)]) == name


def test_names_are_readable() -> None:
    """Plain overrides are their own name; of a long path the key and the end stay; none is `default`."""
    assert slug([]) == slug(["name=x"]) == "default"
    name = slug(["model=tiny_bert", "seed=1"])
    assert "tiny_bert" in name
    assert "seed-1" in name
    long = slug([f"data.train=/{'long/' * 60}file.jsonl"])
    assert re.fullmatch(r"data\.train-.*file\.jsonl-[0-9a-f]{8}", long)


def test_nothing_given_is_the_demo() -> None:
    """`ftcore` alone composes; a model's file sets its rate, and the command line wins over it."""
    cfg = compose([])
    assert (cfg.model.path, cfg.optim.lr) == ("ftcore:minilm", 2e-4)
    assert (cfg.data.source, cfg.task.name, cfg.plugin) == ("files", "classify", {})
    assert compose(["model=tiny_bert"]).optim.lr == 1e-3
    assert compose(["model=tiny_bert", "optim.lr=0.5"]).optim.lr == 0.5


def test_composing_often_looks_into_each_plugin_once() -> None:
    """A sweep composes hundreds of times in one process; each must cost what the first does."""
    for _ in range(3):
        compose([])
        providers = [s.provider for s in HydraConfig.get().runtime.config_sources]
        assert len(providers) == len(set(providers))


def test_local_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A saved config means the same from anywhere; what is in the package keeps its name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    cfg = compose(["data=files", "data.train=a.jsonl", "model=pretrained", "model.path=weights"])
    assert (cfg.data.train, cfg.model.path) == (str(tmp_path / "a.jsonl"), str(tmp_path / "weights"))
    assert compose(["model=pretrained", "model.path=org/name"]).model.path == "org/name"
    assert compose([]).data.train == "ftcore:demo_data/train.jsonl"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`install("alpha", "rate: 0.5")` puts a distribution with a config of that plugin on the path."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(name: str, options: str, package: str = "") -> None:
        module = f"composed_{name}_{tmp_path.name.replace('-', '_')}"
        (tmp_path / module / "conf" / "plugin").mkdir(parents=True)
        (tmp_path / module / "__init__.py").write_text("raise SystemError('never imported to compose')\n")
        header = package or f"# @package plugin.{name}"
        (tmp_path / module / "conf" / "plugin" / f"{name}.yaml").write_text(f"{header}\n{options}\n")
        info = tmp_path / f"ftcore_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: ftcore-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[ftcore.plugins]\n{name} = {module}:Technique\n")

    return make


def test_files_in_options_of_plugins_become_absolute(
    install: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What names a file that is there, at any depth; a name alone and a missing file stay as they are."""
    install("alpha", "file: null\nsources: {}\nnames: []")
    monkeypatch.chdir(tmp_path)
    for file in ("a.yaml", "rows.jsonl", "query"):
        (tmp_path / file).touch()
    options = ["file=a.yaml", "sources={one:{path:rows.jsonl,weight:2}}", "names=[query,b.yaml,1.5,.,/]"]
    cfg = compose(["+plugin=alpha", *(f"plugin.alpha.{option}" for option in options)])
    assert cfg.plugin["alpha"] == {
        "file": str(tmp_path / "a.yaml"),
        "sources": {"one": {"path": str(tmp_path / "rows.jsonl"), "weight": 2}},
        "names": ["query", "b.yaml", 1.5, ".", "/"],
    }


def test_chosen_plugins_are_those_selected_in_that_order(install: Any) -> None:
    """Options come from the plugin's file and the command line; an installed one is not chosen."""
    for name in ("alpha", "beta", "gamma"):
        install(name, "rate: 0.5")
    assert compose([]).plugin == {}
    cfg = compose(["+plugin=[gamma,alpha]", "plugin.alpha.rate=0.25"])
    assert list(cfg.plugin.items()) == [("gamma", {"rate": 0.5}), ("alpha", {"rate": 0.25})]
    assert compose(["+plugin=beta"]).plugin == {"beta": {"rate": 0.5}}
    assert compose(["+plugin=[]"]).plugin == {}


def test_options_of_a_plugin_that_is_not_chosen_are_an_error(install: Any) -> None:
    """`++plugin.x.p=1` alone would choose x silently."""
    install("alpha", "rate: 0.5")
    install("beta", "rate: 0.5")
    for overrides in (["++plugin.alpha.rate=1"], ["+plugin=beta", "++plugin.alpha.rate=1"]):
        with pytest.raises(UserError, match=r"plugin\.alpha has options, but 'alpha' is not chosen; add"):
            compose(overrides)


def test_option_that_takes_any_keys_is_set_like_others(install: Any) -> None:
    """Whole, or key by key; a plugin that is not chosen gets none."""
    install("alpha", "sources: {} # by name\nrate: 0.5")
    for overrides in (["plugin.alpha.sources={a:{path:x}}"], ["plugin.alpha.sources.a.path=x"]):
        cfg = compose(["+plugin=alpha", *overrides])
        assert cfg.plugin == {"alpha": {"sources": {"a": {"path": "x"}}, "rate": 0.5}}
        with pytest.raises(UserError, match="'alpha' is not chosen"):
            compose(overrides)


def test_plugin_file_at_the_wrong_place_is_an_error(install: Any) -> None:
    """A file without its package header names the line that it lacks."""
    install("alpha", "rate: 0.5", package="# no header")
    with pytest.raises(UserError, match=r"plugin/alpha\.yaml must start with '# @package plugin\.alpha'"):
        compose(["+plugin=alpha"])


def explained(*overrides: str) -> str:
    """The one line that the user would see."""
    with pytest.raises((UserError, HydraException)) as caught:
        compose(list(overrides))
    text = str(caught.value) if isinstance(caught.value, UserError) else explain(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=tiny_brt"], r"no model 'tiny_brt'; did you mean 'tiny_bert'"),
        (["trian.steps=3"], r"no config key 'trian\.steps'; did you mean"),
        (["train.step=3"], r"no config key 'train\.step'; did you mean 'train\.steps'"),
        (["lr=3"], r"no config key 'lr'; use optim\.lr$"),
        (["train.lr=3"], r"no config key 'train\.lr'; use optim\.lr$"),
        (["max_steps=3"], r"use train\.steps$"),
        (["batch_size=3"], r"no config key 'batch_size'; did you mean train\.batch_size\?"),
        (["train.steps=many"], r"train\.steps: wrong type: .*'many'"),
        (["+seed=3"], r"'seed' is there already: write it without the \+"),
        (["train.steps"], r"can't read 'train\.steps': write key=value"),
        (["plugin=alpha"], r"a plugin is added with a plus: \+plugin=alpha"),
        (["+plugin=alpah"], r"no plugin 'alpah'; did you mean 'alpha'"),
        (["+plugin=alpha", "+plugin=beta"], r"choose several plugins by one list: '\+plugin=\[a,b\]'"),
        (["plugin.alpha.rate=1"], r"no effect: 'alpha' is not chosen; add \+plugin=alpha"),
        (["plugin.alpha.rat=1"], r"plugin alpha has no option 'rat'; did you mean 'rate'\?"),
        (["+plugin=alpha", "plugin.alpha.rat=1"], r"plugin alpha has no option 'rat'; did you mean 'rate'\?"),
        (["+model=tiny_bert"], r"^'model' has a value already: write model=tiny_bert once, without the \+$"),
        (
            ["seed=0,1"],
            r"^seed=0,1 has several values; a run of each: ftcore -m seed=0,1; one list: 'seed=\[",
        ),
        (["name=a b,c"], r"; one list: 'name=\[a b,c\]'; one text: 'name=\"a b,c\"'$"),
        (["name=choice(a, b c)"], r"a run of each: ftcore -m 'name=choice\(a, b c\)'$"),
        (
            ["+plugin=alpha,beta"],
            r"ftcore -m \+plugin=alpha,beta; one run of all: '\+plugin=\[alpha,beta\]'$",
        ),
        (["model=tiny_bert,minilm"], r"; a run of each: ftcore -m model=tiny_bert,minilm$"),
        (
            ["optim.lr=interval(1e-5, 1)"],
            r"1\)' is an interval to search: add -m hydra/sweeper=optuna \(plugin",
        ),
        (["hydra.sweper.n=1"], r"^Hydra has no key 'hydra\.sweper\.n' here; `ftcore --cfg hydra`"),
        (["plugin.alhpa.rate=1"], r"no plugin 'alhpa' is installed; did you mean 'alpha'\?"),
    ],
)
def test_error_of_hydras_becomes_one_line_with_the_cure(
    install: Any, overrides: list[str], message: str
) -> None:
    """What is wrong on the command line, and what to write instead."""
    install("alpha", "rate: 0.5")
    install("beta", "rate: 0.5")
    assert re.search(message, explained(*overrides))


def test_hints_name_keys_that_are_there() -> None:
    """Every setting that a hint proposes is one of ours, and no hint hides one."""
    keys = known_keys()
    groups = "train|data|optim|model|task|trainer"
    for key, hint in HINTS.items():
        named = re.findall(rf"\b(?:{groups})\.[a-z_.]*[a-z]", hint)
        assert set(named) <= set(keys), key
        assert key == "lr" or key not in {k.rpartition(".")[2] for k in keys}


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("learning_rate", r"use optim\.lr$"),
        ("gradient_accumulation_steps", r"train\.micro_batch_size: accumulation follows"),
        ("training.cutoff_len", r"use data\.max_length$"),
        ("report_to", r"no config key 'report_to'; each run writes metrics\.jsonl"),
        ("val_set_size", r"use data\.split="),
    ],
)
def test_key_of_another_tool_is_answered_by_ours(key: str, message: str) -> None:
    """Habits that no nearest name would find."""
    assert re.search(message, explained(f"{key}=1"))


def test_short_forms_and_guesses_are_composed_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One file with other columns: the path is absolute, the split set, each decision a line on stderr."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a (1).csv").write_text("review;stars\ngood;5\nbad;1\n")
    cfg = compose(["data=a (1).csv"])
    assert cfg.data.train == str(tmp_path / "a (1).csv")
    assert cfg.data.split == [0.8, 0.1, 0.1]
    assert (cfg.data.columns.text, cfg.data.columns.label) == ("review", "stars")
    said, written, guessed = capsys.readouterr().err.splitlines()
    assert said == (
        "ftcore: data=a (1).csv  means  data=files data.train='a (1).csv' data.split=[0.8,0.1,0.1]"
    )
    assert written == "ftcore: a (1).csv: utf-8, ';' between fields, \" quotes"
    assert guessed.startswith("ftcore: guessed data.columns.label=stars data.columns.text=review (columns:")
    assert compose(["data=a (1).csv", "data.columns.label=grade"]).data.columns.label == "grade"


def test_known_keys_are_the_dotted_leaves() -> None:
    """Every source's keys are there, groups themselves are not."""
    keys = known_keys()
    assert {"train.steps", "data.columns.text", "data.splits.train", "data.streaming", "seed"} <= set(keys)
    assert not {"train", "data", "data.columns", "model"} & set(keys)
