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

        self._trial, self._directory = current_trial(), state.run_dir
        if self._trial is None:
            raise UserError(
                "plugin optuna works in a study alone: ftcore -m hydra/sweeper=optuna"
                " hydra.sweeper.pruner=median ... (the same command again goes on with it)"
            )

    @hookimpl
    def should_stop(self, record: Mapping[str, Any], metric: str) -> str | None:
        from ftcore_optuna.study import report

        assert self._trial is not None
        name = metric.lstrip("-")
        report(self._trial, self._directory, f"eval/{name}")
        if self._trial.should_prune():
            value = float(record[f"eval/{name}"])
            return f"the pruner gives up trial {self._trial.number} at {name} {value:.4g}"
        return None
