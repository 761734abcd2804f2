"""A study: trials asked for, run by Hydra's launcher, and told. The same command again goes on with it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import optuna
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from ftcore import compose
from ftcore.errors import UserError, nearest
from ftcore.lease import lease, touched
from ftcore.run import state
from ftcore.tasks import TASKS
from ftcore_optuna.space import Space

if TYPE_CHECKING:
    from hydra_plugins.ftcore_optuna_sweeper import OptunaSweeper, OptunaSweeperConf

__all__ = ["TRIAL", "TracedTask", "current_trial", "report", "search"]

TRIAL = "FTCORE_OPTUNA_TRIAL"
"""Environment variable by which a job, and its ranks, know their trial."""

PRUNERS = ("median", "halving")
SAMPLERS = ("tpe", "random")
DIRECTIONS = ("maximize", "minimize")
MAX_SEED = 2**31


class TracedTask:
    """The task with the trial it works for in the environment. Launchers take it to other processes."""

    def __init__(self, task: Any) -> None:
        self.task = task
        self.trials: dict[int, str] = {}  # the job's number to its trial

    def __call__(self, cfg: Any) -> Any:
        from hydra.core.hydra_config import HydraConfig

        os.environ[TRIAL] = self.trials[HydraConfig.get().job.num]
        try:
            return self.task(cfg)
        finally:
            del os.environ[TRIAL]


def current_trial() -> Trial | None:
    """The trial that this process works for; None outside a study."""
    if TRIAL not in os.environ:
        return None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    told = json.loads(os.environ[TRIAL])
    pruner = _pruner(told["pruner"], told["startup"])
    study = optuna.load_study(
        study_name=told["study"], storage=_storage(told["storage"]), sampler=RandomSampler(), pruner=pruner
    )
    return Trial(study, told["id"])


def search(sweeper: OptunaSweeper, arguments: Sequence[str]) -> None:
    """Make what is missing of the study's trials.

    Raises:
        UserError: a bad option or search space; a study of another space; one that another command works
            at; runs without validation data.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    options, directory = sweeper.options, Path(sweeper.config.hydra.sweep.dir).absolute()
    _check(options, sweeper.config.hydra.launcher._target_)
    loader, name = sweeper.hydra_context.config_loader, sweeper.config.hydra.job.config_name
    params = [f"{key}={value}" for key, value in options.params.items()]
    overrides = OverridesParser.create(config_loader=loader).parse_overrides([*params, *arguments])
    space = Space.parse(overrides, lambda chosen: compose.selected(loader, name, chosen))
    direction = options.direction or _direction(sweeper)
    for sample in space.samples():
        _composed(sweeper, sample)  # a misspelt key or choice is said before anything is there
    with lease(directory / f".study-{quote(options.study, safe='')}"):
        study = _open(options, directory, space, direction)
        _check_unchanged(sweeper, study, space)
        _retry_unfinished(study)
        while (missing := options.n_trials - len(_trials(study))) > 0:
            _run_batch(sweeper, study, space, min(missing, options.n_jobs))
        _report(study, space)


def _check(options: OptunaSweeperConf, launcher: str) -> None:
    for key, known in {"pruner": PRUNERS, "sampler": SAMPLERS, "direction": DIRECTIONS}.items():
        value = getattr(options, key)
        if value is not None and value not in known:
            raise UserError(f"hydra.sweeper.{key}={value}: {nearest(value, known)}")
    for key in ("n_trials", "n_jobs"):
        if getattr(options, key) < 1:
            raise UserError(f"hydra.sweeper.{key}={getattr(options, key)}: must be 1 or more")
    if options.n_jobs > 1 and launcher.endswith(".BasicLauncher"):
        raise UserError(
            f"hydra.sweeper.n_jobs={options.n_jobs}: this launcher runs one at a time;"
            " add hydra/launcher=joblib, or submitit_local, submitit_slurm"
        )
    if options.startup < 0:
        raise UserError(f"hydra.sweeper.startup={options.startup}: must be 0 or more")
    if not 0 <= options.seed <= MAX_SEED:
        raise UserError(f"hydra.sweeper.seed={options.seed}: must be 0 to {MAX_SEED:,}")


def _direction(sweeper: OptunaSweeper) -> str:
    """The better end of the metric that picks a run's best weights."""
    task = sweeper.config.task
    known = TASKS.get(task.name, TASKS["causal_lm"])  # task=auto is a language model of some kind
    return "minimize" if str(task.metric or known.METRIC).startswith("-") else "maximize"


def _storage(where: str) -> BaseStorage:
    if "://" in where:
        return optuna.storages.get_storage(where)
    return JournalStorage(JournalFileBackend(where))


