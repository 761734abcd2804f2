"""From Hydra's grammar to distributions, and options that only some trials have."""

from collections.abc import Sequence

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna import create_study
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import RandomSampler

from ftcore.errors import UserError
from ftcore_optuna.space import Space, distribution

PARSER = OverridesParser.create()


def selects(overrides: Sequence[str]) -> list[str]:
    """The plugins of `+plugin=`, by its text."""
    value = next(o.partition("=")[2] for o in overrides if o.startswith("+plugin="))
    return [name for name in value.strip("[]").split(",") if name]


def space(*overrides: str) -> Space:
    return Space.parse(PARSER.parse_overrides(list(overrides)), selects)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=1e-5,1e-3", CategoricalDistribution(["1e-05", "0.001"])),
        ("a=choice(x,[y,z])", CategoricalDistribution(["x", "[y,z]"])),
        ("a=interval(0,0.5)", FloatDistribution(0, 0.5)),
        ("a=tag(log,interval(1e-5,1e-3))", FloatDistribution(1e-5, 1e-3, log=True)),
        ("a=int(interval(2,5))", IntDistribution(2, 5)),
        ("a=tag(log,int(interval(2,64)))", IntDistribution(2, 64, log=True)),
        ("a=range(2,9,3)", IntDistribution(2, 8, step=3)),
        ("a=range(3,4)", CategoricalDistribution(["3"])),
    ],
)
def test_distributions(text: str, expected: object) -> None:
    assert distribution(PARSER.parse_override(text)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a=interval(1,0)", "an interval goes up"),
        ("a=tag(log,interval(0,1))", "from above 0"),
        ("a=interval(0,inf)", "between two numbers"),
        ("a=tag(lg,interval(1,2))", "no tag 'lg' is known; known: log"),
        ("a=tag(log,choice(1,2))", "'log' is for intervals"),
    ],
)
def test_what_is_no_distribution_is_an_error(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        distribution(PARSER.parse_override(text))


def test_options_of_a_plugin_are_drawn_where_it_is_chosen() -> None:
    found = space(
        "seed=1",
        "plugin.mixout.p=interval(0,0.9)",
        "+plugin=[],mixout,[mixout,neftune]",
        "plugin.neftune.alpha=5",
        "optim.lr=tag(log,interval(1e-5,1e-3))",
    )
    study = create_study(sampler=RandomSampler(seed=0))
    seen = set()
    for _ in range(30):
        trial = study.ask()
        drawn = found.draw(trial._suggest)
        chosen = selects(drawn)
        seen.add(tuple(chosen))
        keys = [o.partition("=")[0] for o in drawn]
        assert drawn[0] == "seed=1"
        assert ("plugin.mixout.p" in keys) == ("mixout" in chosen) == ("plugin.mixout.p" in trial.params)
        assert ("plugin.neftune.alpha=5" in drawn) == ("neftune" in chosen)
        assert {k: str(v) for k, v in trial.params.items()}.items() <= {
            o.partition("=")[0]: o.partition("=")[2] for o in drawn
        }.items()
    assert seen == {(), ("mixout",), ("mixout", "neftune")}


def test_a_later_override_replaces_an_earlier() -> None:
    found = space("+plugin=[]", "a=1,2", "a=3,4,5")
    assert found.overrides["a"] == CategoricalDistribution(["3", "4", "5"])
    assert found.describe() == {"+plugin": "[]", "a": "CategoricalDistribution(choices=('3', '4', '5'))"}


def test_an_option_that_no_trial_could_use_is_an_error() -> None:
    with pytest.raises(UserError, match=r"'plugin\.mixout\.p' has no effect: no trial chooses 'mixout'"):
        space("+plugin=[],neftune", "plugin.mixout.p=0.1,0.2")


def test_nothing_to_search_is_an_error() -> None:
    with pytest.raises(UserError, match="nothing to search"):
        space("+plugin=mixout", "seed=1")
