"""Proofs that a plugin is scaled right and starts again right: small runs, and what differs between them.

`ftcore check` prints them for a config, `ftcore.testing` asserts them for a plugin. Each returns a
`Proof`: what was compared, the largest difference, and, where that is too much, the reason.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ftcore.checkpoint import Checkpoint
from ftcore.config import Config, FilesData, TrainerConfig
from ftcore.errors import Interrupted, TrainingError, UserError
from ftcore.job import build_hooks, open_job
from ftcore.plugins import Enabled
from ftcore.probe import Seen, Witness, extra, merge, observe, observe_ranks, silent, write_config
from ftcore.run import train_here
from ftcore.signals import REQUEUE, StopFlag
from ftcore.tasks import TASKS

__all__ = [
    "Proof",
    "export_proof",
    "off_proof",
    "precision_proof",
    "rank_proof",
    "repeat_proof",
    "resume_proof",
    "small",
    "split_proof",
    "state_proof",
]

ROWS = 8  # of the step whose gradient is compared
STEPS = 4  # of a whole run
ALLOWED = 1e-4  # relative; fp32 sums in another order differ by some 1e-6
RANKS = f"a step of {ROWS} rows on one rank and on two (3+3+2), weights in shards"
MEASURED = ("tokens_per_second", "memory_mb")  # of a record: differs from one run to the same again


@dataclass(frozen=True, kw_only=True)
class Proof:
    """One comparison. `difference` is relative, the largest of all; `reason` is empty where it holds."""

    name: str
    compared: str
    difference: float = 0.0
    allowed: float = 0.0
    reason: str = ""

    @property
    def ok(self) -> bool:
        return not self.reason


def small(cfg: Config, **train: Any) -> Config:
    """`cfg` for a proof: four steps of eight rows, fp32; `train` sets other keys of `train`."""
    made = copy.deepcopy(cfg)
    made.force = False
    values: dict[str, Any] = {
        "batch_size": ROWS,
        "micro_batch_size": ROWS,
        "steps": STEPS,
        "precision": "fp32",
        "eval_every": 2,
        "save_every": 1,
        "log_every": 1,
        "keep_last": STEPS,
        "early_stop": None,
        "keep": "resume",
        "resume": True,
    }
    for key, value in {**values, **train}.items():
        setattr(made.train, key, value)
    return made


# What differs.


def _apart(one: Mapping[str, tuple[int, Tensor]], other: Mapping[str, tuple[int, Tensor]]) -> float:
    """L2 norm of the difference over that of `one`, over all parameters."""
    if one.keys() != other.keys() or any(one[n][1].shape != other[n][1].shape for n in one):
        return float("inf")
    apart = sum(float((one[n][1].double() - other[n][1].double()).square().sum()) for n in one)
    norm = sum(float(one[n][1].double().square().sum()) for n in one)
    return float((apart / (norm or 1.0)) ** 0.5)


def _judge(name: str, compared: str, one: Seen, other: Seen, *, ranks: bool) -> Proof:
    """Whether two ways to make the same step agree, and what is wrong where they do not."""
    differences, worst = {}, ""
    for term, value in one.terms().items():
        got = other.terms().get(term, float("nan"))
        apart = abs(value - got) / max(abs(value), abs(got), 1e-6) if got == got else float("inf")
        differences[f"term {term}"] = apart
    differences["gradient"] = _apart(one.grad, other.grad)
    differences["weights"] = _apart(one.value, other.value)
    worst = max(differences, key=lambda key: differences[key])
    largest, reason = differences[worst], ""
    off = [key for key, value in differences.items() if not value <= ALLOWED]
    if off:
        # What is said first explains most: a wrong term makes a wrong gradient.
        reason = _explain(off[0].removeprefix("term "), one, other, ranks)
    claimed = f"; no claim for {', '.join(one.others)} (additive=False)" if one.others else ""
    return Proof(name=name, compared=compared + claimed, difference=largest, allowed=ALLOWED, reason=reason)


def _explain(key: str, one: Seen, other: Seen, ranks: bool) -> str:
    values, got = one.terms(), other.terms()
    if key in one.penalties:
        return (
            f"penalty '{key}' is {values[key]:g} on one rank and {got.get(key, 0.0):g} on two: a shard is one"
            " rank's part of a parameter, not the whole; only sums over elements of shard.value add up"
        )
    if key in one.sums:
        if key not in got or not values[key]:
            return f"loss term '{key}' is not there however the step is split"
        ratio, batches = got[key] / values[key], other.micro_batches / one.micro_batches
        if abs(ratio / batches - 1) < 0.25:
            return (
                f"loss term '{key}' is {ratio:.3g} times as large in {other.micro_batches} micro-batches:"
                f" its sum is a mean over the micro-batch; give the sum over {one.units[key]}, core divides"
                " by their number"
            )
        return (
            f"loss term '{key}' is {values[key]:g} in {one.micro_batches} micro-batch and {got[key]:g} in"
            f" {other.micro_batches}: it is no sum over {one.units[key]}, or is drawn at random by the"
            " micro-batch (use step.row_generator); where rows of one interact, say additive=False"
        )
    if ranks:
        return (
            "the terms agree and the gradient does not: on two ranks a hook read a shard (flat, this rank's"
            " part, from shard.offset) as if it were the whole parameter, or changed a rank's gradient alone"
        )
    return (
        "the terms agree and the gradient does not: something that is random, kept or changed goes by the"
        " micro-batch, not by the step or the row"
    )


# The proofs.


def split_proof(cfg: Config, folder: Path) -> Proof:
    """The same rows at once, in three unequal micro-batches, and one by one, are one gradient.

    A plugin may refuse micro-batches of one row, which contrast with nothing: then the others are compared.
    """
    whole = observe(small(_plain(cfg)), folder)
    proofs: list[Proof] = []
    at_once = f"a step of {ROWS} rows at once"
    for size, shape in ((3, "3+3+2"), (1, "1 by 1")):
        try:
            part = merge([observe(small(_single(cfg), micro_batch_size=size), folder)])
        except UserError:
            if size > 1:
                raise
            return replace(proofs[0], compared=f"{proofs[0].compared}; {shape} is refused")
        proofs.append(_judge("micro-batches", f"{at_once} and {shape}", whole, part, ranks=False))
    return next((p for p in proofs if not p.ok), max(proofs, key=lambda p: p.difference))


def rank_proof(cfg: Config, folder: Path, trainers: Sequence[Mapping[str, Any] | None] = (None,)) -> Proof:
    """The same rows on two ranks, with unequal micro-batches and weights in shards, are one gradient.

    `trainers` are nodes of strategies, each tried on the same two processes: the first that does not hold
    is returned, else the one that differs most. None is ddp on the CPU, whose parameters are hidden from
    hooks that work on shards, as ZeRO-3's are. All is on the CPU where there are no two GPUs.

    Raises:
        UserError: a strategy and a plugin are declared not to combine.
    """
    on_cpu = torch.cuda.device_count() < 2
    many = [_on_two_ranks(cfg, trainer) for trainer in trainers]
    devices = ["cpu" if on_cpu or trainer is None else None for trainer in trainers]
    whole = {device: observe(small(_plain(cfg, device)), folder) for device in dict.fromkeys(devices)}
    hide = [trainer is None for trainer in trainers]
    seen, error = observe_ranks(many, folder / "ranks", hide=hide, on_cpu=on_cpu)
    proofs = [
        _judge(_name(made), RANKS, whole[device], merge(parts), ranks=True)
        for made, device, parts in zip(many, devices, seen, strict=False)
    ]
    if error:
        why = f"{error}; a shard is flat and one rank's part of a parameter, from shard.offset"
        name = _name(many[len(seen)])
        proofs.append(Proof(name=name, compared=RANKS, difference=float("inf"), reason=why))
    bad = next((n for n, proof in enumerate(proofs) if not proof.ok), None)
    if bad is None:
        return max(proofs, key=lambda proof: proof.difference)
    if hide[bad] and not proofs[bad].reason.startswith("loss term"):
        seen, error = observe_ranks([many[bad]], folder / "ranks", hide=[False], on_cpu=on_cpu)
        if not error and _judge("", RANKS, whole["cpu"], merge(seen[0]), ranks=True).ok:
            why = "a hook reads the model's parameters where it has shards: under ZeRO-3 they are empty there"
            return replace(proofs[bad], reason=why)
    return proofs[bad]


def _on_two_ranks(cfg: Config, trainer: Mapping[str, Any] | None) -> Config:
    """A small run on two ranks; None is ddp on the CPU."""
    made = small(cfg, micro_batch_size=3)
    ddp = TrainerConfig(strategy="ddp", device="cpu", devices=2)
    made.trainer = ddp if trainer is None else {**trainer, "devices": 2}
    build_hooks(made)  # refuses what does not combine
    return made


def _name(cfg: Config) -> str:
    """`ranks (ddp)`, `ranks (deepspeed, stage 2)`."""
    if not isinstance(cfg.trainer, dict):
        return f"ranks ({cfg.trainer.strategy})"
    stage = f", stage {cfg.trainer['stage']}" if "stage" in cfg.trainer else ""
    return f"ranks ({cfg.trainer['strategy']}{stage})"


def repeat_proof(cfg: Config, folder: Path) -> Proof:
    """Two runs one after another in a process are the same bit for bit, and leave nothing behind in it."""
    before = _module_state(cfg)
    first = _whole(cfg, folder / "first")
    between = _module_state(cfg)
    second = _whole(cfg, folder / "second")
    after = _module_state(cfg)
    proof = _same("repeat", f"two runs of {STEPS} steps in one process, bit for bit", first, second)
    if changed := [
        n for n, value in after.items() if {before.get(n, value), between.get(n, value)} != {value}
    ]:
        why = (
            f"{', '.join(changed)} keeps state at module level, which the next job of a sweep finds:"
            " keep it in the instance (self), which each run has anew"
        )
        return replace(proof, reason=why)
    if not proof.ok:
        why = (
            f"{proof.reason}: something is random outside the seed; use step.generator(name) or"
            " step.row_generator(name, row)"
        )
        return replace(proof, reason=why)
    return proof


def resume_proof(cfg: Config, folder: Path) -> Proof:
    """A run that was stopped and resumed by fresh objects equals one that was not, bit for bit."""
    whole = _whole(cfg, folder / "whole")
    cut = folder / "cut"
    write_config(small(_single(cfg)), cut)
    with contextlib.suppress(Interrupted):
        _train(small(_single(cfg)), cut, StopAfter(cut / "checkpoints" / "step-1"))
    if (cut / "result.json").is_file():
        raise AssertionError("the run was not stopped")
    resumed = _whole(cfg, cut)
    compared = f"{STEPS} steps, stopped after 2 and resumed, bit for bit"
    proof = _same("resume", compared, whole, resumed)
    if not proof.ok:
        why = (
            f"{proof.reason}: what a later step needs and the seed does not give goes into state_dict and"
            " load_state_dict"
        )
        return replace(proof, reason=why)
    return proof


def state_proof(cfg: Config, folder: Path, name: str) -> Proof:
    """A fresh instance that was given the saved state has that state."""
    compared = "state_dict after load_state_dict, and what the checkpoint holds"
    _train(small(_single(cfg)), folder)
    saved = Checkpoint(folder / "checkpoints" / f"step-{STEPS}").plugin_state(name)
    job = open_job(small(_single(cfg)), folder, silent, StopFlag())
    try:
        instance = next(p.instance for p in job.hooks.plugins if p.name == name)
        if saved is None:
            return Proof(name="state", compared="it has none")
        state = instance.state_dict()
        # As a checkpoint holds it: JSON knows no tuples, and no keys but strings.
        state = {k: v if isinstance(v, Tensor) else json.loads(json.dumps(v)) for k, v in state.items()}
        bad = [k for k in saved.keys() | state.keys() if _print(saved.get(k)) != _print(state.get(k))]
    finally:
        job.strategy.close()
    why = f"state '{bad[0]}' is not the same after load_state_dict" if bad else ""
    return Proof(name="state", compared=compared, difference=float(len(bad)), reason=why)


def off_proof(off: Config, without: Config, folder: Path) -> Proof:
    """A technique switched off, and the run without it, are the same bit for bit in all that both have."""
    compared = f"{STEPS} steps with it switched off and without it, bit for bit"
    return _same(
        "off", compared, _whole(off, folder / "off"), _whole(without, folder / "without"), shared=True
    )


def precision_proof(cfg: Config, folder: Path, precision: str = "bf16") -> Proof:
    """Losses and weights are finite in a lower precision."""
    proof = Proof(name=precision, compared=f"{STEPS} steps in {precision} are finite")
    try:
        _train(small(_single(cfg), precision=precision), folder)
    except TrainingError as error:
        return replace(proof, difference=float("inf"), reason=str(error))
    return proof


RELOAD = """
import sys
sys.modules["ftcore"] = None  # any import of it fails
folder, name, inputs, out = sys.argv[1:]
import torch, transformers
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
model, found = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
missing = sorted(found["missing_keys"])
assert not missing, f"the exported model lacks {missing[:3]}"
with torch.no_grad():
    save_file({"logits": model.eval()(**load_file(inputs)).logits.contiguous()}, out)
