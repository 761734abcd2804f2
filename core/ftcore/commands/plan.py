"""`ftcore plan`: what a command line would do, without loading weights; under -m, which jobs are left."""

from __future__ import annotations

import contextlib
import io
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore.commands import Parser, parse_run
from ftcore.errors import UserError

if TYPE_CHECKING:
    from ftcore.config import Config
    from ftcore.hooks import Hooks
    from ftcore.plugins import Enabled
    from ftcore.prepare import Prepared

__all__ = ["main"]

MEASURED_STEPS = 8
WARM_UP = 3  # of those: allocations, first calls


def main(arguments: Sequence[str]) -> int:
    """Show what a command line would do."""
    parser = Parser(
        prog="ftcore plan",
        description="Show what a run would do: plugins in call order, options, batches, memory, time, disk.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--measure",
        action="store_true",
        help=f"train {MEASURED_STEPS} steps on the data, for the time it takes",
    )
    parser.add_argument(
        "--gpu-memory", type=float, metavar="GB", help="of one device: names the fastest trainer that fits it"
    )
    parser.add_argument("-m", "--multirun", action="store_true", help="of a sweep: its jobs and their state")
    options = parse_run(parser, arguments)
    if options.multirun:
        report = _sweep(options.overrides, options.measure)
        print(json.dumps(report, indent=2) if options.json else _sweep_text(report))
        return 0
    from ftcore.compose import compose_with_directory

    cfg, run_dir = compose_with_directory(options.overrides)
    report = _report(cfg, run_dir, options.overrides, options.gpu_memory, options.measure)
    print(json.dumps(report, indent=2) if options.json else _text(report))
    return 0


def _report(
    cfg: Config, run_dir: Path, overrides: Sequence[str], gpu_memory: float | None, measure: bool
) -> dict[str, Any]:
    from ftcore.hookspecs import names
    from ftcore.job import build_hooks
    from ftcore.prepare import cached, prepare
    from ftcore.strategies import local_ranks

    hooks = build_hooks(cfg)
    cfg = hooks.cfg
    trainer = cfg.trainer if isinstance(cfg.trainer, dict) else vars(cfg.trainer)
    ranks = local_ranks(trainer["strategy"], trainer.get("devices"), trainer.get("device"))
    micro = cfg.micro_batch_size(ranks)
    tokenizer = hooks.load_tokenizer()
    prepared = prepare(hooks, tokenizer) if measure else cached(hooks, tokenizer)
    described, memory, parameters = _describe(hooks, tokenizer, prepared, ranks, gpu_memory)
    return {
        "plugins": [_plugin(p, cfg, overrides, described.get(p.name)) for p in hooks.plugins],
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
        "parameters": parameters,
        **_work(cfg, hooks, prepared, measure),
        **({"memory": memory} if memory else {}),
        "disk": _disk(cfg, parameters),
        "directory": str(run_dir),
    }


def _plugin(
    plugin: Enabled, cfg: Config, overrides: Sequence[str], described: dict[str, Any] | None
) -> dict[str, Any]:
    node = "trainer" if plugin.name == cfg.trainer_plugin else f"plugin.{plugin.name}"
    cls = type(plugin.instance)
    return {
        "name": plugin.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "options": plugin.options,
        "from": {key: _origin(node, key, value, cls, overrides) for key, value in plugin.options.items()},
        "summary": plugin.summary,
        "declares": {k: v for k, v in asdict(plugin.meta).items() if v},
        **({} if described is None else {"describes": described}),
    }


def _origin(node: str, key: str, value: Any, cls: type[Any], overrides: Sequence[str]) -> str:
    """Where an option's value comes from: the command line, a chosen file, or the plugin's default."""
    from ftcore.plugins import check_options

    given = [o.lstrip("+").partition("=")[0] for o in overrides]
    if f"{node}.{key}" in given:
        return "command line"
    return "default" if check_options(cls, node, {})[key] == value else "a chosen config file"


