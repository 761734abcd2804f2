"""Hooks: how the answers of several plugins combine."""

from typing import Any

import pytest
import torch

from ftcore import LossTerm, Step, UserError, hookimpl, plugin
from ftcore.hooks import Hooks


def term(value: float, unit: str = "examples") -> LossTerm:
    """A loss term of that sum."""
    return LossTerm(sum=torch.tensor(value), unit=unit)


class Core:
    """Stands where core's defaults do, beneath every plugin."""

    @hookimpl(trylast=True)
    def compute_loss(self) -> dict[str, LossTerm]:
        return {"task": term(8.0)}

    @hookimpl(trylast=True)
    def count_units(self) -> dict[str, float]:
        return {"examples": 4}

    @hookimpl(trylast=True)
    def load_model(self) -> torch.nn.Module:
        return torch.nn.Sequential()


@plugin()
class Adds:
    """A wrapper that adds a term."""

    @hookimpl(wrapper=True)
    def compute_loss(self) -> Any:
        terms = yield
        return {**terms, "extra": term(1.0)}


@plugin()
class Halves:
    """A wrapper that scales the task's term."""

    @hookimpl(wrapper=True)
    def compute_loss(self) -> Any:
        terms = yield
        terms["task"].weight *= 0.5
        return terms


@plugin()
class Replaces:
    """Another loss in place of core's."""

    @hookimpl
    def compute_loss(self) -> dict[str, LossTerm]:
        return {"task": term(3.0)}


@plugin()
class AlsoReplaces(Replaces):  # type: ignore[misc]
    """One loss too many."""


@plugin()
class Answers:
    """Answers `compute_loss` and `count_units` with what it is given."""

    terms: Any = None
    units: Any = None

    @hookimpl
    def compute_loss(self) -> Any:
        return self.terms

    @hookimpl
    def count_units(self) -> Any:
        return self.units


@pytest.fixture
def over_core(config: Any, hooks: Any) -> Any:
    """`over_core(plugin, ...)`: hooks of those plugins above `Core`."""
    cfg = config()

    def make(*plugins: Any) -> Hooks:
        return Hooks(Core(), hooks(cfg, *plugins).plugins, cfg)

    return make


def loss(hooks: Hooks) -> dict[str, LossTerm]:
    """The terms that the loop would get."""
    step = Step(index=0, total=1, epoch=0, seed=0)
    return hooks.compute_loss(torch.nn.Identity(), None, None, step)  # type: ignore[arg-type]


def test_wrappers_add_terms_and_scale_the_task_whatever_the_order(over_core: Any) -> None:
    """An added term, a scaled task and a replaced task combine in any order of selection."""
    for plugins in [(Adds(), Halves(), Replaces()), (Replaces(), Halves(), Adds())]:
        terms = loss(over_core(*plugins))
        assert {n: (float(t.sum), t.weight) for n, t in terms.items()} == {
            "task": (3.0, 0.5),
            "extra": (1.0, 1.0),
        }
    assert float(loss(over_core(Adds()))["task"].sum) == 8.0


def test_later_registered_wrapper_is_the_outer_one(over_core: Any) -> None:
    """`implementations` lists a call's way in: last selected first, core last."""
    hooks = over_core(Adds(), Halves())
    assert hooks.implementations("compute_loss") == [("halves", True), ("adds", True), ("core", False)]


def test_two_replacements_are_an_error_that_names_both(over_core: Any) -> None:
    """Of two answers to a first-result hook neither wins silently."""
    with pytest.raises(UserError, match="'replaces' and 'alsoreplaces' both replace compute_loss"):
        over_core(Replaces(), AlsoReplaces())


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"loss": term(1.0)}, "main term under 'task'"),
        ([term(1.0)], "main term under 'task'"),
        ({"task": torch.tensor(1.0)}, "'task' must be a LossTerm whose sum is a scalar tensor"),
        (
            {"task": LossTerm(sum=torch.ones(2), unit="examples")},
            "'task' must be a LossTerm whose sum is a scalar",
        ),
        (
            {"task": LossTerm(sum=1.0, unit="examples")},  # type: ignore[arg-type]
            "'task' must be a LossTerm whose sum is a scalar tensor",
        ),
    ],
)
def test_loss_of_a_wrong_shape_is_an_error(over_core: Any, terms: Any, message: str) -> None:
    """What a plugin returns is checked before it is divided by anything."""
    with pytest.raises(UserError, match=message):
        loss(over_core(Answers(terms=terms)))


def test_units_are_merged_and_a_repeated_one_is_an_error(over_core: Any) -> None:
    """Two plugins can't count the same unit."""
    assert over_core(Answers(units={"mine/pairs": 2})).count_units(None) == {"examples": 4, "mine/pairs": 2}
    with pytest.raises(UserError, match=r"two plugins answer 'examples' in count_units.*core.*answers"):
        over_core(Answers(units={"examples": 2})).count_units(None)


def test_metrics_are_merged_and_a_repeated_one_is_an_error(over_core: Any) -> None:
    """Two plugins can't report the same metric; None reports nothing."""

    @plugin()
    class Metric:
        key: str = "spread"

        @hookimpl
        def evaluate(self, predictions: Any) -> Any:
            return {self.key: float(len(predictions["label"]))} if predictions else None

    @plugin()
    class Other(Metric):  # type: ignore[misc]
        pass

    hooks = over_core(Metric(), Other(key="bias"))
    assert hooks.evaluate({"label": [1, 2]}, [], "test") == {"spread": 2.0, "bias": 2.0}
    assert hooks.evaluate({}, [], "test") == {}
    with pytest.raises(UserError, match="two plugins answer 'spread' in evaluate"):
        over_core(Metric(), Other()).evaluate({"label": [1, 2]}, [], "test")


