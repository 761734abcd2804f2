"""One run in one process: everything the loop works with, put together once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from ftcore import checkpoint
from ftcore.config import Config
from ftcore.contract import State
from ftcore.defaults import Defaults
from ftcore.errors import Interrupted, UserError, nearest
from ftcore.hooks import Hooks
from ftcore.models import check_positions, go_offline, origin, text_task
from ftcore.optim import build_optimizer
from ftcore.plugins import Enabled, enable
from ftcore.prepare import Prepared, prepare
from ftcore.screen import Screen
from ftcore.signals import StopFlag
from ftcore.strategies import Strategy, base_model
from ftcore.tasks import TASKS

__all__ = ["Job", "Progress", "build_hooks", "open_job"]


@dataclass
class Progress:
    """How far a run is: what a checkpoint's `state.json` holds beside the strategy's state."""

    step: int = 0
    evaluated: int = -1  # the step whose evaluation is done
    examples: int = 0
    tokens: int = 0
    skipped: int = 0  # steps whose gradients overflowed in fp16
    seconds: float = 0.0
    best: dict[str, float] = field(default_factory=dict)  # metrics of the best evaluation
    best_weights: str = ""  # its directory in checkpoints/
    evaluations_since_best: int = 0


@dataclass(kw_only=True)
class Job:
    """What the loop, the evaluation and the export share."""

    cfg: Config
    hooks: Hooks
    strategy: Strategy
    tokenizer: Any
    prepared: Prepared
    run_dir: Path
    screen: Screen
    stop: StopFlag
    progress: Progress = field(default_factory=Progress)
    saved: int = 0  # the step of the newest checkpoint
    step_seconds: float = 0.0  # spent in steps by this process
    steps: int = 0  # made by this process
    pruned: str = ""  # why a plugin ended the run before its end

    @property
    def metric(self) -> str:
        """What picks the best weights; `-` before it where smaller is better."""
        return self.cfg.task.metric or TASKS[self.cfg.task.name].METRIC

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    def state(self, total: int) -> State:
        """The run as hooks see it."""
        return State(
            model=self.strategy.model,
            tokenizer=self.tokenizer,
            device=self.strategy.device,
            run_dir=self.run_dir,
            step=self.progress.step,
            total=total,
            metrics=self.progress.best,
            shards=self.strategy.shards,
            lend=self.strategy.lend,
        )

    def save(self, directory: Path, *, values_only: bool = False) -> None:
        """Write a checkpoint of this moment."""
        plugins = {
            p.name: p.instance.state_dict() for p in self.hooks.plugins if hasattr(p.instance, "state_dict")
        }
        checkpoint.save(directory, self.strategy, asdict(self.progress), plugins, values_only=values_only)

    def interrupted(self) -> NoReturn:
        """Raise for a run that was asked to stop and has saved its state."""
        raise Interrupted(
            f"stopped at step {self.progress.step}, saved; go on with: ftcore resume {self.run_dir}",
            max(self.strategy.gather(self.stop.code)),
        )

    def resume(self) -> None:
        """Take over the newest valid checkpoint, if there is one; says which were skipped, and why."""
        found, problems = checkpoint.newest(self.checkpoints)
        if self.strategy.rank == 0:
            checkpoint.sweep(self.checkpoints)
        for problem in problems:
            self.screen.line(f"warning: {problem}")
        if found is None:
            return
        self._check_frozen()
        self.strategy.load(found)
        found.load_buffers(self.strategy.model)
        names = {p.name for p in self.hooks.plugins}
        for name in found.state["plugins"]:
            if name not in names:
                raise UserError(f"{found.directory} holds state of plugin '{name}'; add +plugin={name}")
        for one in self.hooks.plugins:
            if (state := found.plugin_state(one.name)) is not None:
                one.instance.load_state_dict(state)
        known = Progress.__dataclass_fields__
        self.progress = Progress(**{k: v for k, v in found.state.items() if k in known})
        self.saved = self.progress.step
        self.screen.line(f"resuming at step {self.progress.step} ({found.directory})")

    def _check_frozen(self) -> None:
        """Refuse to go on beside other frozen weights: `model.path` has them, and no checkpoint."""
        model, record = self.strategy.model, self.run_dir / "run.json"
        if all(param.requires_grad for param in model.parameters()) or not record.is_file():
            return
        then, now = json.loads(record.read_text())["model"], origin(self.cfg, base_model(model))
        if differs := [k for k in ("sha256", "revision") if k in then and then[k] != now.get(k)]:
            raise UserError(
                f"model.path={now['path']} has other weights than when this run began ({differs[0]}"
                f" {now.get(differs[0])}, then {then[differs[0]]}), and the frozen ones are in no checkpoint:"
                " put the old ones back, or start anew with force=true"
            )


def build_hooks(cfg: Config, extra: Sequence[Enabled] = ()) -> Hooks:
    """Fresh plugin instances of the config's choice, checked, above core's defaults; `extra` above those.

    The hooks' own `cfg` has the task by name where the config says `auto`.
    """
    go_offline(cfg)
    if cfg.task.name == "auto":
        cfg = replace(cfg, task=replace(cfg.task, name=text_task(cfg)))
    hooks = Hooks(Defaults(cfg), [*enable(cfg.chosen_plugins(), cfg.trainer_plugin), *extra], cfg)
    _check_metric(hooks)
    return hooks


def _check_metric(hooks: Hooks) -> None:
    """Refuse a `task.metric` that no evaluation will give, as far as that is known before one."""
    cfg = hooks.cfg
    known = TASKS[cfg.task.name].METRICS
    groups, _, metric = (cfg.task.metric or "").lstrip("-").rpartition("/")
    if not metric or hooks.implemented("evaluate") != ["core"]:
        return
    if metric not in known:
        raise UserError(f"task.metric: task={cfg.task.name} has no '{metric}'; {nearest(metric, known)}")
    if groups and groups.partition("/")[0] not in ("worst_group", "group"):
        raise UserError(f"task.metric={cfg.task.metric}: write it without '{groups}/'")
    if groups and cfg.data.columns.group is None:
        raise UserError(f"task.metric={cfg.task.metric} needs data.columns.group: the column of the groups")


def open_job(
    cfg: Config,
    run_dir: Path,
    screen: Callable[[bool], Screen],
    stop: StopFlag,
    extra: Sequence[Enabled] = (),
) -> Job:
    """Build a run in this process (one of its ranks): strategy, data, model, optimiser, checkpoint."""
    hooks = build_hooks(cfg, extra)
    cfg = hooks.cfg
    strategy = hooks.build_strategy()
    show = screen(strategy.rank == 0)
    show.on_lost = stop.output_lost
    tokenizer = hooks.load_tokenizer()
    if strategy.rank == 0:
        prepared = prepare(hooks, tokenizer)
    strategy.all_sum([0])
    if strategy.rank != 0:
        prepared = prepare(hooks, tokenizer)  # from the cache
    if len(set(strategy.gather(prepared.fingerprint))) > 1:
        raise UserError("the ranks read different data: a file changed while the run started; run again")
    if cfg.train.early_stop and "validation" not in prepared.splits:
        raise UserError("train.early_stop needs validation data: set data.validation or data.split")
    model, pretrained = hooks.load_model(tokenizer, prepared.labels)
    check_positions(model, prepared.longest())
    model_config: Any = model.config
    if getattr(model_config, "use_cache", None):
        model_config.use_cache = False  # no use in training; generation asks for it
    strategy.prepare(model, lambda m: build_optimizer(m, hooks))
    strategy.keep_pretrained(pretrained)
    job = Job(
        cfg=cfg,
        hooks=hooks,
        strategy=strategy,
        tokenizer=tokenizer,
        prepared=prepared,
        run_dir=run_dir,
        screen=show,
        stop=stop,
    )
    if cfg.train.resume:
        job.resume()
    return job
