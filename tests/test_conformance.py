"""The conformance suite finds what is wrong with a plugin, and says so."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ftcore.plugins import FILES
from ftcore.testing import Conformance

HEAD = """
import random
import torch
from ftcore import LossTerm, hookimpl, plugin

"""
MEAN = """
@plugin(api=1)
class Averaged:
    '''Add a mean to a sum.'''

    @hookimpl(wrapper=True)
    def compute_loss(self, outputs):
        terms = yield
        terms["averaged"] = LossTerm(sum=outputs.logits.square().mean(), unit="examples", weight=1e-6)
        return terms
"""
MODULE = """
STEPS = []

@plugin(api=1)
class Remembering:
    '''Keep what it counts at module level.'''

    @hookimpl(wrapper=True)
    def compute_loss(self):
        terms = yield
        STEPS.append(1)
        terms["task"].weight = 1 / len(STEPS)
        return terms
"""
RANDOM = """
@plugin(api=1)
class Dicing:
    '''Draw from a generator that no seed reaches.'''

    @hookimpl(wrapper=True)
    def compute_loss(self):
        terms = yield
        terms["task"].weight = 1 + 0.1 * random.random()
        return terms
"""
FORGETTING = """
@plugin(api=1)
class Forgetting:
    '''Count steps, and not save the count.'''

    def __post_init__(self):
        self.count = 0

    @hookimpl
    def on_gradients(self, shards):
        self.count += 1
        for shard in shards:
            shard.grad *= self.count
"""
WHOLE = """
@plugin(api=1)
class Normed:
    '''Take the norm of a shard for the norm of the parameter.'''

    @hookimpl
    def regularize(self, shards):
        return {"normed": sum(shard.value.norm() for shard in shards)}
"""
READING = """
@plugin(api=1)
class Reading:
    '''Read the parameters where there are only shards.'''

    @hookimpl
    def on_step_start(self, model):
        self.model = model

    @hookimpl
    def on_gradients(self, shards):
        norms = {n: float(p.detach().norm()) for n, p in self.model.named_parameters()}
        for shard in shards:
            shard.grad *= 1 + norms[shard.name]
"""
BATCHED = """
@plugin(api=1)
class Batched:
    '''A loss between the rows of a micro-batch, declared as such.'''

    additive: bool = False

    @hookimpl(wrapper=True)
    def compute_loss(self, outputs):
        terms = yield
        pull = outputs.logits.sum(dim=0).square().sum()
        terms["batched"] = LossTerm(sum=pull, unit="examples", additive=self.additive)
        return terms
"""


class Suite(Conformance):
    """The suite, its tests called one by one."""

    def __init__(self, name: str, options: Mapping[str, Any] | None = None) -> None:
        self.name, self.options = name, options or {}


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`suite(source, "name")`: the suite for a plugin of that source."""

    def make(source: str, name: str, options: Mapping[str, Any] | None = None) -> Suite:
        path = tmp_path / f"{name}.py"
        path.write_text(HEAD + source)
        monkeypatch.setenv(FILES, str(path))
        return Suite(name, options)

    return make


def test_a_mean_added_to_a_sum_is_found(suite: Any, tmp_path: Path) -> None:
    """Even where its weight is too small to be seen in the gradient."""
    made = suite(MEAN, "averaged")
    with pytest.raises(
        AssertionError, match=r"'averaged' is 3 times as large in 3 micro-batches: its sum is a mean"
    ):
        made.test_one_gradient_however_it_is_split(made.config(), tmp_path)


def test_state_at_module_level_is_found(suite: Any, tmp_path: Path) -> None:
    """The variable is named."""
    made = suite(MODULE, "remembering")
    with pytest.raises(AssertionError, match=r"ftcore_file_\w+\.STEPS keeps state at module level"):
        made.test_deterministic_under_a_seed(made.config(), tmp_path)


def test_randomness_outside_the_seed_is_found(suite: Any, tmp_path: Path) -> None:
    """With what to draw from instead."""
    made = suite(RANDOM, "dicing")
    with pytest.raises(
        AssertionError, match=r"differ from step 1: something is random outside the seed; use step\."
    ):
        made.test_deterministic_under_a_seed(made.config(), tmp_path)


def test_state_that_is_not_saved_is_found(suite: Any, tmp_path: Path) -> None:
    """The first step after the resumption is named."""
    made = suite(FORGETTING, "forgetting")
    with pytest.raises(AssertionError, match=r"differ from step 3: what a later step needs .* state_dict"):
        made.test_resume_is_as_never_stopped(made.config(), tmp_path)
    made.test_deterministic_under_a_seed(made.config(), tmp_path)


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        (
            WHOLE,
            "normed",
            r"penalty 'normed' is [\d.]+ on one rank and [\d.]+ on two: a shard is one rank's part",
        ),
        (
            READING,
            "reading",
            r"reads the model's parameters where it has shards: under ZeRO-3 they are empty",
        ),
    ],
)
def test_a_shard_read_as_if_it_were_whole_is_found(
    suite: Any, tmp_path: Path, source: str, name: str, message: str
) -> None:
    """The shard itself, or the parameter behind it; what one process does is right in both."""
    made = suite(source, name)
    made.test_one_gradient_however_it_is_split(made.config(), tmp_path)
    with pytest.raises(AssertionError, match=message):
        made.test_one_gradient_on_two_ranks(made.config(), tmp_path)


def test_no_claim_is_made_for_a_term_that_is_not_additive(suite: Any, tmp_path: Path) -> None:
    """Declared, it is left out of the comparison; undeclared, it is off."""
    made = suite(BATCHED, "batched")
    made.test_one_gradient_however_it_is_split(made.config(), tmp_path)
    undeclared = made.config(options={"additive": True})
    with pytest.raises(
        AssertionError, match=r"'batched' is .*where rows of one interact, say additive=False"
    ):
        made.test_one_gradient_however_it_is_split(undeclared, tmp_path)