"""


def export_proof(cfg: Config, folder: Path) -> Proof:
    """`model/` is loaded by plain transformers in a process without ftcore, and answers as the run did."""
    witness = Witness()
    made = small(_single(cfg), eval_every=STEPS)
    if isinstance(made.data, FilesData) and made.data.validation is None and made.data.split is None:
        made.data.validation = made.data.train  # an evaluation of any rows does
    _train(made, folder, extra=[extra("witness", witness)])
    if not witness.inputs:
        why = "there was no evaluation to compare with: set data.split, or name validation data"
        return Proof(name="export", compared="nothing", difference=float("inf"), reason=why)
    inputs, out = folder / "inputs.safetensors", folder / "logits.safetensors"
    save_file(witness.inputs, inputs)
    name = TASKS[build_hooks(made).cfg.task.name].AUTO_MODEL  # also of `task=auto`
    command = [sys.executable, "-c", RELOAD, str(folder / "model"), name, str(inputs), str(out)]
    ended = subprocess.run(command, capture_output=True, text=True)
    compared = f"logits of model/ in plain {name} and in the run's last evaluation"
    if ended.returncode:
        why = f"model/ does not load without ftcore: {ended.stderr.strip().splitlines()[-1]}"
        return Proof(name="export", compared=compared, difference=float("inf"), reason=why)
    got = load_file(out)["logits"]
    apart = _apart({"logits": (0, witness.logits)}, {"logits": (0, got)})
    why = (
        ""
        if apart <= ALLOWED
        else "the exported model answers otherwise: undo in on_export what the run changed"
    )
    return Proof(name="export", compared=compared, difference=apart, allowed=ALLOWED, reason=why)


# Whole runs, and what they leave.


class StopAfter(StopFlag):
    """A flag that asks to stop once a checkpoint is there."""

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint

    @property
    def code(self) -> int:  # type: ignore[override]
        return REQUEUE if self._checkpoint.is_dir() else 0


def _whole(cfg: Config, folder: Path) -> Path:
    """A whole run in `folder` (or the rest of one); generators outside the seed are left in disorder."""
    made = small(_single(cfg))
    _train(made, folder)
    return folder


def _train(cfg: Config, folder: Path, stop: StopFlag | None = None, extra: Sequence[Enabled] = ()) -> None:
    entropy = int.from_bytes(os.urandom(4), "little")
    random.seed(entropy)
    np.random.seed(entropy)
    torch.manual_seed(entropy)
    write_config(cfg, folder)
    with contextlib.redirect_stdout(io.StringIO()):
        train_here(cfg, folder, stop or StopFlag(), extra)


def _same(name: str, compared: str, one: Path, other: Path, *, shared: bool = False) -> Proof:
    """Whether two finished runs have the same records and the same last checkpoint, bit for bit.

    With `shared`, in what both have: not a loss term or a plugin's state that is in one only.
    """
    records = [_records(folder) for folder in (one, other)]
    first, second = (_saved(folder) for folder in (one, other))
    if shared:
        records = [
            [{k: a[k] for k in a if k in b} for a, b in zip(x, y, strict=True)]
            for x, y in (records, records[::-1])
        ]
        first, second = (
            {k: v for k, v in x.items() if k.startswith(("rank-", "buffers"))} for x in (first, second)
        )
    step = next((a.get("step") for a, b in zip(*records, strict=False) if a != b), None)
    if first.keys() != second.keys():
        names = sorted(first.keys() ^ second.keys())
        return Proof(
            name=name, compared=compared, difference=float("inf"), reason=f"{names[0]} is in one only"
        )
    apart = _apart({k: (0, v) for k, v in first.items()}, {k: (0, v) for k, v in second.items()})
    reason = f"the runs differ from step {step}" if step is not None else ""
    reason = reason or ("the last checkpoints differ" if apart else "")
    return Proof(name=name, compared=compared, difference=apart, reason=reason)


def _records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in MEASURED} for line in lines]


def _saved(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the last checkpoint, and its plain plugin state as bytes."""
    last = folder / "checkpoints" / f"step-{STEPS}"
    found: dict[str, Tensor] = {}
    for file in sorted(last.glob("*.safetensors")):
        found |= {f"{file.stem}/{key}": value.double() for key, value in load_file(file).items()}
    plain = json.dumps(json.loads((last / "state.json").read_text())["plugins"], sort_keys=True)
    digest = hashlib.sha256(plain.encode()).digest()
    return {**found, "state of plugins": torch.tensor([float(byte) for byte in digest])}


