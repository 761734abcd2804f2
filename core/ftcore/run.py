"""One run from its config to its result: the directory, its lease, resuming, and starting ranks.

run(cfg, directory)   in the process that the user started
train_here(...)       in every process that is a rank
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from omegaconf import OmegaConf

from ftcore import checkpoint, config
from ftcore.config import Config
from ftcore.errors import Interrupted, TrainingError, UserError
from ftcore.launch import launch, rank_environment
from ftcore.lease import lease, touched
from ftcore.screen import Screen
from ftcore.signals import StopFlag, stop_flag
from ftcore.strategies import local_ranks, whole_shape
from ftcore.sweep import is_in_sweep

if TYPE_CHECKING:
    from ftcore.job import Job
    from ftcore.plugins import Enabled

__all__ = ["OWN", "disk_bytes", "read_config", "run", "state", "train_here"]

OWN = (
    *("config.yaml", "run.json", "metrics.jsonl", "result.json", "failed.json"),
    *("checkpoints", "model", "predictions"),
)
"""What a run writes into its directory, and what `force=true` takes away."""


def run(cfg: Config, run_dir: Path) -> float:
    """Run, resume, or find finished; returns the metric (higher or lower is better as the task has it).

    Raises:
        UserError: another run's directory, or one that is in use; whatever the data or model lack.
        Interrupted: asked to stop, saved.
    """
    rank, world_size, _ = rank_environment()
    run_dir = run_dir.absolute()
    if rank == 0:
        with lease(run_dir):
            return _run_leased(cfg, run_dir, world_size)
    # A rank of an outside launcher: rank 0 has the lease, and comes to the same conclusion.
    return _metric(_finished(cfg, run_dir) or _in_place(cfg, run_dir))


def _run_leased(cfg: Config, run_dir: Path, world_size: int) -> float:
    if (finished := _finished(cfg, run_dir)) is not None:
        screen, name = Screen(shown=True), finished["metric"]["name"]
        figure = f" ({name} {_metric(finished):.4g})" if name else ""
        screen.line(f"already {finished['status']}{figure}; force=true runs it again: {run_dir}")
        if not is_in_sweep():  # of many, a line each is enough
            screen.result(finished, str(run_dir))
        return _metric(finished)
    failed = run_dir / "failed.json"
    failed.unlink(missing_ok=True)
    try:
        return _run_unfinished(cfg, run_dir, world_size)
    except Interrupted:
        raise
    except Exception as error:
        with contextlib.suppress(OSError):  # a full disk may be why
            failed.write_text(json.dumps({"error": str(error) or type(error).__name__}), encoding="utf-8")
        raise


def _run_unfinished(cfg: Config, run_dir: Path, world_size: int) -> float:
    from ftcore.job import build_hooks
    from ftcore.prepare import prepare

    # Before anything is replaced, and before ranks start: bad input harms no earlier result, and each
    # rank finds the formatted data in the cache.
    hooks, ranks = build_hooks(cfg), _ranks(cfg)
    prepare(hooks, hooks.load_tokenizer())
    _take_directory(cfg, run_dir)
    # A plugin's strategy always gets processes of its own: its library may keep state in one.
    if world_size == 1 and (ranks > 1 or isinstance(cfg.trainer, dict)):
        launch(ranks, run_dir)
        result: dict[str, Any] = json.loads((run_dir / "result.json").read_text())
    else:
        result = _in_place(cfg, run_dir)
    return _metric(result)


def _ranks(cfg: Config) -> int:
    trainer = cfg.trainer if isinstance(cfg.trainer, dict) else vars(cfg.trainer)
    return local_ranks(trainer["strategy"], trainer.get("devices"), trainer.get("device"))


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
    from ftcore.evaluation import averaged
    from ftcore.results import write_json

    progress, cfg = job.progress, job.cfg
    if job.pruned:
        return _end_pruned(job)
    best = job.checkpoints / progress.best_weights
    if progress.best_weights:  # they were saved as they were evaluated
        if job.hooks.implemented("eval_weights") or best.name != f"best-{progress.step}":
            job.strategy.load(checkpoint.Checkpoint(best))
        kept = best / "validation.parquet"
        if job.strategy.rank == 0 and kept.is_file():  # a run begun by an earlier ftcore has none
            (job.run_dir / "predictions").mkdir(exist_ok=True)
            shutil.copyfile(kept, job.run_dir / "predictions" / kept.name)
    with contextlib.nullcontext() if progress.best_weights else averaged(job):
        metrics = _test_and_export(job)
    result = _result(job, metrics, "finished")
    if job.strategy.rank == 0:
        write_json(job.run_dir / "result.json", result)
        if cfg.train.keep == "result":
            shutil.rmtree(job.checkpoints, ignore_errors=True)
    return result


def _end_pruned(job: Job) -> dict[str, Any]:
    """Write `result.json` of a run that a plugin ended: its best evaluation, no test, no model."""
    from ftcore.results import write_json

    job.screen.line(f"pruned at step {job.progress.step}: {job.pruned}")
    result = _result(job, job.progress.best, "pruned") | {"reason": job.pruned}
    if job.strategy.rank == 0:
        write_json(job.run_dir / "result.json", result)
        shutil.rmtree(job.checkpoints, ignore_errors=True)
    return result


def _result(job: Job, metrics: dict[str, float], status: str) -> dict[str, Any]:
    """What `result.json` holds."""
    from ftcore.results import plugin_cost

    progress, name = job.progress, job.metric.lstrip("-")
    key = next((k for k in (f"eval/{name}", f"test/{name}") if k in metrics), "")
    return {
        "status": status,
        "metric": {"name": key, "value": metrics.get(key)},
        "metrics": metrics,
        "steps": progress.step,
        "best_step": int(progress.best_weights.removeprefix("best-") or progress.step),
        "examples": progress.examples,
        "tokens": progress.tokens,
        **({"skipped_fp16_overflow": progress.skipped} if progress.skipped else {}),
        "seconds": round(progress.seconds, 3),
        "plugins": {p.name: p.version for p in job.hooks.plugins},
        "order": [p.name for p in job.hooks.plugins],
        "plugin_cost": plugin_cost(job),
        "seed": job.cfg.seed,
    }


def _test_and_export(job: Job) -> dict[str, float]:
    """All metrics: of the best evaluation, and of the test data by the weights as they are now."""
    from ftcore.evaluation import predict, score
    from ftcore.results import export, keep_predictions

    metrics = dict(job.progress.best)
    if "test" in job.prepared.splits:
        predictions = predict(job, "test")
        if predictions is None:
            job.interrupted()
        metrics |= score(job, predictions, "test", "test")
        keep_predictions(job, predictions, "test", job.run_dir / "predictions")
    export(job, metrics)
    return metrics


def _metric(result: dict[str, Any]) -> float:
    value = result["metric"]["value"]
    return math.nan if value is None else float(value)


def _header(job: Job) -> list[tuple[str, str]]:
    """What is about to run, in at most eight lines."""
    cfg, world, train = job.cfg, job.strategy.world_size, job.prepared.audits["train"]
    micro = cfg.micro_batch_size(world)
    accumulation = -(-cfg.train.batch_size // (micro * world))
    parameters = sum(math.prod(whole_shape(p)) for p in job.strategy.model.parameters())
    rows = ", ".join(f"{a.rows} {name}" for name, a in job.prepared.audits.items())
    plugins = [(p.name, _plugin_line(p)) for p in job.hooks.plugins]
    if len(plugins) > 3:
        plugins = [*plugins[:2], ("...", "; ".join(f"{name} {line}" for name, line in plugins[2:]))]
    return [
        (
            "model",
            f"{cfg.model.path}, {parameters:,} parameters, {job.strategy.device}, {cfg.train.precision}",
        ),
        ("data", ", ".join([f"{rows} rows", *train.notes()])),
        *plugins,
        (
            "batch",
            f"{cfg.train.batch_size} = {micro} micro x {accumulation} accumulation x {world} rank(s)",
        ),
        ("disk", _disk_line(cfg, parameters, job.run_dir)),
        ("run", str(job.run_dir)),
    ]


def _plugin_line(plugin: Enabled) -> str:
    """A plugin's version, what it did to this model where it says so, and its options."""
    describe = getattr(plugin.instance, "describe", None)
    facts = [plugin.summary.rstrip(".")]
    if describe is not None:
        facts = [
            f"{len(v)} {k}"
            if isinstance(v, (list, dict))
            else f"{k} {v:,}"
            if isinstance(v, int)
            else f"{k} {v}"
            for k, v in describe().items()
        ]
    options = [f"{k}={v}" for k, v in plugin.options.items() if not isinstance(v, (list, dict)) or v]
    line = f"{plugin.version}: {', '.join([*facts, *options])}"
    return line if len(line) <= 150 else line[:147] + "..."


