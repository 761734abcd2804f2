"""The plugin: which hook does what. The loss is in `_loss`, who meets whom in `_groups` and `_sampler`."""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ftcore import Batch, LossTerm, State, Step, UserError, hookimpl, plugin
from ftcore_contrastive._groups import Group, Groups, gather_padded, gather_ragged, world_size
from ftcore_contrastive._loss import ABSENT, attach, contrast, normalize
from ftcore_contrastive._represent import hidden_states, output_projection, pool, resolve
from ftcore_contrastive._sampler import BalancedPairs

__all__ = ["Contrastive"]

HOOKS = (
    "load_model",
    "setup_model",
    "on_train_start",
    "on_step_start",
    "forward",
    "compute_loss",
    "on_backward_end",
    "on_log",
)
LONELY = 0.25  # the share of anchors without positives above which a run is warned
PATIENCE = 10  # after so many steps
DRIFT = 1e-3  # cosine distance between two passes: other dropout is 0.01 and more, bf16's rounding 1e-4


@plugin(needs=("hidden_states",))
class Contrastive:
    """Add a supervised contrastive loss: (1 - weight) task + weight SCL (Gunel et al., 2021)."""

    weight: float = 0.9
    temperature: float = 0.3
    reduction: Literal["mean", "sum"] = "mean"
    representation: Literal["auto", "first_token", "mean", "last_token", "pooled"] = "auto"
    layer: int = -1
    gather: bool = True
    batch: Literal["micro", "global"] = "micro"
    balance: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight must be in [0, 1], got {self.weight}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be above 0 and finite, got {self.temperature}")
        if self.representation == "pooled" and self.layer != -1:
            raise ValueError(f"layer={self.layer} has no effect with representation=pooled; leave it at -1")
        self._kind = ""  # the representation, `auto` resolved
        self._projection: torch.nn.Module | None = None
        self._groups = Groups(own=[], rows=0, anchors=0, count=0)
        self._group_of: dict[int, Group] = {}  # by micro-batch
        self._first_pass: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # z, loss, gradient by micro-batch
        self._drift: Tensor | None = None
        self._seen, self._lonely, self._steps = 0, 0, 0
        # What is no method is not registered: at weight=0 the run is bit for bit the one without.
        for name in (*(() if self.weight else HOOKS), *(() if self.balance else ("build_sampler",))):
            setattr(self, name, None)

    # Set-up.

    @hookimpl(wrapper=True)
    def load_model(self, cfg: Any) -> Generator[None, torch.nn.Module, torch.nn.Module]:
        """Refuse, before any weights are read, what has no single label a row."""
        if cfg.task.name in ("causal_lm", "seq2seq"):
            raise UserError(
                f"contrastive needs one label a row, task={cfg.task.name} has a label for each token;"
                " use task=classify"
            )
        model = yield
        config: Any = model.config
        if config.problem_type in ("regression", "multi_label_classification") or config.num_labels < 2:
            raise UserError(_no_classes(config.problem_type or "one output (regression)"))
        self._kind = resolve(self.representation, config)
        return model

    @hookimpl
    def setup_model(self, model: torch.nn.Module, cfg: Any) -> None:
        self._cfg = cfg
        if self._kind == "pooled":
            self._projection = output_projection(model)

    def describe(self) -> dict[str, Any]:
        """What is contrasted, for run.json and `ftcore plan`."""
        return {"representation": self._kind, "layer": self.layer} if self._kind else {}

    @hookimpl
    def build_sampler(self, rows: Any, batch_size: int, seed: int, cfg: Any) -> BalancedPairs:
        """Pairs of one class, each row once an epoch."""
        if rows.columns.get("labels") != "int":
            raise UserError("plugin.contrastive.balance needs one class a row; use task=classify")
        sizes = {"batch_size": batch_size, "micro_batch_size": cfg.micro_batch_size(world_size())}
        for key, size in sizes.items():
            if size % 2:
                raise UserError(f"plugin.contrastive.balance needs an even train.{key}, got {size}")
        return BalancedPairs(np.asarray(rows.column("labels")), batch_size, seed)

    @hookimpl
    def on_train_start(self, state: State) -> None:
        ranks = world_size()
        size = self._cfg.micro_batch_size(ranks)
        if self.batch == "global":
            size *= -(-self._cfg.train.batch_size // (size * ranks))
        if (size * ranks if self.gather else size) < 2:
            cure = "plugin.contrastive.batch=global, or raise train.micro_batch_size"
            raise UserError(
                "contrastive: one row by itself has nothing to be contrasted with; "
                + ("raise train.batch_size" if self.batch == "global" else f"use {cure}")
            )
        if self.weight == 1:
            _warn("weight=1 does not train the classification head: its predictions stay as they were drawn")

    # A step.

    @hookimpl(trylast=True)
    def on_step_start(self, model: torch.nn.Module, batches: Sequence[Batch], step: Step) -> None:
        """Form the groups, by one exchange of labels; in a global step, run the first pass."""
        device = next(model.parameters()).device
        labels = gather_ragged([_labels(batch) for batch in batches], device)
        whole = self.batch == "global" and len(batches) > 1
        rank = dist.get_rank() if world_size() > 1 else 0
        self._groups = Groups.of(labels, rank, gather=self.gather, whole=whole)
        self._count(step)
        self._first_pass, self._drift = {}, None
        if whole and self._groups.anchors:
            self._run_first_pass(batches, step)
        elif not whole:
            self._group_of = {b.micro_batch: g for b, g in zip(batches, self._groups.own, strict=True)}

    def _count(self, step: Step) -> None:
        """Log the share of anchors without positives; warn once where it stays high."""
        lonely = self._groups.rows - self._groups.anchors
        step.log("contrastive/no_positive", lonely / max(1, self._groups.rows))
        self._seen += self._groups.rows
        self._lonely += lonely
        self._steps += 1
        share = self._lonely / max(1, self._seen)
        is_last = step.index + 1 == step.total
        if share > LONELY and (self._steps == PATIENCE or (is_last and self._steps < PATIENCE)):
            _warn(
                f"{share:.0%} of the rows so far had no other row of their class to be pulled to; try"
                " plugin.contrastive.balance=true, plugin.contrastive.batch=global, or larger batches"
            )

    def _run_first_pass(self, batches: Sequence[Batch], step: Step) -> None:
        """Representations of the whole step without graphs, and the gradient at each of them."""
        with torch.no_grad():
            parts = [self._represent(step.forward(batch), batch) for batch in batches]
        losses, gradient = self._contrast(torch.cat(parts), self._groups.own[0])
        sizes = [len(part) for part in parts]
        split = zip(parts, torch.split(losses, sizes), torch.split(gradient, sizes), strict=True)
        for batch, (part, loss, grad) in zip(batches, split, strict=True):
            self._first_pass[batch.micro_batch] = part, loss.sum(), grad

    @hookimpl(wrapper=True)
    def forward(self, batch: Batch) -> Generator[None, Any, Any]:
        """Ask for the hidden states, or watch what the head's last layer reads."""
        if self._projection is None:
            batch.arguments["output_hidden_states"] = True
            return (yield)
        read: list[Tensor] = []
        with self._projection.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0])):
            outputs = yield
        if not read:
            raise UserError("contrastive: the model's forward does not call its head's last layer")
        # With the outputs it belongs to: another plugin may make a forward of its own before the loss.
        outputs.contrastive_pooled = read[-1]
        return outputs

    @hookimpl(wrapper=True)
    def compute_loss(
        self, batch: Batch, outputs: Any
    ) -> Generator[None, dict[str, LossTerm], dict[str, LossTerm]]:
        terms = yield
        task = terms["task"]
        terms["task"] = replace(task, weight=task.weight * (1 - self.weight))
        if self._groups.anchors == 0:  # nothing to contrast in the whole step: the log has no such term
            return terms
        z = self._represent(outputs, batch)
        if batch.micro_batch in self._first_pass:
            before, loss, gradient = self._first_pass[batch.micro_batch]
            drift = (1 - (before * z.detach()).sum(dim=-1)).max()
            self._drift = drift if self._drift is None else torch.maximum(self._drift, drift)
        else:
            losses, gradient = self._contrast(z.detach(), self._group_of[batch.micro_batch])
            loss = losses.sum()
        # Normalised already, over groups that micro-batches and ranks share: hence the unit.
        terms["contrastive"] = LossTerm(
            sum=attach(z, loss, gradient), unit="step", weight=self.weight, additive=False
        )
        return terms

    def _represent(self, outputs: Any, batch: Batch) -> Tensor:
        """Normalised representations, [rows, width], in fp32 whatever the precision."""
        with torch.autocast(batch["input_ids"].device.type, enabled=False):
            if self._projection is None:
                states = hidden_states(outputs, self.layer)
            else:
                states = outputs.contrastive_pooled
            if states.ndim == 3:
                kind = "last_token" if self._kind == "pooled" else self._kind
                states = pool(states, batch.get("attention_mask"), kind)
            return normalize(states)

    def _contrast(self, z: Tensor, group: Group) -> tuple[Tensor, Tensor]:
        mean, groups = self.reduction == "mean", self._groups
        scale = 1.0 / max(1, groups.anchors if mean else groups.count)
        over_ranks = self.gather and world_size() > 1
        gather = {"gather": partial(gather_padded, per_rank=group.per_rank)} if over_ranks else {}
        return contrast(z, group.labels.to(z.device), group.rows, self.temperature, scale, **gather)

    @hookimpl
    def on_backward_end(self) -> None:
        """Refuse to step by a gradient whose two passes saw different things."""
        if self._drift is not None and not float(self._drift) <= DRIFT:
            raise UserError(
                "contrastive: batch=global runs each forward twice, and the second gave other"
                f" representations (cosine distance {float(self._drift):.2g}): something draws random numbers"
                " outside torch's seeded generators, or changes the model between; use batch=micro"
            )

    @hookimpl
    def on_log(self, record: dict[str, Any]) -> None:
        """At step 1, how much the term weighs beside the task's: `reduction=sum` makes this large."""
        mine, task = record.get("loss/contrastive"), record.get("loss/task")
        if record["step"] == 1 and mine is not None and task and self.weight < 1:
            record["contrastive/ratio"] = self.weight * mine / ((1 - self.weight) * task)


def _labels(batch: Batch) -> Tensor:
    """One class a row, on the CPU; `ABSENT` for a filler.

    Raises:
        UserError: labels that are no classes, or not one a row.
    """
    labels, rows = batch["labels"], len(batch["input_ids"])
    if labels.is_floating_point() or labels.shape != (rows,):
        kind = "numbers (regression)" if labels.ndim == 1 and len(labels) == rows else "several labels a row"
        raise UserError(_no_classes(kind))
    return torch.full((rows,), ABSENT) if batch.is_filler else labels.cpu().long()


def _no_classes(what: str) -> str:
    return (
        f"contrastive needs one class a row, and this task has {what}: rows are pulled together where their"
        " class is the same, which it does not say"
    )


def _warn(text: str) -> None:
    if world_size() == 1 or dist.get_rank() == 0:
        # Not by `logging`: the command line's set-up of it shows errors alone.
        print(f"warning: contrastive: {text}", file=sys.stderr, flush=True)
