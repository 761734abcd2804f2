"""What hooks are given: gradients at inputs, and randomness that depends on its place alone."""

import torch

from ftcore import Step


def step(**changes: int) -> Step:
    return Step(**{"index": 3, "total": 10, "epoch": 0, "seed": 1, **changes})


def test_input_gradient_is_autograds_and_leaves_the_weights_alone() -> None:
    """Of a scalar of two inputs, in closed form; no parameter gets a gradient, even under no_grad."""
    weight = torch.nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))
    x = torch.tensor([0.5, 3.0], dtype=torch.float64)
    y = torch.tensor([1.0, 4.0], dtype=torch.float64)
    with torch.no_grad():
        dx, dy = step().input_grad(lambda a, b: (weight * a * b).pow(2).sum(), x, y)
    assert torch.allclose(dx, 2 * weight.detach() ** 2 * x * y**2)
    assert torch.allclose(dy, 2 * weight.detach() ** 2 * x**2 * y)
    assert weight.grad is None
    assert not x.requires_grad


def test_generators_depend_on_seed_step_name_and_row_alone() -> None:
    """Equal in another process, epoch or length of run; other for another seed, step, name or row."""

    def draw(one: Step, name: str = "noise", row: int = 7) -> float:
        return float(torch.rand((), generator=one.row_generator(name, row)))

    assert draw(step()) == draw(step(total=99, epoch=5, micro_batch=2))
    others = [draw(step(seed=2)), draw(step(index=4)), draw(step(), "other"), draw(step(), row=8)]
    assert len({draw(step()), *others}) == 5


def test_generator_is_the_micro_batches_where_asked() -> None:
    """A step's generator is one for all micro-batches unless `per_micro_batch` is set."""

    def draw(one: Step, each: bool) -> float:
        return float(torch.rand((), generator=one.generator("mask", per_micro_batch=each)))

    assert draw(step(micro_batch=0), False) == draw(step(micro_batch=1), False)
    assert draw(step(micro_batch=0), True) != draw(step(micro_batch=1), True)


def test_progress_runs_from_zero_to_one() -> None:
    """The share of steps that are done."""
    assert step(index=0).progress == 0.0
    assert step(index=10).progress == 1.0