def disk_bytes(cfg: Config, parameters: int) -> tuple[int, int]:
    """What the run takes on the disk at most, and after: fp32 weights, and AdamW's two moments."""
    weights = 4 * parameters
    most = weights * (3 * (cfg.train.keep_last + 1) + 3)  # one being written, the best twice, the export
    return most, weights * (4 if cfg.train.keep == "resume" else 1)


def _disk_line(cfg: Config, parameters: int, run_dir: Path) -> str:
    most, after = (size / 1e6 for size in disk_bytes(cfg, parameters))
    free = shutil.disk_usage(run_dir).free / 1e6
    line = f"up to {most:,.0f} MB while it trains, {after:,.0f} MB after"
    return line if free > most else f"{line}: more than the {free:,.0f} MB that are free"


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
    if _files_changed(cfg, run_dir):
        raise UserError(
            f"the data files have changed since the run in {run_dir} was started; set another name=, or"
            " force=true to replace it"
        )
    _check_sources(cfg, run_dir)
    if not (run_dir / "result.json").is_file():
        return None
    result: dict[str, Any] = json.loads((run_dir / "result.json").read_text())
    return result


def _files_changed(cfg: Config, run_dir: Path) -> bool:
    """Whether the run was started on other content of its files; what is gone or unknown has not changed."""
    from ftcore import data

    try:
        then = json.loads((run_dir / "run.json").read_text())["data"]
        return bool(then["from_files"] and then["source"] != data.fingerprint(cfg, None))
    except (OSError, KeyError, ValueError, UserError):
        return False


