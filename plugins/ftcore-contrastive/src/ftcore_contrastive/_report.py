"""`ftcore scl-report DIR`: the draws of a few-shot sweep, all of them and the best three by validation."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ftcore import UserError

__all__ = ["Draw", "main", "read", "table"]

TOP = 3


@dataclass(frozen=True, kw_only=True, order=True)
class Draw:
    """One finished run: its arm, which draw it was, and the metric on both splits."""

    arm: tuple[int, str, float, float]  # rows, noise, its strength, weight of the contrastive term
    draw: int
    validation: float
    test: float


def main(arguments: Sequence[str]) -> int:
    """Print the table of a sweep's directory (`runs/scl_fewshot`)."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: ftcore scl-report DIR    (the directory of a sweep, such as runs/scl_fewshot)")
        return 0 if arguments in (["-h"], ["--help"]) else 2
    name, draws, unfinished = read(Path(arguments[0]))
    print(f"{name}, on test data; top {TOP} of an arm's draws by validation")
    print(table(draws))
    if unfinished:
        print(f"{len(unfinished)} runs have not finished and are left out: {', '.join(unfinished[:5])}")
    return 0


def read(folder: Path) -> tuple[str, list[Draw], list[str]]:
    """The metric's name, every finished run of a sweep, and the names of the others.

    Raises:
        UserError: no run there, or none with both validation and test metrics.
    """
    draws, unfinished, name = [], [], ""
    for config in sorted(folder.glob("*/config.yaml")):
        result = config.parent / "result.json"
        if not result.is_file():
            unfinished.append(config.parent.name)
            continue
        found = json.loads(result.read_text())
        name = (found["metric"]["name"] or "").partition("/")[2]
        metrics = found["metrics"]
        if f"eval/{name}" not in metrics or f"test/{name}" not in metrics:
            raise UserError(f"{config.parent} has no metric on validation and test data; set both data.*")
        plain = OmegaConf.to_container(OmegaConf.load(config))
        assert isinstance(plain, dict)
        arm, draw = _place(plain)
        validation, test = metrics[f"eval/{name}"], metrics[f"test/{name}"]
        draws.append(Draw(arm=arm, draw=draw, validation=validation, test=test))
    if not draws:
        raise UserError(f"no finished run in {folder}; give a sweep's directory, such as runs/scl_fewshot")
    if len({(d.arm, d.draw) for d in draws}) < len(draws):
        raise UserError(
            f"{folder} has several runs of one arm and draw, which differ in something else than"
            " data.limit.train, data.split_seed, plugin.contrastive.weight and plugin.text_noise;"
            " give each such setting a name= of its own"
        )
    return name, sorted(draws), unfinished


def _place(config: Mapping[Any, Any]) -> tuple[tuple[int, str, float, float], int]:
    """Which arm a run belongs to, and which draw it is."""
    plugins, data = config["plugin"] or {}, config["data"]
    noise = plugins.get("text_noise") or {}
    weight = float((plugins.get("contrastive") or {}).get("weight", 0))
    arm = (data["limit"]["train"] or 0, str(noise.get("kind", "")), float(noise.get("strength", 0)), weight)
    return arm, int(data["split_seed"])


def table(draws: Sequence[Draw]) -> str:
    """Per arm: mean and deviation of all draws, of the top ones, and each draw in order."""
    lines = [f"{'N':>5}  {'noise':<10}{'loss':<12}{'all':<22}{f'top {TOP}':<22}draws"]
    arms: dict[tuple[int, str, float, float], list[Draw]] = {}
    for one in draws:
        arms.setdefault(one.arm, []).append(one)
    for (rows, kind, strength, weight), found in arms.items():
        top = sorted(found, key=lambda d: (-d.validation, d.draw))[:TOP]
        each = " ".join(f"{d.test:.3f}" for d in sorted(found, key=lambda d: d.draw))
        lines.append(
            f"{rows or 'all':>5}  {f'{kind} {strength:g}' if kind else 'none':<10}"
            f"{f'CE+SCL {weight:g}' if weight else 'CE':<12}{_spread(found):<22}{_spread(top):<22}{each}"
        )
    return "\n".join(lines)


def _spread(draws: Sequence[Draw]) -> str:
    values = [d.test for d in draws]
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation} ({len(values)})"
