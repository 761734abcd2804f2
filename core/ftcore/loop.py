"""The training loop. It knows steps, micro-batches and loss terms; not models, tasks or devices.

    for each optimiser step:
        choose its rows, split them over ranks and micro-batches, count units over all of them
        for each micro-batch: forward, loss terms, normalise, backward
        sum gradients over ranks, regularise, clip, step
        now and then: log, evaluate, save

Core alone normalises: L = Σ weight · sum / N(unit), with N counted before any forward. So the
gradient is one number for every split of the same rows.
"""

from __future__ import annotations

import contextlib
import math
import resource
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ftcore import checkpoint
from ftcore.batches import micro_batches
from ftcore.contract import Batch, LossTerm, Sampler, Shard, Step
from ftcore.errors import TrainingError, UserError
from ftcore.evaluation import averaged, predict, score
from ftcore.job import Job, Progress
from ftcore.optim import lr_factor
from ftcore.results import append_metrics, keep_predictions
from ftcore.seeding import seed_global

__all__ = ["run_step", "train"]


def train(job: Job) -> None:
    """Train to the end of the run, from wherever `job.progress` stands.

    Raises:
        Interrupted: asked to stop; the state is saved.
        TrainingError: a loss or gradient that is not finite; the weights are as before that step.
    """
    cfg, progress = job.cfg, job.progress
    sampler = job.hooks.build_sampler(job.prepared.splits["train"], cfg.train.batch_size, cfg.seed)
    total = cfg.total_steps(sampler.steps_per_epoch)
    eval_every = cfg.train.eval_every or sampler.steps_per_epoch
    save_every = cfg.train.save_every or sampler.steps_per_epoch
    job.strategy.model.train()
    job.hooks.on_train_start(job.state(total))
    job.screen.start(progress.step, total)
    clock = Clock(progress)
    while True:
        at_end = progress.step == total
        if progress.step and (at_end or progress.step % eval_every == 0):
            with clock.paused():
                if _evaluate(job, at_end):
                    _stop(job, clock)
        if cfg.train.early_stop and progress.evaluations_since_best >= cfg.train.early_stop:
            job.screen.line(f"early stop: nothing better since {progress.best_weights}")
            at_end = True
        if job.pruned:
            return
        if progress.step and (at_end or progress.step % save_every == 0):
            with clock.paused():
                _save(job, clock)
        if at_end:
            return
        started = time.perf_counter()
        record = run_step(job, sampler, total)
        job.step_seconds += time.perf_counter() - started
        job.steps += 1
        progress.step += 1
        job.hooks.on_step_end(job.state(total))
        if progress.step % cfg.train.log_every == 0 or progress.step in (1, total):
            _log(job, record, clock)
        if record["stop"]:
            _stop(job, clock)


def run_step(job: Job, sampler: Sampler, total: int) -> dict[str, Any]:
    """One optimiser step; returns its record (tensors not read yet) and `stop`, agreed by all ranks."""
    cfg, hooks, strategy, progress = job.cfg, job.hooks, job.strategy, job.progress
    epoch, within = divmod(progress.step, sampler.steps_per_epoch)
    step = Step(
        index=progress.step, total=total, epoch=epoch, seed=cfg.seed, run_forward=partial(_forward, job)
    )
    batches = micro_batches(job, sampler(epoch, within), epoch)
    units, stop = _count(job, batches)
    hooks.on_step_start(strategy.model, batches, step)
    terms: dict[str, Tensor | None] = {}
    loss = torch.zeros((), device=strategy.device)
    for batch in batches:
        outputs = step.forward(batch)
        answer = hooks.compute_loss(strategy.model, batch, outputs, step)
        share = _weigh(answer, units, batch.is_filler, terms)
        strategy.backward(share, last=batch is batches[-1])
        loss = loss + share.detach()
    hooks.on_backward_end(strategy.model, step)
    strategy.finish_gradients()
    lr = cfg.optim.lr * lr_factor(cfg.optim, step.index, total)
    penalty = _on_weights(job, step, lr, terms)
    grad_norm = strategy.clip(cfg.train.max_grad_norm)
    # fp16 gradients may overflow: the step is skipped and the scale lowered. A loss may never.
    if not math.isfinite(float(loss if cfg.train.precision == "fp16" else loss + grad_norm)):
        raise TrainingError(_not_finite(job, float(loss), float(grad_norm), terms, batches))
    if not strategy.step(lr):
        progress.skipped += 1
    progress.examples += int(units["examples"])
    progress.tokens += int(units["tokens"])
    return {
        "loss": (loss, penalty),
        "terms": terms,
        "grad_norm": grad_norm,
        "lr": lr,
        "epoch": (progress.step + 1) / sampler.steps_per_epoch,
        "logged": step.logged,
        "stop": stop,
    }