def _check_sources(cfg: Config, run_dir: Path) -> None:
    """Refuse to take what another version of a plugin computed for this one's."""
    from ftcore.plugins import enable

    path = run_dir / "run.json"
    before = json.loads(path.read_text())["plugins"] if path.is_file() else []
    sources = {p["name"]: p.get("source") for p in before}
    for one in enable(cfg.chosen_plugins(), cfg.trainer_plugin):
        if sources.get(one.name, one.source) != one.source:
            raise UserError(
                f"{run_dir} holds a run with another source of plugin '{one.name}', which has changed since;"
                " set another name=, or force=true to replace it"
            )


def state(cfg: Config, run_dir: Path) -> str:
    """Of a job of a sweep: `finished` (or ended by a plugin), `running`, `failed`, `begun`, or `to do`.

    Raises:
        UserError: it holds what another config, data or plugin source made, and says which.
    """
    if _finished(cfg, run_dir) is not None:
        return "finished"
    if touched(run_dir) is not None:
        return "running"
    if (run_dir / "failed.json").is_file():
        return "failed"
    return "begun" if _has_begun(run_dir) else "to do"


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
    # What was asked of this start alone is not asked of the ones that go on with it.
    train = dataclasses.replace(cfg.train, resume=True)
    plain = dataclasses.asdict(dataclasses.replace(cfg, force=False, train=train))
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
