"""Where gradients meet: one process (`single`) or one per device (`ddp`).

A strategy moves the model, sums gradients over ranks (never averages: the loss is normalised
already), owns the optimiser, and says which part of the state is this rank's own. It knows
nothing of losses or plugins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ftcore import models
from ftcore.config import Config
from ftcore.contract import Shard
from ftcore.errors import TrainingError, UserError
from ftcore.launch import rank_environment
from ftcore.ranks import join_ranks

if TYPE_CHECKING:
    from ftcore.checkpoint import Checkpoint

__all__ = ["DDP", "Single", "Strategy", "base_model", "local_ranks", "whole_shape"]

BUCKET = 25 * 2**20 // 4  # elements per all-reduce: 25 MiB of fp32
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

Lend = Callable[[Mapping[str, Tensor] | None], None]
OptimizerBuilder = Callable[[torch.nn.Module], torch.optim.Optimizer]


class Strategy(Protocol):
    """What the loop asks of a strategy; every method is called by all ranks alike."""

    rank: int
    world_size: int
    device: torch.device
    model: torch.nn.Module
    lend: Lend | None

    def prepare(self, model: torch.nn.Module, build_optimizer: OptimizerBuilder) -> None: ...
    def backward(self, loss: Tensor, *, last: bool = True) -> None: ...
    def finish_gradients(self) -> None: ...
    def shards(self) -> list[Shard]: ...
    def sync_shards(self) -> None: ...
    def clip(self, max_norm: float | None) -> Tensor: ...
    def step(self, lr: float) -> bool: ...
    def all_sum(self, values: Sequence[float]) -> list[float]: ...
    def gather(self, value: Any) -> list[Any]: ...
    def broadcast(self, value: Any) -> Any: ...
    def pieces(self, values_only: bool) -> Iterator[tuple[str, Shard, Tensor]]: ...
    def scalars(self) -> dict[str, Any]: ...
    def load(self, saved: Checkpoint) -> None: ...
    def keep_pretrained(self, values: Mapping[str, Tensor]) -> None: ...
    def export(self, model: torch.nn.Module, folder: Path) -> None: ...
    def close(self) -> None: ...


def base_model(model: torch.nn.Module) -> Any:
    """The transformers model inside whatever a strategy wraps around it."""
    inner = getattr(model, "module", None)
    return inner if isinstance(inner, torch.nn.Module) and hasattr(inner, "config") else model


def whole_shape(param: Tensor) -> tuple[int, ...]:
    """The shape of a parameter, of one too that DeepSpeed has split over ranks: its own is then (0,)."""
    return tuple(getattr(param, "ds_shape", param.shape))


def local_ranks(strategy: str, devices: int | None, device: str | None = None) -> int:
    """Processes to start on this machine: `devices`, or every GPU where there are any and `device` allows."""
    if strategy == "single":
        return 1
    gpus = torch.cuda.device_count() if device in (None, "cuda") else 0
    if devices and gpus and devices > gpus:
        raise UserError(f"trainer.devices={devices}, but this machine has {gpus} GPU(s)")
    return devices or max(1, gpus)


class Single:
    """One process on one device."""

    lend: Lend | None = None

    def __init__(self, cfg: Config) -> None:
        self.precision = cfg.train.precision
        self.checkpointing = cfg.train.gradient_checkpointing
        self.rank, self.world_size, self.local_rank = 0, 1, 0
        self.device = _device(getattr(cfg.trainer, "device", None), 0)
        self.pretrained: dict[str, Tensor] = {}  # this rank's part, by name; where a plugin needs it
        self.lr_scales: dict[str, float] = {}  # by name

    def prepare(self, model: torch.nn.Module, build_optimizer: OptimizerBuilder) -> None:
        """Take the model (fp32, CPU) and build its optimiser."""
        self.set_up(model)
        self.optimizer = self.optimizer_of(model, build_optimizer)

    def optimizer_of(self, model: torch.nn.Module, build: OptimizerBuilder) -> torch.optim.Optimizer:
        """The optimiser, whose groups' `lr_scale` shards tell, too."""
        optimizer = build(model)
        scales = {id(p): g.get("lr_scale", 1.0) for g in optimizer.param_groups for p in g["params"]}
        self.lr_scales = {name: scales.get(id(param), 1.0) for name, param in self.params.items()}
        return optimizer

    def set_up(self, model: torch.nn.Module) -> None:
        """Put the model on its device, with checkpointing and autocast as asked for."""
        model.to(self.device)
        if self.checkpointing:
            if not getattr(model, "supports_gradient_checkpointing", False):
                raise UserError(f"{type(model).__name__} can't do train.gradient_checkpointing")
            # The new name is transformers 5.24's; the old one warns there.
            name = "activation_checkpointing_enable"
            enable: Any = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
            enable({"use_reentrant": False})
        if self.precision != "fp32":
            # Every call of the model runs under autocast, wherever a hook makes it.
            cast = torch.autocast(self.device.type, DTYPES[self.precision])
            model.forward = cast(model.forward)
        for param in model.parameters():
            param.data = param.data.contiguous()  # shards are views
        self.model = model
        self.params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Accumulate this micro-batch's gradients; `last` of this rank's in the step."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def finish_gradients(self) -> None:
        """After the last backward: gradients whole, summed over ranks and unscaled; none is None."""
        for param in self.params.values():
            if param.grad is None:
                param.grad = torch.zeros_like(param)
        self._reduce()
        self.scaler.unscale_(self.optimizer)

    def _reduce(self) -> None:
        """Sum gradients over ranks."""

    def shards(self) -> list[Shard]:
        """This rank's part of every trainable parameter, as views."""
        return [
            Shard(
                name=name,
                shape=tuple(param.shape),
                offset=start,
                value=param.detach().view(-1)[start:stop],
                grad=None if param.grad is None else param.grad.view(-1)[start:stop],
                lr_scale=self.lr_scales.get(name, 1.0),
                pretrained=self.pretrained.get(name),
            )
            for name, param in self.params.items()
            for start, stop in (self._own(param.numel()),)
        ]

    def _own(self, numel: int) -> tuple[int, int]:
        """The range of a flat parameter that this rank owns."""
        size = -(-numel // self.world_size)
        return min(numel, self.rank * size), min(numel, (self.rank + 1) * size)

    def sync_shards(self) -> None:
        """Make what was written into shards known to all ranks."""

    def clip(self, max_norm: float | None) -> Tensor:
        """Scale gradients down to `max_norm` (L2, over all parameters); returns the norm before."""
        params = list(self.params.values())
        norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        if max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm)
        return norm

    def step(self, lr: float) -> bool:
        """One optimiser step at `lr` (times each group's `lr_scale`); False where fp16 overflowed."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.check_scale()
        return self.scaler.get_scale() >= before

    def check_scale(self) -> None:
        """Refuse to go on where no loss scale is low enough for fp16."""
        if self.scaler.get_scale() < 1:
            raise TrainingError(
                "fp16 gradients overflow at every loss scale; use train.precision=bf16 or fp32"
            )

    def all_sum(self, values: Sequence[float]) -> list[float]:
        """Sum each number over ranks."""
        return list(values)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on all ranks."""
        return [value]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        return value

    def pieces(self, values_only: bool) -> Iterator[tuple[str, Shard, Tensor]]:
        """This rank's own part of the state: (`value` or an optimiser state's name, where, flat tensor)."""
        for shard in self.shards():
            yield "value", shard, shard.value
            state = self.optimizer.state[self.params[shard.name]]
            for key, tensor in () if values_only else state.items():
                if isinstance(tensor, Tensor) and tuple(tensor.shape) == shard.shape and tensor.ndim:
                    stop = shard.offset + shard.value.numel()
                    yield key, shard, tensor.view(-1)[shard.offset : stop]

    def scalars(self) -> dict[str, Any]:
        """State that is one number per parameter (Adam's `step`), and the fp16 scale."""
        states = {
            name: {
                key: float(value)
                for key, value in self.optimizer.state[param].items()
                if not isinstance(value, Tensor) or value.ndim == 0
            }
            for name, param in self.params.items()
        }
        return {"optimizer": states, "scaler": self.scaler.state_dict()}

    def load(self, saved: Checkpoint) -> None:
        """Take over a saved state; optimiser states only where they were saved."""
        # A fused optimiser reads its count of steps on the device.
        on_device = {id(p) for g in self.optimizer.param_groups if g.get("fused") for p in g["params"]}
        for name, param in self.params.items():
            param.data.view(-1).copy_(saved.read("value", name))
            numbers = saved.state.get("optimizer", {}).get(name, {})
            place = param.device if id(param) in on_device else None
            state: dict[str, Any] = {key: torch.tensor(n, device=place) for key, n in numbers.items()}
            for kind in saved.kinds(name) - {"value"}:
                moment = saved.read(kind, name)
                state[kind] = moment.view(param.shape).to(param.device, param.dtype)
            if state:
                self.optimizer.state[param] = state
        if saved.state.get("scaler"):
            self.scaler.load_state_dict(saved.state["scaler"])

    def keep_pretrained(self, values: Mapping[str, Tensor]) -> None:
        """Keep, for `Shard.pretrained`, this rank's part of the flat values that weights were loaded with."""
        for shard in self.shards():
            if shard.name in values:
                part = values[shard.name][shard.offset : shard.offset + shard.value.numel()]
                self.pretrained[shard.name] = part.to(shard.value.device, copy=True)

    def export(self, model: torch.nn.Module, folder: Path) -> None:
        """Write weights and config as `save_pretrained` does."""
        if self.rank == 0:
            models.save(model, folder)

    def close(self) -> None:
        """Give back what the strategy holds."""