def _pruner(name: str | None, startup: int) -> BasePruner:
    if name == "median":
        return MedianPruner(n_startup_trials=startup)
    return NopPruner() if name is None else SuccessiveHalvingPruner()


def _sampler(options: OptunaSweeperConf, study: optuna.Study) -> BaseSampler:
    """The next trial's: a study that was interrupted draws what it would have drawn."""
    again = study.user_attrs.get("tried_again", ())
    begun = len(study.get_trials(deepcopy=False)) - len(again)
    seed = int(np.random.SeedSequence([options.seed, begun]).generate_state(1)[0])
    if options.sampler == "random":
        return RandomSampler(seed=seed)
    return TPESampler(seed=seed, constant_liar=options.n_jobs > 1)


def _open(options: OptunaSweeperConf, directory: Path, space: Space, direction: str) -> optuna.Study:
    directory.mkdir(parents=True, exist_ok=True)
    options.storage = options.storage or str(directory / "study.journal")
    if "://" not in options.storage:
        options.storage = str(Path(options.storage).absolute())
    study = _create(options, direction)
    now = {**space.describe(), "direction": direction, "pruner": str(options.pruner)}
    if Path(options.storage).parent != directory:  # its lease is of the directory alone
        now["hydra.sweep.dir"] = str(directory)
    before = study.user_attrs.get("space", now) | {"direction": study.direction.name.lower()}
    for key in sorted({*now, *before}):
        if now.get(key) != before.get(key):
            raise UserError(
                f"study '{options.study}' was begun with {key}={before.get(key, '(not set)')}, now"
                f" {now.get(key, '(not set)')}; set another hydra.sweeper.study= (or name=)"
            )
    study.set_user_attr("space", now)
    return study


def _create(options: OptunaSweeperConf, direction: str) -> optuna.Study:
    """The study, new or as it is in the storage.

    Raises:
        UserError: the storage can't be opened.
    """
    try:
        return optuna.create_study(
            study_name=options.study,
            storage=_storage(str(options.storage)),
            direction=StudyDirection[direction.upper()],
            load_if_exists=True,
            pruner=_pruner(options.pruner, options.startup),
        )
    except Exception as error:  # a file, or a database whose driver has errors of its own
        why = str(error.__cause__ or error).partition("\n")[0]
        if isinstance(error, KeyError | ValueError) and "://" not in str(options.storage):
            why = "it is no journal of Optuna's"
        raise UserError(f"hydra.sweeper.storage={options.storage} can't be opened: {why}") from error


def _check_unchanged(sweeper: OptunaSweeper, study: optuna.Study, space: Space) -> None:
    """Refuse to add to a study whose last finished trial had other data, or another source of a plugin."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    if not done:
        return
    last = done[-1]
    cfg = compose.entered(_composed(sweeper, _overrides(sweeper, space, lambda key, _: last.params[key])))
    try:
        state(cfg, Path(last.user_attrs["directory"]))
    except UserError as error:
        why = str(error).partition(";")[0]
        raise UserError(f"study '{study.study_name}' can't go on: {why}; set another name=") from error


def _trials(study: optuna.Study) -> list[FrozenTrial]:
    """The finished trials, each of `n_trials`: one whose values were tried again does not count twice."""
    again = set(study.user_attrs.get("tried_again", ()))
    return [t for t in study.get_trials(deepcopy=False) if t.state.is_finished() and t.number not in again]


def _retry_unfinished(study: optuna.Study) -> None:
    """Queue again what an earlier command left undone: interrupted trials resume, failed ones start anew."""
    again = list(study.user_attrs.get("tried_again", ()))
    for old in study.get_trials(states=(TrialState.RUNNING, TrialState.FAIL)):
        directory = old.user_attrs.get("directory")
        if old.number in again or (directory and touched(Path(directory)) is not None):
            continue
        if old.state == TrialState.RUNNING:
            study.tell(old.number, state=TrialState.FAIL)
        again.append(old.number)
        # One that was killed while it was drawn is drawn again, but for what `enqueue_trial` asked for.
        asked = old.system_attrs.get("fixed_params") if old.state == TrialState.RUNNING else None
        if params := old.params if directory else asked:
            study.enqueue_trial(params)
    study.set_user_attr("tried_again", again)


def _run_batch(sweeper: OptunaSweeper, study: optuna.Study, space: Space, size: int) -> None:
    options, trials, batch = sweeper.options, [], []
    for _ in range(size):  # each is drawn before the next is asked for, which then keeps away from it
        study.sampler = _sampler(options, study)
        trials.append(study.ask())
        batch.append(_begin(sweeper, space, trials[-1]))
    runs = {t.user_attrs["directory"]: (t, b) for t, b in zip(trials, batch, strict=True)}  # each once
    told = {
        "storage": options.storage,
        "study": options.study,
        "pruner": options.pruner,
        "startup": options.startup,
    }
    first = trials[0].number
    sweeper.task.trials = {
        first + i: json.dumps(told | {"id": trial._trial_id}) for i, (trial, _) in enumerate(runs.values())
    }
    for job in sweeper.launcher.launch([b for _, b in runs.values()], initial_job_idx=first):
        _ = job.return_value  # raises what the job raised
    for trial in trials:
        _tell(sweeper, study, trial)


def _begin(sweeper: OptunaSweeper, space: Space, trial: Trial) -> list[str]:
    """A trial's overrides; it notes its directory, by which the next command finds it."""
    try:
        overrides = _overrides(sweeper, space, trial._suggest)
    except ValueError as error:  # another program has asked for values by `enqueue_trial`
        trial.study.tell(trial, state=TrialState.FAIL)
        raise UserError(f"trial {trial.number} of study '{trial.study.study_name}': {error}") from error
    hydra = _composed(sweeper, overrides).hydra
    trial.set_user_attr("directory", str(Path(hydra.sweep.dir, hydra.sweep.subdir).absolute()))
    return overrides


