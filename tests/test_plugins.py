"""Plugins: the decorator, options, and how real (throw-away) distributions are found, checked and ordered."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from ftcore import UserError, __version__, plugin
from ftcore.plugins import API, Meta, check_options, conf_dirs, enable, installed

SOURCE = """
from ftcore import plugin

@plugin({meta})
class Technique:
    '''What it does.

    And more.
    '''
    rate: float = 0.5
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`install("alpha", "after=('beta',)")` puts a distribution with one plugin on the path."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(
        name: str, meta: str = "", *, source: str = "", dist: str = "", requires: str = "ftcore>=0.1"
    ) -> None:
        dist = dist or f"ftcore-{name}"
        module = f"throwaway_{dist.replace('-', '_')}_{tmp_path.name.replace('-', '_')}"
        (tmp_path / f"{module}.py").write_text(source or SOURCE.format(meta=meta))
        info = tmp_path / f"{dist.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\nRequires-Dist: {requires}\n"
        )
        (info / "entry_points.txt").write_text(f"[ftcore.plugins]\n{name} = {module}:Technique\n")

    return make


def order(*names: str) -> list[str]:
    """Names in the order in which `enable` returns the plugins."""
    return [one.name for one in enable({name: {} for name in names})]


@plugin(after=["other"], conflicts=["rival"])
class Sample:
    """One of each kind of option."""

    rate: float = 0.1
    steps: int = 3
    mode: Literal["soft", "hard"] = "soft"
    layers: list[int] = dataclasses.field(default_factory=lambda: [1])
    path: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate must be in [0, 1), got {self.rate}")


def test_plugin_makes_a_keyword_only_dataclass_that_carries_its_metadata() -> None:
    """Fields are options by keyword; instances are compared by identity."""
    assert Sample(rate=0.2).rate == 0.2
    with pytest.raises(TypeError):
        Sample(0.2)  # type: ignore[misc]
    assert Sample() != Sample()
    assert Sample.__ftcore__ == Meta(after=("other",), conflicts=("rival",))  # type: ignore[attr-defined]


def test_options_are_converted_and_defaults_filled_in() -> None:
    """What a YAML file or the command line gives becomes the field's type."""
    values = check_options(Sample, "plugin.sample", {"rate": 1, "layers": [2, 3]})
    assert values == {"rate": 1.0, "steps": 3, "mode": "soft", "layers": [2, 3], "path": None}
    assert isinstance(values["rate"], float)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rat": 0.1}, r"plugin\.sample has no option 'rat'; did you mean 'rate'\?"),
        ({"mode": "sift"}, r"plugin\.sample\.mode must be one of soft, hard, got 'sift'"),
        ({"steps": "many"}, r"plugin\.sample\.steps: .*'many'.*Integer"),
        ({"steps": 1.5}, r"plugin\.sample\.steps: .*1\.5"),
        ({"rate": None}, r"plugin\.sample\.rate: .*None"),
    ],
)
def test_wrong_option_is_an_error_that_names_it(options: dict[str, Any], message: str) -> None:
    """The message has the option's path, the rule and the value."""
    with pytest.raises(UserError, match=message):
        check_options(Sample, "plugin.sample", options)


def test_numbers_may_be_literals() -> None:
    """`Literal[1, 2]` takes its numbers and refuses others."""

    @plugin()
    class Numbered:
        bits: Literal[4, 8] = 8

    assert check_options(Numbered, "plugin.numbered", {}) == {"bits": 8}
    assert check_options(Numbered, "plugin.numbered", {"bits": 4}) == {"bits": 4}
    with pytest.raises(UserError, match=r"plugin\.numbered\.bits must be one of 4, 8"):
        check_options(Numbered, "plugin.numbered", {"bits": 5})


def test_chosen_plugin_is_loaded_with_its_options_and_origin(install: Any) -> None:
    """`enable` gives instances with the distribution they came from."""
    install("alpha")
    (one,) = enable({"alpha": {"rate": 0.25}})
    assert (one.name, one.distribution, one.version) == ("alpha", "ftcore-alpha", "1.0")
    assert one.instance.rate == 0.25
    assert one.options == {"rate": 0.25}
    assert one.summary == "What it does."


def test_error_of_post_init_reaches_the_user_under_the_plugins_name(install: Any) -> None:
    """A ValueError about an option is one line, with no traceback."""
    check = "    def __post_init__(self):\n        raise ValueError('rate is odd')\n"
    install("alpha", source=SOURCE.format(meta="") + check)
    with pytest.raises(UserError, match=r"^plugin\.alpha: rate is odd$"):
        enable({"alpha": {}})