def _forward(job: Job, batch: Batch, step: Step) -> Any:
    """The model's outputs for one micro-batch, as often as asked: a second pass draws what the first did."""
    step.micro_batch = batch.micro_batch
    # What dropout draws depends on the micro-batch alone: resuming needs no saved state.
    seed_global(job.strategy.device, job.cfg.seed, "step", step.index, batch.micro_batch)
    return job.hooks.forward(job.strategy.model, batch.to(job.strategy.device), step)


def _count(job: Job, batches: list[Batch]) -> tuple[dict[str, float], bool]:
    """N of every unit over all micro-batches and ranks, and whether any rank was asked to stop."""
    local: dict[str, float] = {}
    for batch in batches:
        for unit, count in job.hooks.count_units(batch).items():
            local[unit] = local.get(unit, 0.0) + (0.0 if batch.is_filler else count)
    *counts, stop = job.strategy.all_sum([*local.values(), float(job.stop.code)])
    return {**dict(zip(local, counts, strict=True)), "step": 1.0}, stop > 0


def _weigh(
    answer: dict[str, LossTerm],
    units: dict[str, float],
    is_filler: bool,
    terms: dict[str, Tensor | None],
) -> Tensor:
    """Σ weight · sum / N of one micro-batch; adds each term's unweighted share to `terms`.

    A term of which the step has no unit (N = 0) contributes nothing and is None in `terms`.
    """
    total: Tensor | None = None
    for name, term in answer.items():
        if term.unit not in units:
            raise UserError(
                f"loss term '{name}' has the unit '{term.unit}', which nothing counts; "
                f"there are: {', '.join(units)}"
            )
        count = units[term.unit]
        if count == 0 and name == "task":
            raise TrainingError(f"a step has no {term.unit} to train on; look at the data's labels")
        share = term.sum / count if count else term.sum * 0.0
        if is_filler:
            share = share * 0.0
        elif count:
            logged, before = (share if term.value is None else term.value).detach(), terms.get(name)
            terms[name] = logged if before is None else before + logged
        else:
            terms.setdefault(name, None)
        total = share * term.weight if total is None else total + share * term.weight
    assert total is not None
    return total


def _on_weights(job: Job, step: Step, lr: float, terms: dict[str, Tensor | None]) -> Tensor | None:
    """Penalties on the weights and their gradients, then `on_gradients`; nothing where no plugin asks."""
    hooks, strategy = job.hooks, job.strategy
    penalizes, on_gradients = hooks.implemented("regularize"), hooks.implemented("on_gradients")
    if not penalizes and not on_gradients:
        return None
    shards, total = strategy.shards(), None
    if penalizes:
        total = _regularize(job, shards, step, terms)
    # A step that fp16's overflow is about to skip must leave the weights alone.
    if on_gradients and (job.cfg.train.precision != "fp16" or math.isfinite(float(strategy.clip(None)))):
        hooks.on_gradients(shards, lr, step)
    strategy.sync_shards()
    return total


def _regularize(job: Job, shards: list[Shard], step: Step, terms: dict[str, Tensor | None]) -> Tensor | None:
    """The sum of this rank's penalties; their gradients are added to the shards'."""
    values = [shard.value.requires_grad_(True) for shard in shards]
    penalties = job.hooks.regularize(shards, step)
    total = torch.stack(list(penalties.values())).sum() if penalties else None
    found = torch.autograd.grad(total, values, allow_unused=True) if total is not None else ()
    for shard in shards:
        shard.value = shard.value.detach()
    for shard, grad in zip(shards, found, strict=False):
        if grad is not None and shard.grad is not None:
            shard.grad += grad
    terms.update({name: value.detach() for name, value in penalties.items()})
    return total if total is None else total.detach()


def _log(job: Job, record: dict[str, Any], clock: Clock) -> None:
    """Write a training record; the only place where tensors of a step are read."""
    loss, penalty = record["loss"]
    mine = {f"loss/{n}": None if v is None else float(v) for n, v in sorted(record["terms"].items())}
    mine["loss"] = float(loss) + (0.0 if penalty is None else float(penalty))
    losses: dict[str, float | None] = {"loss": None}
    for part in job.strategy.gather(mine):  # each rank has the share of its own micro-batches
        for name, value in part.items():
            before = losses.get(name)
            losses[name] = value if before is None else before + (value or 0.0)
    line = {
        "step": job.progress.step,
        "epoch": round(record["epoch"], 4),
        **losses,
        "grad_norm": float(record["grad_norm"]),
        "lr": record["lr"],
        "tokens_per_second": clock.tokens_per_second(),
        "memory_mb": _memory_mb(job.strategy.device),
        **{name: float(value) for name, value in record["logged"].items()},
    }
    if job.progress.skipped:
        line["skipped_fp16_overflow"] = job.progress.skipped
    if job.strategy.rank == 0:
        job.hooks.on_log(line)
        append_metrics(job.run_dir, line)
    job.screen.step(line)


