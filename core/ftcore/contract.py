"""What hooks receive and return.

Nothing here knows how a run is driven; `hookspecs` says when each of these is passed, `loop` does it.
Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import torch
    from torch import Tensor

__all__ = ["Batch", "Dropped", "Formatted", "LossTerm", "Sampler", "Shard", "State", "Step"]

Formatted = Mapping[str, "int | float | str | Sequence[int] | Sequence[float]"]
"""One formatted row: column name to a number, a string, or a list of numbers.

`input_ids` is required. `truncated` (tokens cut off) is read by the data audit and not kept.
"""


class Dropped(tuple[Formatted, ...]):
    """An entry of `format_examples` that is no row, and says why.

    The audit counts the reasons, and shows the first few places of each.

    Args:
        reason: what is wrong, the same words for the same fault: `empty answer`.
        where: the example's place where its number is not the source's own: `tasks/a.jsonl row 12`.
    """

    reason: str
    where: str

    def __new__(cls, reason: str, where: str = "") -> Dropped:
        made = super().__new__(cls)
        made.reason, made.where = reason, where
        return made


class Batch(dict[str, "Tensor"]):
    """One micro-batch: what the model is called with (`input_ids`, `attention_mask`, ...) and `labels`.

    Attributes:
        rows: the data-set row behind each row of the tensors.
        columns: what is no tensor (strings such as `group`), one list per column.
        arguments: what the training forward passes to the model beside the tensors: a wrapper of
            `forward` asks for hidden states by `batch.arguments["output_hidden_states"] = True`.
        micro_batch: index within the optimiser step, counted over all ranks.
        is_filler: a row run only so that all ranks make equally many forward passes. It counts
            for nothing: its units and its loss are multiplied by zero.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        super().__init__(tensors)
        self.columns = dict(columns or {})
        self.arguments: dict[str, Any] = {}
        self.rows: list[int] = []
        self.micro_batch = 0
        self.is_filler = False

    def to(self, device: torch.device) -> Batch:
        """Move every tensor to `device`, in place; returns the batch itself."""
        for key, tensor in self.items():
            self[key] = tensor.to(device, non_blocking=True)
        return self


@dataclass(kw_only=True)
class LossTerm:
    """One named part of the loss, of one micro-batch, before it is normalised.

    Core divides `sum` by N(unit), the total of that unit over all micro-batches and ranks of the
    optimiser step, so that the gradient does not depend on how the step was split. Never divide
    by the size of the micro-batch yourself.

    Attributes:
        sum: scalar, fp32: the loss summed over what `unit` counts.
        unit: `examples`, `tokens` (trained tokens), `micro_batches`, a unit of a plugin's own
            `count_units`, or `step` (N = 1) for what is normalised already.
        weight: factor in the total loss. The logged value of the term leaves it out.
        value: what to log in place of `sum`/N: this micro-batch's share of the step's value.
        additive: False where rows of a micro-batch interact (in-batch contrast), so that
            the result depends on the split by its nature.
    """

    sum: Tensor
    unit: str
    weight: float = 1.0
    value: Tensor | None = None
    additive: bool = True


@dataclass(kw_only=True)
class Shard:
    """A rank's own part of one parameter, flat. Over all ranks each element occurs exactly once.

    Attributes:
        name: as in `model.named_parameters()`.
        shape: of the whole parameter.
        offset: of the first element here in the flattened parameter.
        value: 1-D fp32; write into it to change the weights.
        grad: 1-D fp32, summed over ranks and normalised, before clipping; None where there is none.
        lr_scale: what `param_options` said: the parameter's rate is `lr` times this.
        pretrained: 1-D fp32, the value as it was loaded, before any `setup_model`; kept only where a
            plugin says `@plugin(needs=("pretrained",))`, and None for what the checkpoint did not have
            (a new head, parameters that were added).
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    value: Tensor
    grad: Tensor | None = None
    lr_scale: float = 1.0
    pretrained: Tensor | None = None


@dataclass(kw_only=True)
class Step:
    """Where in training a hook is called.

    Attributes:
        index: optimiser steps finished before this one.
        total: optimiser steps of the whole run.
        epoch: 0-based.
        seed: the run's seed.
        micro_batch: index within the step over all ranks, of the micro-batch in hand.
        run_forward: what `forward` calls; the loop sets it.
    """

    index: int
    total: int
    epoch: int
    seed: int
    micro_batch: int = 0
    run_forward: Callable[[Batch, Step], Any] | None = field(default=None, repr=False)
    logged: dict[str, float | Tensor] = field(default_factory=dict)

    @property
    def progress(self) -> float:
        """Share of training that is done, 0 to 1."""
        return self.index / max(1, self.total)

    def forward(self, batch: Batch) -> Any:
        """The model's outputs for one of the step's micro-batches, made just as the loop makes them.

        On the device, through every plugin's `forward`, with the random draws of that micro-batch. For
        a first pass in `on_step_start`, under `torch.no_grad()`; all ranks must make equally many.
        """
        if self.run_forward is None:
            raise RuntimeError("Step.forward works only in a step that the loop runs")
        return self.run_forward(batch, self)

    def generator(self, name: str, *, per_micro_batch: bool = False) -> torch.Generator:
        """A CPU generator that depends only on (seed, step, name): equal after resume and on all ranks.

        With `per_micro_batch` also on the micro-batch's index.
        """
        from ftcore.seeding import generator

        return generator(self.seed, name, self.index, self.micro_batch if per_micro_batch else -1)

    def row_generator(self, name: str, row: int) -> torch.Generator:
        """A CPU generator for one data-set row: the same for the row however the step is split."""
        from ftcore.seeding import generator

        return generator(self.seed, name, self.index, row)

    def input_grad(self, fn: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the scalar `fn(*inputs)` at `inputs` (adversarial noise, saliency).

        The weights' gradients are left alone: calling `backward` in a hook would add to them.
        """
        import torch

        leaves = [x.detach().requires_grad_(True) for x in inputs]
        with torch.enable_grad():
            return torch.autograd.grad(fn(*leaves), leaves)

    def log(self, name: str, value: float | Tensor) -> None:
        """Add `name` to this step's record. The last value stands; tensors are read only when logged."""
        self.logged[name] = value


class Sampler(Protocol):
    """Chooses the rows of each optimiser step, as a function of its arguments alone."""

    steps_per_epoch: int

    def __call__(self, epoch: int, step: int) -> np.ndarray | Sequence[np.ndarray]:
        """Data-set rows (int64) of step `step` (within the epoch) of epoch `epoch`.

        Where it answers a list of such arrays, each is a pack: its rows stay in one micro-batch, and
        `train.batch_size` and `train.micro_batch_size` count packs.
        """
        ...


@dataclass(kw_only=True)
class State:
    """The run as `on_train_start`, `on_step_end` and `on_train_end` see it.

    Attributes:
        shards: this rank's parts of the trained weights, as they are when it is called.
        lend: None where each rank holds the weights whole, and hooks may put others in their place. Where
            they are split over ranks (ZeRO 1 to 3), `lend(values)` makes the forwards of the step compute
            with `values` (1-D, of this rank's shards, by name) and `lend(None)` ends that; all ranks call
            it alike. The shards stay the weights. In `on_backward_end` their gradients are summed already.
    """

    model: torch.nn.Module
    tokenizer: Any
    device: torch.device
    run_dir: Path
    step: int
    total: int
    metrics: dict[str, float] = field(default_factory=dict)
    shards: Callable[[], list[Shard]] = list
    lend: Callable[[Mapping[str, Tensor] | None], None] | None = None
