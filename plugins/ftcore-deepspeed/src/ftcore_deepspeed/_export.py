"""`model/` from weights that are split over ranks: gathered one by one, written file by file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ftcore.strategies import whole_shape

__all__ = ["export", "plan_files"]

FILE_BYTES = 2 << 30
"""Of a weights file at most, and so of what rank 0 holds at a time, unless one weight is larger."""


def export(model: Any, folder: Path, *, rank: int, file_bytes: int = FILE_BYTES) -> None:
    """Write config and weights as `save_pretrained` does; all ranks together, rank 0 writes.

    Of tied weights the first is written, which is the one that the others are tied to.
    """
    named = dict(model.named_parameters())
    buffers = {k: v for k, v in model.state_dict().items() if k in dict(model.named_buffers())}
    sizes = [(name, prod(whole_shape(p)) * p.element_size()) for name, p in named.items()]
    files = plan_files(sizes, file_bytes)
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        model.config.architectures, model.config.dtype = [type(model).__name__], "float32"
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
    where: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        file = (
            "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        )
        tensors = {name: whole for name, whole in _gather(named, names) if rank == 0}
        if number == 1:
            tensors |= {name: buffer.detach().cpu().clone() for name, buffer in buffers.items()}
        where |= dict.fromkeys(tensors, file)
        if rank == 0:
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if rank == 0 and len(files) > 1:
        index = {"metadata": {"total_size": sum(size for _, size in sizes)}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def plan_files(sizes: Sequence[tuple[str, int]], file_bytes: int) -> list[list[str]]:
    """Names by file: in order, as many to a file as it may have bytes, at least one."""
    files: list[list[str]] = []
    room = 0
    for name, size in sizes:
        if size > room or not files:
            files.append([])
            room = file_bytes
        files[-1].append(name)
        room -= size
    return files


def _gather(named: dict[str, Any], names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Each weight whole, on the CPU: all ranks take part, one weight at a time."""
    import deepspeed

    for name in names:
        with deepspeed.zero.GatheredParameters([named[name]]), torch.no_grad():
            yield name, named[name].detach().to("cpu", copy=True)