def test_unknown_plugin_names_the_nearest(install: Any) -> None:
    """A misspelt name is corrected."""
    install("alpha")
    with pytest.raises(UserError, match=r"no plugin 'alhpa' is installed; did you mean 'alpha'\?"):
        enable({"alhpa": {}})


def test_name_of_two_distributions_is_ambiguous_only_when_chosen(install: Any) -> None:
    """Both owners are named; other plugins stay usable."""
    install("alpha", dist="ftcore-one")
    install("alpha", dist="ftcore-two")
    install("beta")
    assert order("beta") == ["beta"]
    with pytest.raises(UserError, match=r"'alpha' is defined by both ftcore-(one|two) and ftcore-(one|two)"):
        enable({"alpha": {}})


def test_broken_import_hurts_only_who_chooses_it(install: Any) -> None:
    """An installed plugin that does not import breaks no run without it."""
    install("alpha")
    install("broken", source="import no_such_module_anywhere\n")
    assert {"alpha", "broken"} <= set(installed())
    assert order("alpha") == ["alpha"]
    with pytest.raises(UserError, match=r"'broken' .* does not import: ModuleNotFoundError: .*no_such_mod"):
        enable({"broken": {}})


def test_plugin_for_another_ftcore_is_refused_before_its_import(install: Any) -> None:
    """Requires-Dist is compared first: the module, which would raise, is not run."""
    install("alpha", requires="ftcore>=99,<100", source="raise SystemError\n")
    expected = rf"'alpha' \(ftcore-alpha 1\.0\) needs ftcore(>=99,<100|<100,>=99), this is {__version__}"
    with pytest.raises(UserError, match=expected):
        enable({"alpha": {}})


def test_requirement_of_an_extra_is_no_requirement(install: Any) -> None:
    """A Requires-Dist whose marker does not hold here says nothing about this run."""
    install("alpha", requires="ftcore<0.0.1; extra == 'old'")
    assert order("alpha") == ["alpha"]


def test_entry_point_that_is_no_plugin_class_is_an_error(install: Any) -> None:
    """A class without the decorator is named."""
    install("alpha", source="class Technique: ...\n")
    with pytest.raises(UserError, match=r"'alpha': .*:Technique is no class decorated with @ftcore\.plugin"):
        enable({"alpha": {}})


def test_newer_hook_interface_is_refused(install: Any) -> None:
    """A plugin written for hooks of the future asks for an upgrade."""
    install("alpha", f"api={API + 1}")
    with pytest.raises(UserError, match=rf"hook API {API + 1}, this ftcore has 1 to {API}; upgrade ftcore"):
        enable({"alpha": {}})


@pytest.mark.parametrize("names", [("alpha", "beta"), ("beta", "alpha")])
def test_conflict_holds_whoever_declares_it(install: Any, names: tuple[str, str]) -> None:
    """Either order of two plugins of which one excludes the other is an error."""
    install("alpha", "conflicts=('beta',)")
    install("beta")
    with pytest.raises(UserError, match="'alpha' and 'beta' can't be combined"):
        order(*names)
    assert order("alpha") == ["alpha"]


def test_need_that_another_takes_away_is_an_error(install: Any) -> None:
    """What one needs and another removes is named, with both."""
    install("alpha", "needs=('logits', 'hidden_states')")
    install("beta", "removes=('hidden_states',)")
    with pytest.raises(UserError, match="'alpha' needs hidden_states, which 'beta' takes away"):
        order("alpha", "beta")


def test_order_is_that_of_selection_changed_only_by_after(install: Any) -> None:
    """`after` moves a plugin behind those it names and nothing else; absent names do not count."""
    for name in ("alpha", "beta", "delta"):
        install(name)
    install("gamma", "after=('beta', 'absent')")
    assert order("delta", "beta", "alpha") == ["delta", "beta", "alpha"]
    assert order("gamma", "delta", "beta", "alpha") == ["delta", "beta", "gamma", "alpha"]
    assert order("beta", "gamma", "alpha") == ["beta", "gamma", "alpha"]


def test_circular_order_is_an_error(install: Any) -> None:
    """Plugins that each want to be last are named; the others are not."""
    install("alpha", "after=('beta',)")
    install("beta", "after=('alpha',)")
    install("gamma")
    with pytest.raises(UserError, match="plugins alpha, beta each want to come after another"):
        order("gamma", "alpha", "beta")


def test_conf_directory_is_found_without_an_import(install: Any, tmp_path: Path) -> None:
    """`conf/` of a package that would not even import is on the search path."""
    install("alpha")
    module = installed()["alpha"][0].module
    (tmp_path / f"{module}.py").unlink()
    (tmp_path / module / "conf").mkdir(parents=True)
    (tmp_path / module / "__init__.py").write_text("raise SystemError\n")
    assert conf_dirs()["alpha"] == tmp_path / module / "conf"
