"""ZeRO as a strategy: what core's loop asks of one, answered by a DeepSpeed engine.

The engine averages gradients over ranks and would divide by the accumulation steps. Core's loss is
normalised already, so that it must be a plain sum: the loss is multiplied by the number of ranks,
and the engine is told not to divide. Clipping is core's own arithmetic, done once, on the slices.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from ftcore.checkpoint import Checkpoint
from ftcore.config import Config
from ftcore.contract import Shard
from ftcore.errors import UserError
from ftcore.strategies import DDP, OptimizerBuilder
from ftcore_deepspeed._config import accepted, check_known
from ftcore_deepspeed._engine import Slices
from ftcore_deepspeed._export import export

if TYPE_CHECKING:
    from ftcore_deepspeed._plugin import DeepSpeed

__all__ = ["ZeRO"]


class ZeRO(DDP):
    """A DeepSpeed engine. Stage 0 splits nothing, so that all but the engine's own calls is as in `ddp`."""

    def __init__(
        self, cfg: Config, options: DeepSpeed, engine_config: dict[str, Any], passed: list[str]
    ) -> None:
        super().__init__(cfg)
        self.stage, self.engine_config = options.stage, engine_config
        self.given = options.config, passed
        if not dist.is_initialized():  # one rank: the engine wants a process group of one, too
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        self.distributed = True
        os.environ.setdefault("LOCAL_RANK", str(self.local_rank))  # the engine asks; srun does not set it
        self.deepspeed = _import_deepspeed(self.device)
        self.slices: Slices | None = None
        if passed:
            with accepted(*self.given):
                check_known(engine_config, *self.given)

    def prepare(self, model: torch.nn.Module, build_optimizer: OptimizerBuilder) -> None:
        """Take the model and its optimiser into an engine."""
        self.set_up(model)
        optimizer = self.optimizer_of(model, build_optimizer)
        with accepted(*self.given):
            self.engine, self.optimizer, _, _ = self.deepspeed.initialize(
                model=model, optimizer=optimizer, config=self.engine_config
            )
            self.model = self.engine
            if self.stage:
                self.slices = Slices(self.engine, self.params)
        if self.slices is not None:
            self.lend = self._lend
            self.optimizer = self.engine.optimizer.optimizer
            self._check_slices(self.slices)

    def _check_slices(self, slices: Slices) -> None:
        """Refuse to train where an element has no owner or several: norms and penalties would be wrong."""
        owned = sum(self.all_sum([sum(part.numel for part in slices.parts.values())]))
        if owned != (there := sum(prod(part.shape) for part in slices.parts.values())):
            raise UserError(
                f"trainer.config={self.given[0]}: with it, ranks own {owned:,.0f} elements of {there:,}, and"
                " ftcore needs an owner of each: take out what changes how weights are split"
            )

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Accumulate this micro-batch's gradients; with the last one, sum them over ranks."""
        self.engine.set_gradient_accumulation_boundary(last)
        # Under fp16 the mean becomes the sum later, in fp32, or the scale would be too high by as much.
        fp16 = self.scaler.is_enabled()
        self.engine.backward(self.scaler.scale(loss) if fp16 else loss * self.world_size, scale_wrt_gas=False)

    def finish_gradients(self) -> None:
        """The engine has reduced them in the last backward; here they lose fp16's scale."""
        if self.slices is None:
            for param in self.params.values():
                if param.grad is None:
                    param.grad = torch.zeros_like(param)
            self.scaler.unscale_(self.optimizer)
        if self.scaler.is_enabled():
            scale = 1.0 if self.slices is None else self.scaler.get_scale()
            torch._foreach_mul_(self._gradients(), self.world_size / scale)

    def _gradients(self) -> list[Tensor]:
        if self.slices is None:  # whole, on every rank
            return [p.grad for p in self.params.values() if p.grad is not None]
        return [grad for grad in self.slices.gradients().values() if grad is not None]

    def shards(self) -> list[Shard]:
        if self.slices is None:
            return super().shards()
        grads = self.slices.gradients()
        return [
            Shard(
                name=name,
                shape=part.shape,
                offset=part.offset,
                value=part.of(part.flat),
                grad=grads[name],
                lr_scale=self.lr_scales.get(name, 1.0),
                pretrained=self.pretrained.get(name),
            )
            for name, part in self.slices.parts.items()
        ]

    def sync_shards(self) -> None:
        if self.slices is None:
            super().sync_shards()
        else:
            self.slices.publish()

    def _lend(self, values: Mapping[str, Tensor] | None) -> None:
        assert self.slices is not None
        if values is None:
            self.slices.restore()
        else:
            self.slices.lend(values)

    def clip(self, max_norm: float | None) -> Tensor:
        if self.slices is None:
            return super().clip(max_norm)
        grads = self._gradients()
        square = torch.nn.utils.get_total_norm(grads).square().to(self.device)
        dist.all_reduce(square)
        self.norm = square.sqrt()
        if max_norm is not None:
            torch._foreach_mul_(grads, (max_norm / (self.norm + 1e-6)).clamp(max=1.0).to(grads[0].device))
        return self.norm

    def step(self, lr: float) -> bool:
        if self.slices is None:
            return super().step(lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        self.slices.give_norm(self.norm)
        self.engine.step()  # which leaves the weights alone where the norm is not finite
        self.slices.forget_gradients()
        if self.scaler.is_enabled():
            return self._update_scale(finite=bool(self.norm.isfinite()))
        return True

    def _update_scale(self, *, finite: bool) -> bool:
        """What torch's scaler does, which sees no gradients here: halve the scale, or double it in time."""
        assert self.slices is not None
        state = self.scaler.state_dict()
        state["_growth_tracker"] = state["_growth_tracker"] + 1 if finite else 0
        if not finite:
            state["scale"] *= state["backoff_factor"]
            self.slices.publish()  # a step would have ended what was lent
        elif state["_growth_tracker"] == state["growth_interval"]:
            state["scale"], state["_growth_tracker"] = state["scale"] * state["growth_factor"], 0
        self.scaler.load_state_dict(state)
        self.check_scale()
        return finite

    def pieces(self, values_only: bool) -> Iterator[tuple[str, Shard, Tensor]]:
        if self.slices is None:
            yield from super().pieces(values_only)
            return
        for shard in self.shards():
            yield "value", shard, shard.value
            part = self.slices.parts[shard.name]
            for key, tensor in () if values_only else self.slices.states(part).items():
                if isinstance(tensor, Tensor) and tensor.shape == part.flat.shape:
                    yield key, shard, part.of(tensor)

    def scalars(self) -> dict[str, Any]:
        if self.slices is None:
            return super().scalars()
        states = {
            name: {
                key: float(value)
                for key, value in self.slices.states(part).items()
                if not isinstance(value, Tensor) or value.ndim == 0
            }
            for name, part in self.slices.parts.items()
        }
        return {"optimizer": states, "scaler": self.scaler.state_dict()}

    def load(self, saved: Checkpoint) -> None:
        if self.slices is None:
            return super().load(saved)
        for name, part in self.slices.parts.items():
            stop = part.offset + part.numel
            part.of(part.flat).copy_(saved.read("value", name)[part.offset : stop])
            state = self.optimizer.state[part.flat]
            for key, number in saved.state.get("optimizer", {}).get(name, {}).items():
                state[key] = torch.tensor(number, device=part.flat.device)
            for kind in saved.kinds(name) - {"value"}:
                whole = state.setdefault(kind, torch.zeros_like(part.flat))
                part.of(whole).copy_(saved.read(kind, name)[part.offset : stop])
        self.slices.publish()
        if saved.state.get("scaler"):
            self.scaler.load_state_dict(saved.state["scaler"])

    def export(self, model: torch.nn.Module, folder: Path) -> None:
        if self.stage < 3:
            super().export(model, folder)
        else:
            export(model, folder, rank=self.rank)

    def close(self) -> None:
        if hasattr(self, "engine"):
            self.engine.destroy()
        if self.stage == 3:
            from transformers.integrations.deepspeed import unset_hf_deepspeed_config

            unset_hf_deepspeed_config()


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, quiet, and for the device in use.

    Its CPU collective (shared memory, used for inference alone) is not built: that would take a compiler
    and 40 seconds.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if (named := os.environ.get("DS_ACCELERATOR", device.type)) != device.type:
        raise UserError(f"DS_ACCELERATOR={named}, but this run is on {device.type}: unset DS_ACCELERATOR")
    # torch 2.13 says so of names that DeepSpeed 0.19 calls.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