def _describe(
    hooks: Hooks, tokenizer: Any, prepared: Prepared | None, ranks: int, gpu_memory: float | None
) -> tuple[dict[str, dict[str, Any]], dict[str, Any] | None, int]:
    """What each plugin would do to the model, the memory that it takes, and the number of parameters.

    All by an outline without weights.
    """
    import torch

    labels = prepared.labels if prepared else ["one", "other"] if hooks.cfg.task.name == "classify" else []
    with torch.device("meta"):
        model, _ = hooks.load_model(tokenizer, labels)
    able = [p for p in hooks.plugins if hasattr(p.instance, "describe")]
    described = {p.name: p.instance.describe() for p in able}
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    total, trained = sum(n for n, _ in sizes), sum(n for n, is_trained in sizes if is_trained)
    kept = sum(d.get("kept_parameters", 0) for d in described.values())
    estimator = next((p.instance for p in able if hasattr(p.instance, "memory")), None)
    if estimator is not None:
        return described, estimator.memory(sizes, kept, ranks, gpu_memory), total
    if gpu_memory:
        raise UserError("--gpu-memory needs a trainer that knows what it takes: trainer=deepspeed")
    states = {
        "parameters": 4 * total,
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "plugins": 4 * kept,
    }
    shown = ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in states.items() if size)
    line = f"memory per rank, activations not counted: {sum(states.values()) / 1e6:,.0f} MB ({shown})"
    return described, {**states, "text": [line]}, total


def _work(cfg: Config, hooks: Hooks, prepared: Prepared | None, measure: bool) -> dict[str, Any]:
    """Rows, tokens, steps, and how long they take: what is known of it."""
    if prepared is None:
        steps = cfg.train.steps
        return {"steps": steps} if steps else {}
    sampler = hooks.build_sampler(prepared.splits["train"], cfg.train.batch_size, cfg.seed)
    found: dict[str, Any] = {
        "rows": {split: audit.rows for split, audit in prepared.audits.items()},
        "tokens_per_epoch": int(prepared.splits["train"].lengths.sum()),
        "steps_per_epoch": sampler.steps_per_epoch,
        "steps": cfg.total_steps(sampler.steps_per_epoch),
    }
    if measure:
        step = _measured(cfg)
        evaluations = math.ceil(found["steps"] / (cfg.train.eval_every or sampler.steps_per_epoch))
        evaluated = evaluations * found["rows"].get("validation", 0) + found["rows"].get("test", 0)
        # A forward pass is about a third of a step's work.
        seconds = found["steps"] * step + evaluated * step / cfg.train.batch_size / 3
        found |= {"seconds_per_step": round(step, 6), "seconds": round(seconds, 3)}
    return found


def _measured(cfg: Config) -> float:
    """Seconds a step, as the median of a few in this process, with evaluation and saving left out."""
    from ftcore.contract import State, Step
    from ftcore.plugins import Enabled, hookimpl, plugin
    from ftcore.probe import write_config
    from ftcore.run import train_here
    from ftcore.signals import StopFlag

    started, took = [0.0], []

    @plugin()
    class Stopwatch:
        """Notes when each step begins and ends."""

        @hookimpl(tryfirst=True)
        def on_step_start(self, step: Step) -> None:
            started[0] = time.perf_counter()

        @hookimpl(trylast=True)
        def on_step_end(self, state: State) -> None:
            took.append(time.perf_counter() - started[0])

    if isinstance(cfg.trainer, dict) or cfg.trainer.strategy != "single":
        raise UserError(
            "--measure trains in this process: give it with trainer=single, and divide by the ranks"
        )
    train = replace(cfg.train, steps=MEASURED_STEPS, eval_every=MEASURED_STEPS, save_every=MEASURED_STEPS)
    few = replace(cfg.data, limit=replace(cfg.data.limit, validation=2, test=2))
    one = Enabled(name="stopwatch", instance=Stopwatch(), distribution="", version="", options={})
    with tempfile.TemporaryDirectory(prefix="ftcore-plan-") as folder:
        small = replace(cfg, train=train, data=few)
        write_config(small, Path(folder))
        with contextlib.redirect_stdout(io.StringIO()):
            train_here(small, Path(folder), StopFlag(), [one])
    return statistics.median(took[WARM_UP:])


