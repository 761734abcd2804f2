"""One run from its config to its result: the directory, its lock, resuming, and starting ranks.

run(cfg, directory)   in the process that the user started
train_here(...)       in every process that is a rank
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from omegaconf import OmegaConf

from ftcore import checkpoint, config
from ftcore.config import Config
from ftcore.errors import TrainingError, UserError
from ftcore.launch import launch
from ftcore.plugins import file_plugins
from ftcore.screen import Screen
from ftcore.signals import StopFlag, stop_flag
from ftcore.strategies import local_ranks, rank_environment

if TYPE_CHECKING:
    from ftcore.job import Job
    from ftcore.plugins import Enabled

__all__ = ["read_config", "run", "train_here"]

OWN = ("config.yaml", "run.json", "metrics.jsonl", "result.json", "checkpoints", "model")
"""What a run writes into its directory, and what `force=true` takes away."""

NOTABLE = 0.05
"""Share of a step above which a plugin's cost is shown."""


def run(cfg: Config, run_dir: Path) -> float:
    """Run, resume, or find finished; returns the metric (higher or lower is better as the task has it).

    Raises:
        UserError: another run's directory, or one that is in use; whatever the data or model lack.
        Interrupted: asked to stop, saved.
    """
    if cfg.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's library is imported, by ranks too
    rank, world_size, _ = rank_environment()
    run_dir = run_dir.absolute()
    if rank == 0:
        from filelock import FileLock, Timeout

        run_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run_dir / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{run_dir} is in use by another run; wait for it, or set another name="
            ) from None
        try:
            return _run_locked(cfg, run_dir, world_size)
        finally:
            lock.release()
    # A rank of an outside launcher: rank 0 has the lock, and comes to the same conclusion.
    return _metric(_finished(cfg, run_dir) or _in_place(cfg, run_dir))


def _run_locked(cfg: Config, run_dir: Path, world_size: int) -> float:
    if (finished := _finished(cfg, run_dir)) is not None:
        screen = Screen(shown=True)
        screen.line(f"already finished (force=true runs it again): {run_dir}")
        screen.result(finished, str(run_dir))
        return _metric(finished)
    from ftcore.job import build_hooks
    from ftcore.prepare import prepare

    # Before anything is replaced, and before ranks start: bad input harms no earlier result, and each
    # rank finds the formatted data in the cache.
    hooks, ranks = build_hooks(cfg), _ranks(cfg)
    prepare(hooks, hooks.load_tokenizer())
    _take_directory(cfg, run_dir)
    if world_size == 1 and ranks > 1:
        launch(ranks, run_dir)
        result: dict[str, Any] = json.loads((run_dir / "result.json").read_text())
    else:
        result = _in_place(cfg, run_dir)
    return _metric(result)


def _ranks(cfg: Config) -> int:
    if isinstance(cfg.trainer, dict):
        return int(cfg.trainer.get("devices") or local_ranks("plugin", None))
    return local_ranks(cfg.trainer.strategy, cfg.trainer.devices)


def _in_place(cfg: Config, run_dir: Path) -> dict[str, Any]:
    with stop_flag() as stop:
        return train_here(cfg, run_dir, stop)


def train_here(cfg: Config, run_dir: Path, stop: StopFlag, extra: Sequence[Enabled] = ()) -> dict[str, Any]:
    """Train as one rank (or the only one), evaluate, export; returns the result."""
    from ftcore.job import open_job
    from ftcore.loop import train
    from ftcore.results import cut_metrics, describe_run, write_json

    job = open_job(cfg, run_dir, Screen, stop, extra)
    try:
        if job.strategy.rank == 0:
            cut_metrics(run_dir, job.progress.step, job.progress.evaluated)
            write_json(run_dir / "run.json", describe_run(job))
        job.screen.header(_header(job))
        train(job)
        result = _finish(job)
        job.hooks.on_train_end(job.state(job.progress.step))
        job.screen.result(result, str(run_dir))
        for name, cost in result["plugin_cost"].items():
            if cost["share_of_step"] > NOTABLE:
                per_step, share = cost["ms_per_step"], cost["share_of_step"]
                job.screen.line(
                    f"plugin {name} took {per_step:.2f} ms a step, {share:.0%} of it, in its hooks"
                )
        return result
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"step {job.progress.step + 1}: out of memory on {job.strategy.device}; lower"
            f" train.micro_batch_size (now {cfg.micro_batch_size(job.strategy.world_size)}):"
            " accumulation follows, the result stays the same"
        ) from error
    finally:
        job.screen.stop()
        job.strategy.close()