def _memory_mb(device: torch.device) -> float:
    """Peak memory so far, in MB: of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3  # bytes there, KiB here


def _not_finite(
    job: Job, loss: float, grad_norm: float, terms: dict[str, Tensor | None], batches: list[Batch]
) -> str:
    """What is wrong, of the rank whose loss it is; a norm that is not finite is so on all ranks."""
    values = ", ".join(f"{name} {float(value):g}" for name, value in terms.items() if value is not None)
    rows = [row for batch in batches if not batch.is_filler for row in batch.rows]
    mine = f"loss terms on rank {job.strategy.rank}: {values}; training rows {rows[:32]}"
    found = [(loss, mine)]
    if job.cfg.train.precision != "fp16" and not math.isfinite(grad_norm):
        found = job.strategy.gather((loss, mine))
    said = next((text for value, text in found if not math.isfinite(value)), mine)
    return (
        f"step {job.progress.step + 1}: the loss or its gradient is not finite ({said}); the weights are as"
        " before this step. Try a lower optim.lr, or train.precision=fp32"
    )


def _evaluate(job: Job, at_end: bool) -> bool:
    """Evaluate on validation data unless this step's evaluation is done; keep the best weights.

    Asks plugins whether to go on where it is not the end, and notes their reason in `job.pruned`.

    True where the run was asked to stop meanwhile; the resumed run evaluates again.
    """
    progress = job.progress
    if "validation" not in job.prepared.splits or progress.evaluated == progress.step:
        return False
    with averaged(job):
        predictions = predict(job, "validation")
        if predictions is None:
            return True
        metrics = score(job, predictions, "validation", "eval")
        progress.evaluated = progress.step
        is_best = _is_best(job, metrics)
        progress.evaluations_since_best += 1
        if is_best:
            progress.best, progress.evaluations_since_best = metrics, 0
            progress.best_weights = f"best-{progress.step}"
            best = job.checkpoints / progress.best_weights
            job.save(best, values_only=True)
            keep_predictions(job, predictions, "validation", best)
    if job.strategy.rank == 0:
        line = {"step": progress.step, **metrics}
        job.hooks.on_log(line)
        append_metrics(job.run_dir, line)
    job.screen.evaluation(progress.step, metrics, is_best)
    if not at_end and job.hooks.implemented("should_stop"):
        record = {"step": progress.step, **metrics}
        reason = job.hooks.should_stop(record, job.metric) if job.strategy.rank == 0 else ""
        job.pruned = job.strategy.gather(reason)[0]
    return False


def _is_best(job: Job, metrics: dict[str, float]) -> bool:
    name, sign = job.metric.lstrip("-"), -1.0 if job.metric.startswith("-") else 1.0
    if f"eval/{name}" not in metrics:
        known = ", ".join(k.removeprefix("eval/") for k in metrics)
        raise UserError(f"task.metric: no metric '{name}'; there are: {known}")
    if not job.progress.best:
        return True
    best = job.progress.best[f"eval/{name}"]
    return math.isnan(best) or sign * metrics[f"eval/{name}"] > sign * best


def _save(job: Job, clock: Clock) -> None:
    """Write `checkpoints/step-N` unless this run has, and delete what `keep_last` does not keep."""
    if job.saved == job.progress.step:
        return
    job.progress.seconds = clock.seconds()
    job.save(job.checkpoints / f"step-{job.progress.step}")
    job.saved = job.progress.step
    if job.strategy.rank == 0:
        checkpoint.prune(job.checkpoints, job.cfg.train.keep_last)


def _stop(job: Job, clock: Clock) -> None:
    """Save and leave; all ranks get here at the same step."""
    _save(job, clock)
    job.interrupted()


class Clock:
    """Time of the run, and of training alone since the last record."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._started = time.monotonic() - progress.seconds
        self._lap_started, self._lap_tokens = time.monotonic(), progress.tokens

    def seconds(self) -> float:
        """Seconds of the whole run, earlier parts of a resumed one included."""
        return time.monotonic() - self._started

    def tokens_per_second(self) -> float:
        """Trained tokens a second since the last call, evaluations and saves left out."""
        now, tokens = time.monotonic(), self._progress.tokens
        rate = (tokens - self._lap_tokens) / max(now - self._lap_started, 1e-9)
        self._lap_started, self._lap_tokens = now, tokens
        return round(rate, 1)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of `tokens_per_second`."""
        before = time.monotonic()
        yield
        self._lap_started += time.monotonic() - before
