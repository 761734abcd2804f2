"""The schedule in closed form, and which parameters share a decay and a rate."""

import math
from typing import Any

import pytest
import torch

from ftcore import UserError, hookimpl, plugin
from ftcore.config import OptimConfig
from ftcore.optim import build_optimizer, lr_factor


def factors(total: int, **options: Any) -> list[float]:
    """The factor of every step."""
    return [lr_factor(OptimConfig(**options), i, total) for i in range(total)]


@pytest.mark.parametrize(("warmup", "steps"), [(0.2, 2), (0.11, 2), (3, 3), (1, 1), (0.0, 0)])
def test_linear_schedule_in_closed_form(warmup: float, steps: int) -> None:
    """Up in equal parts to 1, then down in equal parts, ending one part above 0."""
    expected = [(i + 1) / steps for i in range(steps)]
    expected += [1 - i / (10 - steps) for i in range(10 - steps)]
    assert factors(10, schedule="linear", warmup=warmup) == pytest.approx(expected)


def test_cosine_and_constant_in_closed_form() -> None:
    """Half a cosine from 1 down; or 1 throughout, after the same warm-up."""
    cosine = [0.5, 1.0] + [(1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]
    assert factors(10, schedule="cosine", warmup=2) == pytest.approx(cosine)
    assert factors(10, schedule="constant", warmup=2) == [0.5] + [1.0] * 9


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("total", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0, 50.0])
def test_every_step_has_a_rate_above_zero(schedule: str, total: int, warmup: float) -> None:
    """No step is wasted, however short the run or long the warm-up; no factor is above 1."""
    assert all(0 < factor <= 1 for factor in factors(total, schedule=schedule, warmup=warmup))


@pytest.mark.parametrize(("share", "total"), [(0.07, 100), (0.1, 30), (0.14, 50), (0.28, 25), (0.55, 100)])
def test_share_of_the_steps_is_not_rounded_up_by_floating_point(share: float, total: int) -> None:
    """7% of 100 steps are 7, although 0.07 * 100 is a little more in floating point."""
    found = factors(total, schedule="constant", warmup=share)
    assert found.index(1.0) + 1 == round(share * total)


@plugin()
class Options:
    """Gives parameters whose name starts so these options."""

    start: str = "0"
    values: Any = None

    @hookimpl
    def param_options(self, name: str) -> Any:
        return self.values if name.startswith(self.start) else None


@plugin()
class More(Options):  # type: ignore[misc]
    """A second one."""


@pytest.fixture
def grouped(config: Any, hooks: Any) -> Any:
    """`grouped(plugin, ...)`: (decay, rate scale) of every parameter of a small model."""

    def make(*plugins: Any) -> dict[str, tuple[float, float]]:
        model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 1))
        model[2].bias.requires_grad_(False)
        optimizer = build_optimizer(model, hooks(config({"optim.weight_decay": 0.1}), *plugins))
        names = {id(p): name for name, p in model.named_parameters()}
        groups = optimizer.param_groups
        pairs = [(names[id(p)], (g["weight_decay"], g["lr_scale"])) for g in groups for p in g["params"]]
        assert len(pairs) == len(dict(pairs))
        return dict(pairs)

    return make


def test_vectors_are_not_decayed_and_frozen_parameters_not_trained(grouped: Any) -> None:
    """Matrices decay; biases and norms do not; what is frozen is in no group."""
    assert grouped() == {
        "0.weight": (0.1, 1.0),
        "0.bias": (0.0, 1.0),
        "1.weight": (0.0, 1.0),
        "1.bias": (0.0, 1.0),
        "2.weight": (0.1, 1.0),
    }


def test_plugins_set_decay_and_rate_of_a_parameter(grouped: Any) -> None:
    """Two plugins' answers for one parameter are merged; a decay of a vector is obeyed."""
    found = grouped(Options(values={"lr_scale": 0.5}), More(values={"weight_decay": 0.3}))
    assert found["0.weight"] == found["0.bias"] == (0.3, 0.5)
    assert found["2.weight"] == (0.1, 1.0)


def test_clash_of_two_plugins_is_an_error(grouped: Any) -> None:
    """Two different rates for one parameter; equal ones agree."""
    with pytest.raises(UserError, match=r"a different lr_scale: .*options.*more"):
        grouped(Options(values={"lr_scale": 0.5}), More(values={"lr_scale": 0.4}))
    grouped(Options(values={"lr_scale": 0.5}), More(values={"lr_scale": 0.5}))
    with pytest.raises(UserError, match="'lr' is neither lr_scale nor weight_decay"):
        grouped(Options(values={"lr": 0.5}))


def test_rate_scale_is_applied_at_every_step(open_tiny: Any) -> None:
    """A strategy steps each group at the step's rate times its scale."""
    job = open_tiny()
    job.strategy.optimizer = build_optimizer(
        job.strategy.model, job.hooks
    )  # the job's own has no other scale
    job.strategy.optimizer.param_groups[0]["lr_scale"] = 0.25
    job.strategy.step(0.8)
    assert [g["lr"] for g in job.strategy.optimizer.param_groups] == [0.2, 0.8]