def _overrides(sweeper: OptunaSweeper, space: Space, value: Callable[[str, Any], Any]) -> list[str]:
    return space.draw(value) + (["+plugin@plugin.optuna=optuna"] if sweeper.options.pruner else [])


def _composed(sweeper: OptunaSweeper, overrides: Sequence[str]) -> Any:
    return sweeper.hydra_context.config_loader.load_sweep_config(sweeper.config, list(overrides))


def _tell(sweeper: OptunaSweeper, study: optuna.Study, trial: Trial) -> None:
    run_dir = Path(trial.user_attrs["directory"])
    path = run_dir / "result.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if result is None or result["metric"]["value"] is None:
        study.tell(trial, state=TrialState.FAIL)
        print(f"trial {trial.number}: failed")
        return
    name, value = result["metric"]["name"], result["metric"]["value"]
    pruned = result["status"] == "pruned"
    if pruned or sweeper.options.pruner:
        report(trial, run_dir, name, math.inf if pruned else result["steps"])
    worst = math.inf if study.direction == StudyDirection.MINIMIZE else -math.inf
    if not math.isfinite(value) and value != worst:
        study.tell(trial, state=TrialState.FAIL)
        print(f"trial {trial.number}: failed: {name} is {value}")
        return
    if not name.startswith("eval/"):
        study.tell(trial, state=TrialState.FAIL)
        raise UserError(
            f"{run_dir} has no validation data: a search by {name} would fit the test data; add"
            " data.validation= (or data.split=)"
        )
    if pruned:
        study.tell(trial, state=TrialState.PRUNED)
        print(f"trial {trial.number}: pruned at step {result['steps']}: {result['reason']}")
        return
    study.tell(trial, value)
    best = study.best_trial
    print(f"trial {trial.number}: {name} {value:.4g} (best {best.value:.4g}, trial {best.number})")


def report(trial: Trial, run_dir: Path, metric: str, end: float = math.inf) -> None:
    """Tell the study of the run's evaluations before step `end`, but for those that it was told of.

    Some may have been made before an interruption, for the trial that this one goes on with.
    """
    known = trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values
    for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line) if f'"{metric}"' in line else {}
        if metric in record and record["step"] not in known and record["step"] < end:
            trial.report(float(record[metric]), record["step"])


def _report(study: optuna.Study, space: Space) -> None:
    """Counts, the best trial, and the command of its run without the sweep."""
    trials = _trials(study)
    counts = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
    parts = [f"{n} {what}" for what, s in counts.items() if (n := sum(t.state == s for t in trials))]
    print(f"\nstudy {study.study_name}: {len(trials)} trials, {', '.join(parts)}")
    if not isinstance(study.pruner, NopPruner) and not any(t.intermediate_values for t in trials):
        print("note: the pruner was never asked: no evaluation before the last; lower train.eval_every")
    if any(t.state == TrialState.COMPLETE for t in trials):
        best = study.best_trial
        chosen = " ".join(f"{key}={value}" for key, value in best.params.items())
        print(f"best: {best.value:.4g}, trial {best.number}: {chosen}\n  {best.user_attrs['directory']}")
        print(f"  {compose.command(space.draw(lambda key, _: best.params[key]))}")
