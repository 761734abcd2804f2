"""Where Hydra looks for sweepers: `hydra/sweeper=optuna`. Read at each start of Hydra, so Optuna is not yet.

Hydra runs this file before it stands in `sys.modules`: annotations must be no strings.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

__all__ = ["OptunaSweeper", "OptunaSweeperConf"]


@dataclass
class OptunaSweeperConf:
    """`hydra.sweeper.*`.

    Attributes:
        n_trials: of the whole study; the same command again makes what is missing of them.
        n_jobs: trials that are given to the launcher at once. Those know nothing of each other.
        study: its name in the storage.
        storage: a file, or a database's URL (`postgresql://...`); null is `study.journal` among the runs.
        direction: `maximize` or `minimize`; null is the better end of the task's metric.
        sampler: `tpe` (Bergstra et al., 2011) or `random`.
        seed: of the sampler.
        pruner: null; `median`, which ends a run that is below the median of the others at that step; or
            `halving` (asynchronous successive halving, Li et al., 2018).
        startup: trials that the pruner lets run to their end first.
        params: the search space of an experiment; the command line's comes after.
    """

    _target_: str = "hydra_plugins.ftcore_optuna_sweeper.OptunaSweeper"
    n_trials: int = 20
    n_jobs: int = 1
    study: str = "${name}"
    storage: str | None = None
    direction: str | None = None
    sampler: str = "tpe"
    seed: int = 0
    pruner: str | None = None
    startup: int = 5
    params: dict[str, Any] = field(default_factory=dict)


ConfigStore.instance().store(
    group="hydra/sweeper", name="optuna", node=OptunaSweeperConf, provider="ftcore-optuna"
)


class OptunaSweeper(Sweeper):  # type: ignore[misc]
    """Hydra's side of a study; `ftcore_optuna.study` has the rest."""

    def __init__(self, **options: Any) -> None:
        self.options = OptunaSweeperConf(**options)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from hydra.core.plugins import Plugins

        from ftcore_optuna.study import TracedTask

        self.hydra_context, self.config = hydra_context, config
        self.task = TracedTask(task_function)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=self.task, config=config
        )

    def sweep(self, arguments: Sequence[str]) -> None:
        from ftcore_optuna.study import search

        search(self, list(arguments))
