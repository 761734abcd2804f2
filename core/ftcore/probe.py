"""One step seen from outside all plugins, in this process or on ranks (`python -m ftcore.probe FOLDER`).

It knows how to look, and nothing of what should be seen: `proofs` compares.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import math
import os
import shutil
import sys
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor

from ftcore.config import Config
from ftcore.contract import Batch, Shard
from ftcore.errors import TrainingError, UserError
from ftcore.job import Job, open_job
from ftcore.launch import launch
from ftcore.loop import run_step
from ftcore.plugins import Enabled, hookimpl, plugin
from ftcore.run import read_config
from ftcore.screen import Screen
from ftcore.seeding import generator
from ftcore.signals import StopFlag
from ftcore.strategies import base_model

__all__ = ["Probe", "Seen", "Witness", "extra", "merge", "observe", "observe_ranks", "silent", "write_config"]


@dataclass(kw_only=True)
class Seen:
    """What one optimiser step did: a rank's part, or by `merge` the whole.

    Attributes:
        sums: of each loss term that is additive, over micro-batches.
        units: unit of each of these terms.
        counts: of each unit, over micro-batches.
        penalties: of `regularize`.
        others: terms that are not additive: no claim is made for them.
        grad, value: flat parts of parameters as `on_gradients` left them, with their offset.
    """

    sums: dict[str, float] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    penalties: dict[str, float] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    micro_batches: int = 0
    grad: dict[str, tuple[int, Tensor]] = field(default_factory=dict)
    value: dict[str, tuple[int, Tensor]] = field(default_factory=dict)

    def terms(self) -> dict[str, float]:
        """Each loss term divided by its count, and each penalty, as they enter the loss (unweighted)."""
        counts = {**self.counts, "step": 1.0}
        shares = {name: total / (counts.get(self.units[name]) or 1.0) for name, total in self.sums.items()}
        return shares | self.penalties


def merge(parts: Sequence[Seen]) -> Seen:
    """The whole step from what its ranks saw."""
    whole = Seen(micro_batches=sum(p.micro_batches for p in parts), others=parts[0].others)
    for part in parts:
        whole.units |= part.units
        for name in ("sums", "counts", "penalties"):
            into = getattr(whole, name)
            for key, number in getattr(part, name).items():
                into[key] = into.get(key, 0.0) + number
    for kind in ("grad", "value"):
        for name in getattr(parts[0], kind):
            pieces = sorted((getattr(p, kind)[name] for p in parts), key=lambda piece: piece[0])
            getattr(whole, kind)[name] = (0, torch.cat([tensor for _, tensor in pieces]))
    return whole


@plugin()
class Probe:
    """Record a step from outside all other plugins; terms that are not additive are left out of the loss.

    With `hide`, the model's parameters are empty while hooks work on shards, as they are under ZeRO-3.
    """

    hide: bool = False

    def __post_init__(self) -> None:
        self.seen = Seen()
        self._model: torch.nn.Module | None = None
        self._hidden: list[tuple[torch.nn.Parameter, Tensor, Tensor | None]] = []

    @hookimpl
    def on_step_start(self, model: torch.nn.Module) -> None:
        self._model = model

    @hookimpl(wrapper=True, tryfirst=True)
    def count_units(self, batch: Batch) -> Generator[None, Any, Any]:
        answers = yield
        if not batch.is_filler:
            self.seen.micro_batches += 1
            for name, number in (item for answer in answers or () for item in answer.items()):
                self.seen.counts[name] = self.seen.counts.get(name, 0.0) + number
        return answers

    @hookimpl(wrapper=True, tryfirst=True)
    def compute_loss(self, batch: Batch) -> Generator[None, Any, Any]:
        terms = yield
        for name, term in (terms or {}).items():
            if not term.additive:
                term.weight = 0.0
                self.seen.others = sorted({*self.seen.others, name})
            elif not batch.is_filler:
                self.seen.units[name] = term.unit
                self.seen.sums[name] = self.seen.sums.get(name, 0.0) + float(term.sum.detach())
        return terms

    @hookimpl(wrapper=True, tryfirst=True)
    def regularize(self) -> Generator[None, Any, Any]:
        for param in self._model.parameters() if self.hide and self._model else ():
            self._hidden.append((param, param.data, param.grad))
            param.grad, param.data = None, torch.empty(0)
        answers = yield
        for name, number in (item for answer in answers or () for item in answer.items()):
            self.seen.penalties[name] = float(number.detach())
        return answers

    @hookimpl(trylast=True)
    def on_gradients(self, shards: Sequence[Shard]) -> None:
        while self._hidden:
            param, data, grad = self._hidden.pop()
            param.data, param.grad = data, grad
        for shard in shards:
            if shard.grad is not None:
                self.seen.grad[shard.name] = (shard.offset, shard.grad.detach().cpu().clone())
            self.seen.value[shard.name] = (shard.offset, shard.value.detach().cpu().clone())


def observe(cfg: Config, run_dir: Path, *, hide: bool = False) -> Seen:
    """This rank's part of a step in mid-training, without dropout, away from the pretrained weights."""
    cfg.model.dropout = 0.0
    run_dir.mkdir(parents=True, exist_ok=True)  # plugins write there
    probe = Probe(hide=hide)
    job = open_job(cfg, run_dir, silent, StopFlag(), [extra("probe", probe)])
    try:
        sampler = job.hooks.build_sampler(job.prepared.splits["train"], cfg.train.batch_size, cfg.seed)
        _displace(job)
        for module in job.strategy.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # a plugin's own too: each split draws other masks
        total = cfg.total_steps(sampler.steps_per_epoch)
        job.progress.step = total // 2
        job.strategy.model.train()
        with contextlib.redirect_stdout(io.StringIO()):
            job.hooks.on_train_start(job.state(total))
            run_step(job, sampler, total)
    finally:
        job.strategy.close()
    return probe.seen


