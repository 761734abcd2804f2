"""Each record of a run in TensorBoard, as an ftcore plugin: `ftcore +plugin=tensorboard`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ftcore import State, hookimpl, plugin

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["TensorBoard"]


@plugin()
class TensorBoard:
    """Write each record to RUN/tensorboard; `tensorboard --logdir runs` shows all runs."""

    folder: str = "tensorboard"

    def __post_init__(self) -> None:
        from ftcore.run import OWN

        if self.folder in ("", ".", "..") or "/" in self.folder:
            raise ValueError(f"folder must be a name within the run's directory, got '{self.folder}'")
        if self.folder in OWN:
            raise ValueError(f"folder='{self.folder}': that is a name of the run's own; choose another")
        self._writer: SummaryWriter | None = None

    @hookimpl
    def on_train_start(self, state: State) -> None:
        self._directory, self._step = state.run_dir / self.folder, state.step

    @hookimpl
    def on_log(self, record: Mapping[str, Any]) -> None:
        if self._writer is None:  # only the rank that logs has one
            from torch.utils.tensorboard import SummaryWriter

            # A resumed run makes the steps after its checkpoint again: what was written of them is hidden.
            self._writer = SummaryWriter(str(self._directory), purge_step=self._step + 1)
        self._write(record, record["step"])

    def _write(self, values: Mapping[str, Any], step: int) -> None:
        assert self._writer is not None
        for name, value in values.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a killed run resumes from its last checkpoint: all before that must be there

    @hookimpl
    def on_train_end(self, state: State) -> None:
        if self._writer is not None:
            result = json.loads((state.run_dir / "result.json").read_text(encoding="utf-8"))
            self._write({k: v for k, v in result["metrics"].items() if k.startswith("test/")}, state.step)
            self._writer.close()