def _finish(job: Job) -> dict[str, Any]:
    """Go back to the best weights, test, export, write `result.json`, drop the checkpoints."""
    from ftcore.evaluation import averaged, evaluate
    from ftcore.results import export, plugin_cost, write_json

    progress, cfg = job.progress, job.cfg
    metrics = dict(progress.best)
    others = bool(job.hooks.implemented("eval_weights"))  # the best were saved as they were evaluated
    if progress.best_weights and (others or progress.best_weights != f"best-{progress.step}"):
        job.strategy.load(checkpoint.Checkpoint(job.checkpoints / progress.best_weights))
    with contextlib.nullcontext() if progress.best_weights else averaged(job):
        if "test" in job.prepared.splits:
            tested = evaluate(job, "test", "test")
            if tested is None:
                job.interrupted()
            metrics |= tested
        export(job, metrics)
    name = job.metric.lstrip("-")
    key = next((k for k in (f"eval/{name}", f"test/{name}") if k in metrics), "")
    result = {
        "status": "finished",
        "metric": {"name": key, "value": metrics.get(key)},
        "metrics": metrics,
        "steps": progress.step,
        "best_step": int(progress.best_weights.removeprefix("best-") or progress.step),
        "examples": progress.examples,
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 3),
        "plugins": {p.name: p.version for p in job.hooks.plugins},
        "order": [p.name for p in job.hooks.plugins],
        "plugin_cost": plugin_cost(job),
        "seed": cfg.seed,
    }
    if job.strategy.rank == 0:
        write_json(job.run_dir / "result.json", result)
        if cfg.train.keep == "result":
            shutil.rmtree(job.checkpoints, ignore_errors=True)
    return result


def _metric(result: dict[str, Any]) -> float:
    value = result["metric"]["value"]
    return math.nan if value is None else float(value)


def _header(job: Job) -> list[tuple[str, str]]:
    """What is about to run, in at most eight lines."""
    cfg, world = job.cfg, job.strategy.world_size
    micro = cfg.micro_batch_size(world)
    accumulation = -(-cfg.train.batch_size // (micro * world))
    parameters = sum(p.numel() for p in job.strategy.model.parameters())
    rows = ", ".join(f"{a.rows} {name}" for name, a in job.prepared.audits.items())
    audit = job.prepared.audits["train"]
    notes = [
        f"{audit.truncated} truncated" if audit.truncated else "",
        f"{audit.dropped + audit.masked} unusable" if audit.dropped + audit.masked else "",
    ]
    lines = [
        ("model", f"{cfg.model.path}, {parameters:,} parameters"),
        ("device", f"{job.strategy.device}, {cfg.train.precision}"),
        ("data", ", ".join([f"{rows} rows", f"longest {audit.longest} tokens", *filter(None, notes)])),
        (
            "batch",
            f"{cfg.train.batch_size} = {micro} micro x {accumulation} accumulation x {world} rank(s)",
        ),
    ]
    lines += [(p.name, p.summary) for p in job.hooks.plugins]
    return [*lines[:7], ("run", str(job.run_dir))]


def read_config(run_dir: Path) -> Config:
    """The config that a run directory was started with.

    Raises:
        UserError: no run there.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run_dir} is no run directory: it has no config.yaml")
    return config.from_plain(cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.load(path))))


def _finished(cfg: Config, run_dir: Path) -> dict[str, Any] | None:
    """The result, where this very run has finished here.

    Raises:
        UserError: the directory holds another run.
    """
    if cfg.force or not _has_begun(run_dir):
        return None
    before, now = read_config(run_dir).identity(), cfg.identity()
    if before != now:
        raise UserError(
            f"{run_dir} holds a run with another config ({_difference(before, now)});"
            " set another name=, or force=true to replace it"
        )
    _check_plugin_files(cfg, run_dir)
    if not (run_dir / "result.json").is_file():
        return None
    result: dict[str, Any] = json.loads((run_dir / "result.json").read_text())
    return result


def _check_plugin_files(cfg: Config, run_dir: Path) -> None:
    """Refuse to take a run with another state of a plugin's file for this one, or to go on with it."""
    path = run_dir / "run.json"
    described = json.loads(path.read_text())["plugins"] if path.is_file() else []
    before = {p["name"]: p["version"] for p in described}
    for one in file_plugins():
        now = f"sha256:{one.digest}"
        if one.name in cfg.plugin and before.get(one.name, now) != now:
            raise UserError(
                f"{run_dir} holds a run with another {one.path.name} ({before[one.name]} there, {now} now);"
                " set another name=, or force=true to replace it"
            )


def _has_begun(run_dir: Path) -> bool:
    """Whether there is anything to lose: a config alone is what a run that never trained leaves."""
    trained = (run_dir / "result.json").is_file() or (run_dir / "checkpoints").is_dir()
    return trained and (run_dir / "config.yaml").is_file()


def _take_directory(cfg: Config, run_dir: Path) -> None:
    """Make the directory this run's own, keeping only what it will resume from."""
    if cfg.force or not cfg.train.resume or not _has_begun(run_dir):
        for name in OWN:
            path = run_dir / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    plain = dataclasses.asdict(dataclasses.replace(cfg, force=False))
    OmegaConf.save(OmegaConf.create(plain), run_dir / "config.yaml")
    _point_latest(run_dir)


def _difference(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> str:
    """The first key in which two configs differ, with both values."""
    for key in dict.fromkeys([*before, *now]):
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict) and a != b:
            return _difference(a, b, f"{prefix}{key}.")
        if a != b:
            return f"{prefix}{key}: {a} there, {b} now"
    return "the order of its plugins"


def _point_latest(run_dir: Path) -> None:
    """`runs/latest` points to the newest run of the tree `runs/NAME/SLUG`."""
    root = run_dir.parents[1]
    if root.name != "runs":
        return
    scratch = root / f".latest-{run_dir.name}"[:200]
    try:
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(run_dir.relative_to(root), target_is_directory=True)
        scratch.replace(root / "latest")
    except OSError:
        return  # a file system without links; the path is printed anyway