def _displace(job: Job) -> None:
    """Add the same noise to the weights whatever the strategy, so that a pull to them is not zero."""
    shards = job.strategy.shards()
    for shard in shards:
        numel = math.prod(shard.shape)
        noise = torch.randn(numel, generator=generator(0, "displace", shard.name)) * 0.01
        shard.value += noise[shard.offset : shard.offset + shard.value.numel()].to(shard.value.device)
    job.strategy.sync_shards()


def extra(name: str, instance: Any) -> Enabled:
    return Enabled(name=name, instance=instance, distribution="", version="", options={})


def silent(shown: bool) -> Screen:
    return Screen(False)


@plugin()
class Witness:
    """Keep the last batch that was predicted, and its logits under the weights of that evaluation."""

    def __post_init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.logits = torch.empty(0)

    @hookimpl(wrapper=True, tryfirst=True)
    def predict(self, model: torch.nn.Module, batch: Batch) -> Generator[None, Any, Any]:
        answer = yield
        base = base_model(model)
        taken = inspect.signature(base.forward).parameters.keys() - {"labels"}
        if "attention_mask" not in batch:  # packed rows, which plain transformers would keep apart or not
            taken -= {"position_ids"}
        inputs = {k: v for k, v in batch.items() if k in taken}  # a plugin's batch may hold more
        if base.config.is_encoder_decoder and batch["labels"].ndim == 2:
            inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(batch["labels"])
        self.logits = model(**inputs).logits.float().cpu().contiguous()
        self.inputs = {k: v.cpu().contiguous() for k, v in inputs.items()}
        return answer


def write_config(cfg: Config, folder: Path) -> None:
    """Save a config as a run's directory has it."""
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(asdict(cfg)), folder / "config.yaml")


# Ranks: `python -m ftcore.probe FOLDER`, started by `launch`.


def observe_ranks(
    many: Sequence[Config], folder: Path, *, hide: Sequence[bool], on_cpu: bool
) -> tuple[list[list[Seen]], str]:
    """What each of two ranks sees of the step of each config, up to one that fails; and how it failed.

    `hide` says for each whether its parameters are hidden from hooks that work on shards.
    """
    shutil.rmtree(folder, ignore_errors=True)
    write_config(many[0], folder)
    for number, (cfg, hidden) in enumerate(zip(many, hide, strict=True)):
        write_config(cfg, folder / str(number))
        (folder / str(number) / "hide").write_text(str(int(hidden)))
    failed = ""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the error is returned
            launch(2, folder, "ftcore.probe", {"CUDA_VISIBLE_DEVICES": ""} if on_cpu else None)
    except (UserError, TrainingError) as error:
        failed = str(error)
    parts = [[folder / str(n) / f"seen-{rank}" for rank in range(2)] for n in range(len(many))]
    seen = [p for p in parts if all(one.with_suffix(".json").is_file() for one in p)]
    return [[_read(one) for one in p] for p in seen], failed


def _rank(cfg: Config, run_dir: Path, stop: StopFlag) -> None:
    torch.set_num_threads(1)
    folders = sorted(file.parent for file in run_dir.glob("*/config.yaml"))
    for folder in folders:
        hide = (folder / "hide").read_text() == "1"
        _write(folder / f"seen-{os.environ['RANK']}", observe(read_config(folder), folder, hide=hide))


def _write(path: Path, seen: Seen) -> None:
    tensors = {f"{kind}/{n}": t for kind in ("grad", "value") for n, (_, t) in getattr(seen, kind).items()}
    save_file(tensors, path.with_suffix(".safetensors"))
    plain = {k: v for k, v in vars(seen).items() if k not in ("grad", "value")}
    offsets = {kind: {n: o for n, (o, _) in getattr(seen, kind).items()} for kind in ("grad", "value")}
    path.with_suffix(".json").write_text(json.dumps({"plain": plain, "offsets": offsets}))


def _read(path: Path) -> Seen:
    written, tensors = (
        json.loads(path.with_suffix(".json").read_text()),
        load_file(path.with_suffix(".safetensors")),
    )
    parts: dict[str, Any] = {
        k: {n: (o, tensors[f"{k}/{n}"]) for n, o in of.items()} for k, of in written["offsets"].items()
    }
    return Seen(**written["plain"], **parts)


if __name__ == "__main__":
    from ftcore.worker import main

    code = main(Path(sys.argv[1]), _rank)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as `ftcore.worker` does