def test_model_is_passed_through_in_the_order_of_selection(over_core: Any) -> None:
    """Each `setup_model` gets what the one before returned; None leaves the model as it is."""

    @plugin()
    class Wraps:
        @hookimpl
        def setup_model(self, model: Any) -> Any:
            return torch.nn.Sequential(torch.nn.Identity(), *model)

    @plugin()
    class Inspects:
        @hookimpl
        def setup_model(self, cfg: Any, model: Any) -> None:
            self.seen = len(model)

    model, pretrained = over_core(Wraps(), first := Inspects()).load_model(None, [])
    assert (first.seen, len(model), pretrained) == (1, 1, {})
    over_core(early := Inspects(), Wraps()).load_model(None, [])
    assert early.seen == 0


def test_pretrained_values_are_copied_where_a_plugin_needs_them(over_core: Any) -> None:
    """They are flat, by name, and as they were loaded: before any `setup_model` writes into the model."""

    @plugin(needs=("pretrained",))
    class Pulls:
        @hookimpl
        def load_model(self) -> Any:
            return torch.nn.Linear(2, 3)

        @hookimpl
        def setup_model(self, model: Any) -> None:
            self.loaded = model.weight.detach().clone()
            torch.nn.init.zeros_(model.weight)

    model, pretrained = over_core(pulls := Pulls()).load_model(None, [])
    assert torch.equal(pretrained["weight"], pulls.loaded.flatten())
    assert pretrained.keys() == {"weight", "bias"}
    assert not model.weight.any()


def test_wrapper_around_a_chained_hook_is_refused(over_core: Any) -> None:
    """`setup_model` is no wrapper's business: a generator must never take the model's place."""

    @plugin()
    class Surrounds:
        @hookimpl(wrapper=True)
        def setup_model(self) -> Any:
            return (yield)

    with pytest.raises(UserError, match=r"'surrounds'.*setup_model"):
        over_core(Surrounds()).load_model(None, [])


def test_hook_or_argument_that_does_not_exist_is_an_error(over_core: Any) -> None:
    """A misspelt hook, or an argument that it does not have, names the plugin."""

    @plugin()
    class Hook:
        @hookimpl
        def compute_los(self) -> None: ...

    @plugin()
    class Argument:
        @hookimpl
        def compute_loss(self, logits: Any) -> None: ...

    with pytest.raises(UserError, match=r"compute_los.*hook"):
        over_core(Hook())
    with pytest.raises(UserError, match=r"'argument': .*logits"):
        over_core(Argument())


@plugin()
class Meddles:
    """A wrapper that does to the terms what `how` says."""

    how: str = ""

    @hookimpl(wrapper=True)
    def compute_loss(self) -> Any:
        terms = yield
        if self.how == "replaces":
            terms["task"] = term(1.0)
        if self.how == "scales":
            return {"task": LossTerm(sum=terms["task"].sum, unit="examples", weight=0.5)}
        if self.how == "drops":
            return {"mine": term(1.0), "task": terms["task"]}
        return terms


def test_a_wrapper_may_scale_a_term_and_not_replace_or_drop_one(over_core: Any) -> None:
    """A name that is taken, or another plugin's term that is lost, is an error that names both."""
    assert loss(over_core(Meddles(how="scales")))["task"].weight == 0.5
    with pytest.raises(
        UserError, match="'meddles' puts another loss term under the name 'task', which is taken"
    ):
        loss(over_core(Meddles(how="replaces")))
    with pytest.raises(UserError, match="'meddles' drops the loss term 'extra'"):
        loss(over_core(Adds(), Meddles(how="drops")))


@pytest.mark.parametrize(
    ("total", "message"),
    [
        (torch.tensor(1.0, device="meta"), "'task' is on meta, the batch on cpu"),
        (torch.tensor(1.0, dtype=torch.bfloat16), "'task' is summed in torch.bfloat16: add up in fp32"),
    ],
)
def test_a_sum_elsewhere_or_in_half_precision_is_an_error(over_core: Any, total: Any, message: str) -> None:
    """A term on another device, or one that was rounded, is named."""
    hooks, batch = over_core(Answers(terms={"task": LossTerm(sum=total, unit="examples")})), {}
    batch["input_ids"] = torch.zeros(1, 1)
    with pytest.raises(UserError, match=message):
        hooks.compute_loss(torch.nn.Identity(), batch, None, Step(index=0, total=1, epoch=0, seed=0))


@plugin()
class Forgets:
    """Forgot the marker above its hook."""

    def compute_loss(self) -> None: ...


def test_a_hook_without_its_marker_is_an_error(over_core: Any) -> None:
    """It would never be called."""
    with pytest.raises(
        UserError, match="'forgets': its compute_loss is never called; put @hookimpl above it"
    ):
        over_core(Forgets())


def test_the_time_in_each_plugins_hooks_is_added_up(over_core: Any) -> None:
    """Of wrappers and plain hooks, by hook; core's own is not counted."""
    hooks = over_core(Adds(), Answers(terms={"task": term(1.0)}, units={"mine": 1.0}))
    loss(hooks)
    hooks.count_units(None)
    assert {name: set(spent) for name, spent in hooks.seconds.items()} == {
        "adds": {"compute_loss"},
        "answers": {"compute_loss", "count_units"},
    }
    assert all(seconds > 0 for spent in hooks.seconds.values() for seconds in spent.values())
