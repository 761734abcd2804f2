"""What is known of DeepSpeed's inside: where, in each stage, a rank's slice of a parameter is kept.

Everything here was read in DeepSpeed 0.19.8 and is tested against it; the version is bounded in
pyproject.toml. Nothing else in this package reaches into the engine's optimiser.

    stage 1, 2   the weights lie in one flat buffer per parameter group, of which each rank owns an
                 equal slice; the optimiser steps an fp32 copy of that slice
    stage 3      each weight is cut in equal slices, the last one padded; a rank's slices lie one
                 after another in flat buffers, which the optimiser steps
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

__all__ = ["Part", "Slices"]


@dataclass(frozen=True)
class Part:
    """A rank's slice of one parameter.

    Attributes:
        offset: of the slice in the flattened parameter.
        flat: what the optimiser steps, fp32; it holds slices of many parameters.
        start: of the slice in `flat`.
        numel: elements of the slice, padding left out; 0 where the rank has none of the parameter.
        group, index: where its gradient is.
    """

    param: Any
    offset: int
    flat: Tensor
    start: int
    numel: int
    group: int
    index: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole parameter."""
        return tuple(getattr(self.param, "ds_shape", self.param.shape))

    def of(self, flat: Tensor) -> Tensor:
        """The slice's place in a tensor that is laid out as `flat` is: its gradient, a moment."""
        return flat.detach().narrow(0, self.start, self.numel)


class Slices:
    """This rank's slices of the trained parameters, in a ZeRO optimiser of stage 1, 2 or 3."""

    def __init__(self, engine: Any, params: Mapping[str, Any]) -> None:
        self.engine, self.zero = engine, engine.optimizer
        self.stage: int = int(engine.zero_optimization_stage())
        self.offloaded = bool(self.zero.offload_optimizer if self.stage == 3 else self.zero.cpu_offload)
        groups = self.zero.fp16_groups if self.stage == 3 else self.zero.params_in_partition
        places = {id(p): (g, i) for g, members in enumerate(groups) for i, p in enumerate(members)}
        find = self._of_stage_3 if self.stage == 3 else self._of_stage_1_2
        self._own: dict[str, Tensor] = {}  # what `lend` has taken the place of (stage 3)
        self.parts = {name: find(param, *places.get(id(param), (0, -1))) for name, param in params.items()}

    def _of_stage_1_2(self, param: Any, group: int, index: int) -> Part:
        flat = self.zero.single_partition_of_fp32_groups[group]
        if index < 0:
            return Part(param, 0, flat, 0, 0, group, index)
        here, there = param._hp_mapping.lp_fragment_address, param._hp_mapping.hp_fragment_address
        return Part(param, here.start, flat, there.start, there.numel, group, index)

    def _of_stage_3(self, param: Any, group: int, index: int) -> Part:
        start = self.zero.grad_position[self.zero.get_param_id(param)][1]
        size, rank = param.partition_numel(), self.zero._get_param_partition_rank(param)
        offset = min(size * rank, param.ds_numel)
        flat = self.zero.fp32_partitioned_groups_flat[group]
        return Part(param, offset, flat, start, min(size, param.ds_numel - offset), group, index)

    def gradients(self) -> dict[str, Tensor | None]:
        """Each slice's gradient after the last backward; what is written into it is what the step reads."""
        real = {
            group: [g for g in grads or () if not getattr(g, "_zero_padding", False)]
            for group, grads in ({} if self.offloaded else self.zero.averaged_gradients).items()
        }
        return {name: self._gradient(part, real) for name, part in self.parts.items()}

    def _gradient(self, part: Part, real: Mapping[int, list[Tensor]]) -> Tensor | None:
        if part.numel == 0:
            return part.flat.detach()[:0]
        if self.offloaded:
            return None if part.flat.grad is None else part.of(part.flat.grad)
        grads = real.get(part.group)
        return grads[part.index].view(-1)[: part.numel] if grads else None

    def give_norm(self, norm: Tensor) -> None:
        """The gradients' norm, by which the engine's step sees whether it is finite: or it would go over
        all gradients once more. It does not clip by it (`gradient_clipping` is 0)."""
        if self.stage == 3:
            self.zero._get_norm_groups = lambda: [norm]
        else:
            self.zero.scaled_global_norm = lambda: norm

    def forget_gradients(self) -> None:
        """After a step: a parameter that the next one does not use must not find this one's gradient."""
        if self.offloaded:
            for flat in {id(p.flat): p.flat for p in self.parts.values()}.values():
                if flat.grad is not None:
                    flat.grad.zero_()
        elif self.stage == 3:
            self.zero.grad_partitions_flat_buffer.zero_()

    def publish(self) -> None:
        """Make the fp32 slices the weights that the next forward sees, on all ranks."""
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        for flat, copy in zip(
            self.zero.fp32_partitioned_groups_flat, self.zero.fp16_partitioned_groups_flat, strict=True
        ):
            copy.data.copy_(flat.data)  # of itself, where nothing is offloaded
        self.zero._partition_all_parameters()  # what is whole somewhere still has the old values
        self._gather_persistent()

    def lend(self, values: Mapping[str, Tensor]) -> None:
        """Let forwards compute with `values` in the weights' place, until `restore` or the next step."""
        if self.stage < 3:
            for name, value in values.items():
                part = self.parts[name]
                mine = self.zero.parallel_partitioned_bit16_groups[part.group][self.engine.global_rank]
                part.of(mine).copy_(value)
            _all_gather(self.zero)
            return
        self.zero._partition_all_parameters()
        for name, value in values.items():
            own = self.parts[name].param.ds_tensor
            self._own.setdefault(name, own.data)
            own.data = pad(value.to(own.device, own.dtype), (0, own.numel() - value.numel()))
        self._gather_persistent()

    def restore(self) -> None:
        """Put the weights back; at stages 1 and 2 it is the step that does so, on all ranks."""
        if self.stage == 3:
            self.zero._partition_all_parameters()
            for name, data in self._own.items():
                self.parts[name].param.ds_tensor.data = data
            self._own = {}

    def _gather_persistent(self) -> None:
        """Small weights stay whole on each rank: they are put together anew, from the slices of all."""
        if kept := self.zero.persistent_parameters:
            kept[0].all_gather(kept)

    def states(self, part: Part) -> Mapping[str, Any]:
        """The optimiser's states of the flat tensor that holds the slice."""
        state: Mapping[str, Any] = self.zero.optimizer.state[part.flat]
        return state

    def flats(self) -> Iterable[Tensor]:
        return {id(p.flat): p.flat for p in self.parts.values()}.values()


def _all_gather(zero: Any) -> None:
    """Every rank's slice of the flat weights, to all (stage 1 and 2)."""
    from deepspeed.runtime.utils import all_gather_dp_groups

    all_gather_dp_groups(
        groups_flat=zero.bit16_groups_flat,
        partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
        dp_process_group=zero.real_dp_process_group,
        start_alignment_factor=zero.nccl_start_alignment_factor,
        allgather_bucket_size=zero.allgather_bucket_size,
    )