class DDP(Single):
    """One process per device; each holds the whole model, gradients are summed after the backward.

    The buckets of the all-reduce never change, so a resumed run adds in the same order.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        self.rank, self.world_size, self.local_rank = rank_environment()
        self.device = _device(getattr(cfg.trainer, "device", None), self.local_rank)
        self.distributed = self.world_size > 1
        if self.distributed and self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.distributed:
            join_ranks()

    def prepare(self, model: torch.nn.Module, build_optimizer: OptimizerBuilder) -> None:
        super().prepare(model, build_optimizer)
        for tensor in (*model.parameters(), *model.buffers()) if self.distributed else ():
            dist.broadcast(tensor.data, 0)

    def _reduce(self) -> None:
        self._sum([p.grad for p in self.params.values() if p.grad is not None])

    def _sum(self, tensors: Sequence[Tensor]) -> None:
        """Sum over ranks in place, in buckets."""
        bucket: list[Tensor] = []
        for i, tensor in enumerate(tensors if self.distributed else ()):
            bucket.append(tensor)
            if sum(t.numel() for t in bucket) < BUCKET and i + 1 < len(tensors):
                continue
            flat = torch.cat([t.reshape(-1) for t in bucket])
            dist.all_reduce(flat)
            for t, part in zip(bucket, torch.split(flat, [t.numel() for t in bucket]), strict=True):
                t.copy_(part.view_as(t))
            bucket = []

    def sync_shards(self) -> None:
        if not self.distributed:
            return
        with torch.no_grad():
            for param in self.params.values():
                start, stop = self._own(param.numel())
                for tensor in (param.data, param.grad):
                    if tensor is not None:  # what others own is zero here, so the sum is the union
                        flat = tensor.view(-1)
                        flat[:start], flat[stop:] = 0, 0
            self._sum([p.data for p in self.params.values()])
            self._reduce()

    def all_sum(self, values: Sequence[float]) -> list[float]:
        if not self.distributed:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        numbers: list[float] = total.tolist()
        return numbers

    def gather(self, value: Any) -> list[Any]:
        values = [value] * self.world_size
        if self.distributed:
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        values = [value]
        if self.distributed:
            dist.broadcast_object_list(values, 0)
        return values[0]


def _device(name: str | None, local_rank: int) -> torch.device:
    """The named device, else cuda, else mps, else cpu."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if not available.get(name, False):
        there = ", ".join(d for d, ok in available.items() if ok)
        raise UserError(f"trainer.device={name} is not there; this machine has {there}")
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)
