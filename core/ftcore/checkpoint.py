"""Checkpoints: one format for every strategy and world size, valid or absent, no pickle.

`checkpoints/step-N/` holds, from each rank, the flat fp32 slices that it owns (values and the
optimiser's moments) as safetensors; `state.json`; the plugins' state; and, written last, a manifest
with the sha256 of each file. The directory is written under another name, synced, and renamed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ftcore.errors import UserError
from ftcore.models import file_hash
from ftcore.strategies import Strategy, base_model

__all__ = ["Checkpoint", "newest", "prune", "save", "sweep"]

FORMAT = 1


def save(
    directory: Path,
    strategy: Strategy,
    state: Mapping[str, Any],
    plugins: Mapping[str, Any] | None = None,
    *,
    values_only: bool = False,
) -> None:
    """Write a checkpoint at `directory`, all ranks together; nothing is there before all of it is.

    Raises:
        UserError: on every rank, where one of them could not write (a full disk); what was saved
            before stays valid.
    """
    scratch = directory.parent / f".writing-{directory.name}"
    is_first = strategy.rank == 0

    def write() -> None:
        _write_rank(scratch, strategy, values_only)
        if is_first:
            _write_state(scratch, {"format": FORMAT, **state, **strategy.scalars()}, plugins or {})

    # All ranks go through the same exchanges, whatever fails on one of them.
    errors = [strategy.broadcast(_attempt(lambda: _make(scratch)) if is_first else "")]
    if not any(errors):
        errors = strategy.gather(_attempt(write))
    if not any(errors):
        errors = [strategy.broadcast(_attempt(lambda: _commit(scratch, directory)) if is_first else "")]
    if any(errors):
        if is_first:
            shutil.rmtree(scratch, ignore_errors=True)
        raise UserError(
            f"can't save {directory}: {next(filter(None, errors))}; earlier checkpoints are intact:"
            f" make room and run `ftcore resume {directory.parent.parent}`"
        )


def _attempt(action: Callable[[], None]) -> str:
    """What the disk has against it; empty where it went well."""
    try:
        action()
    except (OSError, SafetensorError) as error:
        return str(error) or type(error).__name__
    return ""


def _make(scratch: Path) -> None:
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)


def _write_rank(directory: Path, strategy: Strategy, values_only: bool) -> None:
    tensors, index = {}, {}
    for kind, shard, tensor in strategy.pieces(values_only):
        if tensor.numel():
            key = f"{kind}/{shard.name}"
            # A copy: safetensors refuses tensors that share memory.
            tensors[key] = tensor.detach().to("cpu", torch.float32, copy=True)
            index[key] = [shard.offset, *shard.shape]
    path = directory / f"rank-{strategy.rank:05d}.safetensors"
    save_file(tensors, path, metadata={"index": json.dumps(index)})
    _sync(path)
    if strategy.rank == 0:
        buffers = {n: b.detach().cpu().clone() for n, b in base_model(strategy.model).named_buffers()}
        save_file(buffers, directory / "buffers.safetensors")
        _sync(directory / "buffers.safetensors")


def _write_state(directory: Path, state: Mapping[str, Any], plugins: Mapping[str, Any]) -> None:
    plain: dict[str, Any] = {}
    for name, values in plugins.items():
        tensors = {k: v.detach().cpu().contiguous() for k, v in values.items() if isinstance(v, Tensor)}
        plain[name] = {k: v for k, v in values.items() if not isinstance(v, Tensor)}
        if tensors:
            save_file(tensors, directory / f"plugin-{name}.safetensors")
            _sync(directory / f"plugin-{name}.safetensors")
    (directory / "state.json").write_text(json.dumps({**state, "plugins": plain}))
    _sync(directory / "state.json")


def _commit(scratch: Path, directory: Path) -> None:
    hashes = {f.name: file_hash(f) for f in sorted(scratch.iterdir())}
    (scratch / "manifest.json").write_text(json.dumps(hashes))
    _sync(scratch / "manifest.json")
    _sync(scratch)
    if directory.exists():  # the same step, saved again after a resume
        shutil.rmtree(directory)
    scratch.rename(directory)
    _sync(directory.parent)


def _sync(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Checkpoint:
    """A saved state. `state` is what `save` was given, `read` gives tensors whole, from any world size.

    Raises:
        UserError: a file is missing or not as it was written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            hashes = json.loads((directory / "manifest.json").read_text())
            bad = [name for name, value in hashes.items() if file_hash(directory / name) != value]
        except (OSError, ValueError) as error:
            raise UserError(f"checkpoint {directory} is not whole: {error}") from error
        if bad:
            raise UserError(f"checkpoint {directory} is damaged: {', '.join(bad)}")
        self.state: dict[str, Any] = json.loads((directory / "state.json").read_text())
        if self.state["format"] != FORMAT:
            raise UserError(
                f"checkpoint {directory} has format {self.state['format']}, this ftcore reads {FORMAT}"
            )
        self._files = [safe_open(f, framework="pt") for f in sorted(directory.glob("rank-*.safetensors"))]
        self._index = [
            json.loads(f.metadata()["index"])  # type: ignore[no-untyped-call]
            for f in self._files
        ]

    def kinds(self, name: str) -> set[str]:
        """What was saved of a parameter: `value`, and the optimiser's states."""
        keys = (key.partition("/") for index in self._index for key in index)
        return {kind for kind, _, parameter in keys if parameter == name}

    def read(self, kind: str, name: str) -> Tensor:
        """The whole tensor, flat fp32.

        Raises:
            UserError: it was not saved, or not all of it.
        """
        key, parts, size = f"{kind}/{name}", [], -1
        for file, index in zip(self._files, self._index, strict=True):
            if key in index:
                offset, *shape = index[key]
                size = torch.Size(shape).numel()
                parts.append((offset, file.get_tensor(key)))  # type: ignore[no-untyped-call]
        whole = torch.cat([t for _, t in sorted(parts, key=lambda p: p[0])] or [torch.empty(0)])
        if whole.numel() != size:
            raise UserError(
                f"checkpoint {self.directory} lacks {key}, whole or in part; is it of this model?"
            )
        return whole

    def load_buffers(self, model: torch.nn.Module) -> None:
        """Copy saved buffers into the model."""
        buffers = dict(base_model(model).named_buffers())
        with safe_open(self.directory / "buffers.safetensors", framework="pt") as file:
            for name in file.keys():
                buffers[name].copy_(file.get_tensor(name))

    def plugin_state(self, name: str) -> dict[str, Any] | None:
        """What the plugin's `state_dict` returned; None where it had none."""
        plain: dict[str, Any] | None = self.state["plugins"].get(name)
        path = self.directory / f"plugin-{name}.safetensors"
        if plain is not None and path.is_file():
            with safe_open(path, framework="pt") as file:
                plain = plain | {k: file.get_tensor(k) for k in file.keys()}
        return plain