def _disk(cfg: Config, parameters: int) -> dict[str, Any]:
    from ftcore.run import disk_bytes

    most, after = disk_bytes(cfg, parameters)
    return {"most_bytes": most, "after_bytes": after}


def _text(report: dict[str, Any]) -> str:
    batch = report["batch"]
    lines = ["plugins, in call order:"]
    for p in report["plugins"]:
        lines.append(f"  {p['name']} {p['version']}  {p['summary']}")
        lines += [f"    {key} = {value}  ({p['from'][key]})" for key, value in p["options"].items()]
        for key, value in {**p["declares"], **p.get("describes", {})}.items():
            many = isinstance(value, list | tuple)
            names = ", ".join([*map(str, value[:3]), *(["..."] if len(value) > 3 else [])]) if many else ""
            shown = f"{len(value)}: {names}" if many else value
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
    lines += _work_lines(report)
    disk = report["disk"]
    lines.append(
        f"disk: up to {disk['most_bytes'] / 1e6:,.0f} MB while it trains,"
        f" {disk['after_bytes'] / 1e6:,.0f} MB after"
    )
    lines.append(f"directory: {report['directory']}")
    return "\n".join(lines)


def _work_lines(report: dict[str, Any]) -> list[str]:
    if "rows" not in report:
        steps = f"{report['steps']} steps; " if "steps" in report else ""
        return [f"work: {steps}rows and tokens are not known before `ftcore prepare` with the same arguments"]
    rows = ", ".join(f"{n:,} {split}" for split, n in report["rows"].items())
    lines = [
        f"work: {rows} rows; {report['tokens_per_epoch']:,} tokens an epoch;"
        f" {report['steps']:,} steps, {report['steps_per_epoch']:,} an epoch"
    ]
    if "seconds" in report:
        lines.append(
            f"time: about {_duration(report['seconds'])}, {report['seconds_per_step'] * 1e3:,.1f} ms a step"
        )
    return lines


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _sweep(overrides: Sequence[str], measure: bool) -> dict[str, Any]:
    """The jobs of a multirun, their state, and the hours that are left."""
    from ftcore.compose import compose_sweep
    from ftcore.run import state

    jobs, took, unfinished = [], [], []
    for cfg, run_dir, settings in compose_sweep(overrides):
        given = [s for s in settings if not s.startswith("hydra.searchpath=")]  # of --config-dir
        job: dict[str, Any] = {"overrides": given, "directory": str(run_dir)}
        try:
            job["state"] = state(cfg, run_dir)
        except UserError as error:
            job |= {"state": "refused", "note": str(error)}
        if job["state"] == "finished":
            took.append(float(json.loads((run_dir / "result.json").read_text())["seconds"]))
        elif job["state"] != "refused":
            unfinished.append((cfg, run_dir, given))
        jobs.append(job)
    each, by = (statistics.mean(took), "the finished ones") if took else (None, "")
    if measure and unfinished:
        cfg, run_dir, given = unfinished[0]
        each, by = _report(cfg, run_dir, given, None, True)["seconds"], "measuring the first of them"
    return {"jobs": jobs, "seconds_each": each, "estimated_by": by, "left": len(unfinished)}


def _sweep_text(report: dict[str, Any]) -> str:
    lines = []
    for job in report["jobs"]:
        note = f"  ({job['note']})" if "note" in job else ""
        lines.append(f"{job['state']:<9}{' '.join(job['overrides'])}{note}")
    counts: dict[str, int] = {}
    for job in report["jobs"]:
        counts[job["state"]] = counts.get(job["state"], 0) + 1
    lines.append(f"{len(report['jobs'])} jobs: " + ", ".join(f"{n} {name}" for name, n in counts.items()))
    if report["left"] and report["seconds_each"] is not None:
        left = report["left"] * report["seconds_each"]
        lines.append(
            f"time left: about {_duration(left)}, one after the other: {report['left']} jobs of"
            f" {_duration(report['seconds_each'])} by {report['estimated_by']}"
        )
    elif report["left"]:
        lines.append("time left: not known before one has finished; --measure tries a few steps of one")
    return "\n".join(lines)