def _single(cfg: Config) -> Config:
    """The config in one process: under `single`, or a plugin's strategy that does not start ranks.

    One that has `devices` gets processes of its own, for its library may keep state in one: `rank_proof`.
    """
    starts_ranks = not isinstance(cfg.trainer, dict) or "devices" in cfg.trainer
    return _plain(cfg) if starts_ranks else copy.deepcopy(cfg)


def _plain(cfg: Config, device: str | None = None) -> Config:
    """The config under `single`, whatever its strategy; on `device`, or its own."""
    made = copy.deepcopy(cfg)
    if device is None and isinstance(cfg.trainer, TrainerConfig):
        device = cfg.trainer.device
    made.trainer = TrainerConfig(strategy="single", device=device)
    return made


def _module_state(cfg: Config) -> dict[str, str]:
    """A print of all that the chosen plugins' modules and classes hold, functions aside."""
    from ftcore.plugins import enable

    roots = {type(p.instance).__module__.partition(".")[0] for p in enable(cfg.plugin)}
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in roots or roots & {"ftcore"} or module is None:
            continue
        for owner, values in _owners(name, module):
            for key, value in values.items():
                if not key.startswith("__") and not isinstance(value, FunctionType | ModuleType | type):
                    found[f"{owner}.{key}"] = _print(value)
    return found


def _owners(name: str, module: ModuleType) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The module, and the classes that it defines."""
    yield name, dict(vars(module))
    for key, value in list(vars(module).items()):
        if isinstance(value, type) and value.__module__ == name:
            yield f"{name}.{key}", dict(vars(value))


def _print(value: Any) -> str:
    if isinstance(value, Tensor):
        return hashlib.sha256(
            value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        ).hexdigest()
    if isinstance(value, torch.Generator):
        return _print(value.get_state())
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, random.Random):
        return repr(value.getstate())
    if isinstance(value, Mapping):
        return repr({k: _print(v) for k, v in value.items()})
    if isinstance(value, list | tuple | set | frozenset):
        return repr([_print(v) for v in value])
    return repr(value) if isinstance(value, int | float | str | bytes | bool | None) else str(id(value))