def newest(checkpoints: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint, and what is wrong with each newer one."""
    problems: list[str] = []
    for directory in sorted(_steps(checkpoints), key=_step, reverse=True):
        try:
            return Checkpoint(directory), problems
        except UserError as error:
            problems.append(str(error))
    return None, problems


def prune(checkpoints: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints, and best weights that none of those names."""
    steps = sorted(_steps(checkpoints), key=_step)
    for directory in steps[:-keep_last]:
        shutil.rmtree(directory)
    wanted = set()
    for directory in steps[-keep_last:]:
        with contextlib.suppress(OSError, ValueError):
            wanted.add(json.loads((directory / "state.json").read_text())["best_weights"])
    bests = sorted(checkpoints.glob("best-*"), key=_step)
    for directory in bests[:-1]:  # the newest is the run's own, not yet in a checkpoint
        if directory.name not in wanted:
            shutil.rmtree(directory)


def sweep(checkpoints: Path) -> None:
    """Delete what a killed run left half written."""
    for directory in checkpoints.glob(".writing-*"):
        shutil.rmtree(directory)


def _steps(checkpoints: Path) -> list[Path]:
    return [d for d in checkpoints.glob("step-*") if re.fullmatch(r"step-\d+", d.name)]


def _step(directory: Path) -> int:
    return int(directory.name.rpartition("-")[2])
