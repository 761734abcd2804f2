"""Each record of a run in Weights & Biases, as an ftcore plugin: `ftcore +plugin=wandb`."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from typing import Any, Literal

from omegaconf import OmegaConf

from ftcore import State, UserError, hookimpl, plugin

__all__ = ["Wandb"]


MODES = ("online", "offline", "disabled", "shared", "run", "dryrun")


@plugin()
class Wandb:
    """Send each record to Weights & Biases; a resumed run goes on in the same W&B run."""

    project: str = "ftcore"
    entity: str | None = None
    group: str | None = None
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"

    def __post_init__(self) -> None:
        mode = os.environ.get("WANDB_MODE", "online")
        if self.mode == "auto" and mode not in MODES:
            raise ValueError(f"WANDB_MODE={mode}: known: {', '.join(MODES)}")
        self._id = secrets.token_hex(4)
        self._run: Any = None

    @hookimpl
    def on_train_start(self, state: State) -> None:
        self._directory = state.run_dir

    @hookimpl
    def on_log(self, record: Mapping[str, Any]) -> None:
        if self._run is None:  # only on the rank that logs
            self._run = self._open()
            self._log_lost()
        self._log(record)

    def _log(self, record: Mapping[str, Any]) -> None:
        # Steps that a resumed run makes again have the values they had; W&B keeps the first.
        values = {k: v for k, v in record.items() if k != "step" and v is not None}
        self._run.log(values, step=record["step"])

    def _open(self) -> Any:
        import wandb

        folder = self._directory
        if wandb.run is not None:  # of a sweep's job that failed in this process
            wandb.run.finish(exit_code=1)
        config: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
        try:
            return wandb.init(
                project=self.project,
                entity=self.entity,
                group=self.group,
                mode=None if self.mode == "auto" else self.mode,
                id=self._id,
                resume="allow",
                name=f"{folder.parent.name}/{folder.name}"[-128:],
                dir=folder,
                config=config,
                allow_val_change=True,  # a resumed run may log or keep more
                settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True),
            )
        except wandb.Error as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            hint = "" if self.mode == "offline" else "; plugin.wandb.mode=offline needs no login"
            raise UserError(f"wandb: {reason}{hint}") from error

    def _log_lost(self) -> None:
        """Log what W&B may not have of the run so far: a kill loses what it had not written or sent.

        `metrics.jsonl` ends where the run was resumed. Offline nobody knows what is missing: all.
        """
        path = self._directory / "metrics.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            if (record := json.loads(line))["step"] >= self._run.starting_step:
                self._log(record)

    @hookimpl
    def on_train_end(self, state: State) -> None:
        if self._run is not None:
            result = json.loads((state.run_dir / "result.json").read_text(encoding="utf-8"))
            self._run.log({}, commit=True)  # or the last record comes after, and above, the summary
            self._run.summary.update(result["metrics"])
            self._run.finish()

    def state_dict(self) -> dict[str, str]:
        """The id of the W&B run, for the checkpoint."""
        return {"id": self._id}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Go on in the W&B run that the checkpoint is of."""
        self._id = state["id"]
