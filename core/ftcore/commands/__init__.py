"""Subcommands. Each takes its arguments and returns an exit code.

Here are `plugins`, `plan` and `resume`; each other one is a module with a `main`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ftcore.errors import UserError

if TYPE_CHECKING:
    from ftcore.hooks import Hooks

__all__ = ["Parser", "plan", "plugins", "resume"]


class Parser(argparse.ArgumentParser):
    """Whose errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (`{self.prog} --help` shows how)")


def plugins(arguments: Sequence[str]) -> int:
    """List the installed plugins; a broken one is listed with its error and harms nothing."""
    parser = Parser(prog="ftcore plugins", description="List the installed plugins.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    from ftcore.plugins import installed

    rows: list[dict[str, Any]] = []
    for name, points in installed().items():
        for point in points:
            dist = point.dist
            row = {
                "name": name,
                "distribution": dist.name if dist else point.value,
                "version": dist.version if dist else "",
            }
            try:
                cls = point.load()
                row["summary"] = (cls.__doc__ or "").strip().partition("\n")[0]
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"
            rows.append(row)
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        what = row.get("summary") or row.get("error")
        print(f"{row['name']:<16}{row['distribution']} {row['version']}  {what}")
    if not rows:
        print("no plugins are installed; they are pip packages with an entry point in ftcore.plugins")
    return 0


def plan(arguments: Sequence[str]) -> int:
    """Show what a command line would do, without loading data or weights."""
    parser = Parser(
        prog="ftcore plan",
        description="Show what a run would do: plugins in call order, batch arithmetic.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--gpu-memory", type=float, metavar="GB", help="of one device: names the fastest trainer that fits it"
    )
    parser.add_argument("overrides", nargs="*", help="the run's own arguments (key=value)")
    options = parser.parse_args(arguments)
    from ftcore.compose import compose
    from ftcore.hookspecs import names
    from ftcore.job import build_hooks
    from ftcore.strategies import local_ranks

    cfg = compose(options.overrides)
    hooks = build_hooks(cfg)
    trainer = cfg.trainer if isinstance(cfg.trainer, dict) else vars(cfg.trainer)
    ranks = local_ranks(trainer["strategy"], trainer.get("devices"))
    micro = cfg.micro_batch_size(ranks)
    described, memory = _describe(hooks, ranks, options.gpu_memory)
    report = {
        "plugins": [
            {
                "name": p.name,
                "distribution": p.distribution,
                "version": p.version,
                "options": p.options,
                "summary": p.summary,
                "declares": {k: v for k, v in asdict(p.meta).items() if v},
                **({"describes": described[p.name]} if p.name in described else {}),
            }
            for p in hooks.plugins
        ],
        "hooks": {
            name: [{"plugin": p, "wrapper": w} for p, w in found]
            for name in names()
            if (found := hooks.implementations(name))
        },
        "batch": {
            "rows_per_step": cfg.train.batch_size,
            "micro_batch_size": micro,
            "ranks": ranks,
            "accumulation": -(-cfg.train.batch_size // (micro * ranks)),
        },
        **({"memory": memory} if memory else {}),
    }
    print(json.dumps(report, indent=2) if options.json else _plan_text(report))
    return 0


def _describe(
    hooks: Hooks, ranks: int, gpu_memory: float | None
) -> tuple[dict[str, dict[str, Any]], dict[str, Any] | None]:
    """What each plugin would do to the model, and the memory that it takes, where plugins say so.

    They are asked of an outline without weights.
    """
    able = [p for p in hooks.plugins if hasattr(p.instance, "describe")]
    if able:
        import torch

        tokenizer = hooks.load_tokenizer()
        labels = ["one", "other"] if hooks.cfg.task.name == "classify" else []
        with torch.device("meta"):
            model, _ = hooks.load_model(tokenizer, labels)
    described = {p.name: p.instance.describe() for p in able}
    estimator = next((p.instance for p in able if hasattr(p.instance, "memory")), None)
    if estimator is None and gpu_memory:
        raise UserError("--gpu-memory needs a trainer that knows what it takes: trainer=deepspeed")
    if estimator is None:
        return described, None
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    kept = sum(d.get("kept_parameters", 0) for d in described.values())
    return described, estimator.memory(sizes, kept, ranks, gpu_memory)


def _plan_text(report: dict[str, Any]) -> str:
    batch = report["batch"]
    lines = ["plugins, in call order:"]
    for p in report["plugins"]:
        lines.append(f"  {p['name']} {p['version']}  {p['summary']}  {p['options']}")
        for key, value in {**p["declares"], **p.get("describes", {})}.items():
            many = isinstance(value, list | tuple)
            shown = f"{len(value)}: {', '.join(map(str, value))}" if many else value
            lines.append(f"    {key:<20}{shown}")
    if not report["plugins"]:
        lines.append("  none")
    lines.append("hooks (outermost first; wrappers in brackets):")
    for name, found in report["hooks"].items():
        lines.append(
            f"  {name:<18}" + " > ".join(f"[{f['plugin']}]" if f["wrapper"] else f["plugin"] for f in found)
        )
    lines.append(
        f"batch: {batch['rows_per_step']} rows = {batch['micro_batch_size']} micro"
        f" x {batch['accumulation']} accumulation x {batch['ranks']} rank(s)"
    )
    lines += report.get("memory", {}).get("text", [])
    return "\n".join(lines)


def resume(arguments: Sequence[str]) -> int:
    """Go on with an unfinished run from its newest valid checkpoint."""
    parser = Parser(prog="ftcore resume", description="Go on with an unfinished run.")
    parser.add_argument("run_dir", type=Path, help="its directory (runs/latest is the newest)")
    parser.add_argument("trainer", nargs="*", help="on other devices: trainer=ddp trainer.devices=2")
    options = parser.parse_args(arguments)
    from ftcore.run import read_config, run

    directory = options.run_dir.resolve()
    cfg = read_config(directory)
    if other := [o for o in options.trainer if not o.startswith(("trainer=", "trainer."))]:
        raise UserError(f"resume takes another trainer and nothing else, got '{other[0]}'")
    if options.trainer:
        from ftcore.compose import compose

        cfg.trainer = compose(options.trainer).trainer
    run(cfg, directory)
    return 0
