"""Randomness without state: the same everywhere, and independent by name."""

import torch

from ftcore import Step
from ftcore.seeding import derive, generator, seed_global


def test_derived_seeds_are_the_same_on_every_machine() -> None:
    """Values recorded once: a change here changes every run ever published."""
    assert derive(0, "order", 0) == 2094333682667709378
    assert derive(7, "step", 12, 3) == 3821583979975434363


def test_keys_are_told_apart() -> None:
    """No two keys share a seed: neither by type, nor by where one part ends."""
    keys: list[tuple[int | str, ...]] = [(1,), ("1",), (1, 1), (11,), ("1, 1",), ("a", "b"), ("ab",), ()]
    keys += [(seed, name, i) for seed in range(8) for name in ("order", "step") for i in range(50)]
    seeds = {derive(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generators_of_two_names_are_independent() -> None:
    """Equal keys draw equal numbers; another name's are uncorrelated."""
    draw = torch.randn(4000, generator=generator(0, "noise", 1))
    assert torch.equal(draw, torch.randn(4000, generator=generator(0, "noise", 1)))
    other = torch.randn(4000, generator=generator(0, "mixout", 1))
    assert abs(float(torch.corrcoef(torch.stack([draw, other]))[0, 1])) < 0.06


def test_global_generator_follows_the_key() -> None:
    """What dropout draws is decided by the last key alone, whatever was drawn before."""
    seed_global(torch.device("cpu"), 1, "step", 0, 0)
    first = torch.rand(3)
    torch.rand(100)
    seed_global(torch.device("cpu"), 1, "step", 0, 0)
    assert torch.equal(torch.rand(3), first)


def test_steps_generators_depend_on_what_they_say() -> None:
    """By name and step; by micro-batch only if asked; by row whatever the micro-batch."""

    def draw(generator: torch.Generator) -> float:
        return float(torch.rand(1, generator=generator))

    a = Step(index=5, total=10, epoch=0, seed=1, micro_batch=0)
    b = Step(index=5, total=10, epoch=0, seed=1, micro_batch=3)
    assert draw(a.generator("x")) == draw(b.generator("x")) != draw(a.generator("y"))
    assert draw(a.generator("x", per_micro_batch=True)) != draw(b.generator("x", per_micro_batch=True))
    assert draw(a.row_generator("x", 7)) == draw(b.row_generator("x", 7)) != draw(a.row_generator("x", 8))
    assert (a.progress, Step(index=0, total=0, epoch=0, seed=0).progress) == (0.5, 0.0)
