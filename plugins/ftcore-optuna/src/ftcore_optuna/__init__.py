"""Optuna for ftcore: a sweeper, `ftcore -m hydra/sweeper=optuna`, and the plugin that prunes its runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ftcore import State, UserError, hookimpl, plugin

if TYPE_CHECKING:
    from optuna.trial import Trial

__all__ = ["Optuna"]


@plugin()
class Optuna:
    """Report each evaluation to the study, and end runs that its pruner gives up."""

    def __post_init__(self) -> None:
        self._trial: Trial | None = None

    @hookimpl
    def on_train_start(self, state: State) -> None:
        from ftcore_optuna.study import current_trial

        self._trial = current_trial()
        if self._trial is None:
            raise UserError(
                "plugin optuna works in a study alone: ftcore -m hydra/sweeper=optuna"
                " hydra.sweeper.pruner=median ... (the same command again goes on with it)"
            )

    @hookimpl
    def should_stop(self, record: Mapping[str, Any], metric: str) -> str | None:
        assert self._trial is not None
        value, step = float(record[f"eval/{metric.lstrip('-')}"]), int(record["step"])
        reported = self._trial.study.get_trials(deepcopy=False)[self._trial.number].intermediate_values
        if step not in reported:  # a resumed run may come by again
            self._trial.report(value, step)
        if self._trial.should_prune():
            return f"the pruner gives up trial {self._trial.number} at {metric.lstrip('-')} {value:.4g}"
        return None
