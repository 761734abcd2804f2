"""How much memory a rank's states take, by stage: arithmetic, for `ftcore plan`.

All in fp32, as the engine is run: a weight, its gradient, Adam's two moments, and from stage 1 on the
optimiser's own copy of the slice that it steps. Activations are not counted, nor what else a run allocates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["BUCKET", "LAYOUTS", "Counts", "count", "estimate", "report"]

FP32 = 4
PARTS = ("parameters", "gradients", "optimizer", "plugins")
BUCKET = 50_000_000
"""Elements that are reduced at a time (`reduce_bucket_size`): a buffer of 0.2 GB on each rank."""

LAYOUTS: tuple[tuple[int, bool, bool], ...] = (
    (0, False, False),
    (1, False, False),
    (2, False, False),
    (3, False, False),
    (1, True, False),
    (2, True, False),
    (3, True, False),
    (3, True, True),
)
"""(stage, offload_optimizer, offload_params), the fastest first."""


PERSISTENT = 100_000
"""Elements of a parameter below which stage 3 keeps it whole on each rank (DeepSpeed's default)."""


@dataclass(frozen=True)
class Counts:
    """Numbers in a model.

    Attributes:
        total: its parameters.
        trained: those of them that are trained.
        small: those that stage 3 keeps whole.
        kept: what plugins keep beside the weights (mixout's target), over all ranks.
    """

    total: int
    trained: int
    small: int = 0
    kept: int = 0


def count(parameters: Iterable[tuple[int, bool]], kept: int) -> Counts:
    """`Counts` of parameters, each as (elements, is trained)."""
    every = list(parameters)
    return Counts(
        total=sum(n for n, _ in every),
        trained=sum(n for n, trained in every if trained),
        small=sum(n for n, _ in every if n < PERSISTENT),
        kept=kept,
    )


def estimate(counts: Counts, ranks: int, layout: tuple[int, bool, bool]) -> dict[str, float]:
    """Bytes on one rank of W, over which states are split.

    Returns:
        `parameters`, `gradients`, `optimizer` (moments, and the copy that is stepped) and `plugins`; of
        these, `device` and `host` are what is on the device and, by offloading, in the CPU's memory.
    """
    stage, offload_optimizer, offload_params = layout
    states = 3 if stage else 2  # the moments; the copy that is stepped
    parts = {
        "parameters": counts.total / ranks + counts.small if stage == 3 else counts.total,
        "gradients": counts.trained / (ranks if stage >= 2 else 1),
        "optimizer": counts.trained * states / (ranks if stage else 1),
        "plugins": counts.kept / (ranks if stage else 1),
    }
    sizes = {name: numbers * FP32 for name, numbers in parts.items()}
    on_host = (offload_params and {"parameters"}) or set()
    on_host |= {"optimizer", "plugins"} if offload_optimizer else set()
    host = sum(sizes[name] for name in on_host)
    if offload_optimizer:  # the slice's gradient goes to the optimiser; the device keeps what it reduces
        host += counts.trained * FP32 / ranks
    device = sum(size for name, size in sizes.items() if name not in on_host)
    return {**sizes, "device": device, "host": host}


def report(
    counts: Counts, ranks: int, chosen: tuple[int, bool, bool], device_gb: float | None
) -> dict[str, Any]:
    """Every layout's `estimate`, and the fastest that fits into `device_gb` (of 1e9 bytes); as text too."""
    rows: list[dict[str, Any]] = [
        {"overrides": _overrides(layout), "chosen": layout == chosen} | estimate(counts, ranks, layout)
        for layout in LAYOUTS
    ]
    buffer = BUCKET * FP32
    text = [f"memory of the states on each of {ranks} rank(s), in GB (activations and buffers come on top):"]
    for row in rows:
        sizes = "  ".join(f"{name} {row[name] / 1e9:.3f}" for name in (*PARTS, "device", "host"))
        text.append(f"  {'>' if row['chosen'] else ' '} {row['overrides']:<76}{sizes}")
    fits = None
    if device_gb:
        fitting = [r["overrides"] for r in rows if r["device"] + buffer <= device_gb * 1e9]
        fits = fitting[0] if fitting else "none: more ranks split further"
        text.append(f"fastest that fits {device_gb:g} GB, {buffer / 1e9:g} GB of buffer included: {fits}")
    return {"rows": rows, "fits": fits, "text": text}


def _overrides(layout: tuple[int, bool, bool]) -> str:
    stage, *offload = layout
    names = ("trainer.offload_optimizer=true", "trainer.offload_params=true")
    return " ".join([f"trainer.stage={stage}", *(n for n, on in zip(names, offload, strict=True) if on)])
