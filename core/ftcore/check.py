"""`ftcore check`: does this command line's run work, and is what it trains scaled right? In seconds.

First a whole run of a few steps on a few rows of the user's data, then the proofs of `ftcore.proofs`.
"""

from __future__ import annotations

import functools
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore.commands import Parser, parse_run

if TYPE_CHECKING:
    from ftcore.config import Config
    from ftcore.proofs import Proof

__all__ = ["check", "prove"]

SAMPLE = 1024  # training rows


def check(arguments: Sequence[str]) -> int:
    """Prove a command line; exit code 1 where something is off."""
    parser = Parser(
        prog="ftcore check",
        description="Try a run's whole course on a few rows, and prove that its gradient is scaled right.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parse_run(parser, arguments)
    from ftcore.compose import compose

    cfg = compose(options.overrides)
    with tempfile.TemporaryDirectory(prefix="ftcore-check-") as folder:
        proofs = []
        for proof in prove(cfg, Path(folder)):
            proofs.append(proof)
            if not options.json:
                _print(proof, first=len(proofs) == 1)
    if options.json:
        print(json.dumps([{**asdict(p), "ok": p.ok} for p in proofs], indent=2))
    off = sum(not p.ok for p in proofs)
    if not options.json:
        print(f"{len(proofs)} proofs, {off} off" if off else f"{len(proofs)} proofs hold")
    return 1 if off else 0


def prove(cfg: Config, folder: Path) -> Iterator[Proof]:
    """Each proof as it is made; one that ends in an error is off, with that for a reason.

    Raises:
        UserError, TrainingError: the run itself does not work; what any run with this config ends in.
    """
    from ftcore import proofs

    trainer = cfg.trainer if isinstance(cfg.trainer, dict) and "devices" in cfg.trainer else None
    kinds: list[Callable[[Config, Path], Proof]] = [
        proofs.export_proof,  # first: a whole run with evaluations, saves and the export
        proofs.resume_proof,
        proofs.repeat_proof,
        proofs.split_proof,
        functools.partial(proofs.rank_proof, trainers=[trainer]),
    ]
    cfg = _on_few_rows(cfg)
    for number, kind in enumerate(kinds):
        name = getattr(kind, "__name__", "rank_proof").removesuffix("_proof")
        try:
            yield kind(cfg, folder / name)
        except Exception as error:
            if number == 0:
                raise
            why = f"{type(error).__name__}: {error}"
            yield proofs.Proof(name=name, compared="it ended in an error", difference=math.inf, reason=why)


def _on_few_rows(cfg: Config) -> Config:
    """`cfg` with a sample of its data; all its training rows where a sample does not do (rare labels)."""
    from ftcore.errors import UserError
    from ftcore.job import build_hooks
    from ftcore.prepare import prepare

    limit, every = cfg.data.limit, cfg.data.limit.train
    limit.train = min(every or SAMPLE, SAMPLE)
    limit.validation, limit.test = min(limit.validation or 16, 16), min(limit.test or 16, 16)
    hooks = build_hooks(cfg)
    try:
        prepare(hooks, hooks.load_tokenizer())
    except UserError:
        limit.train = every
    return cfg


def _print(proof: Any, first: bool) -> None:
    if first:
        print(f"{'':<5}{'proof':<20}{'differs by':>11}  {'at most':>8}  compared")
    state = "ok" if proof.ok else "OFF"
    print(
        f"{state:<5}{proof.name:<20}{proof.difference:>11.1e}  {proof.allowed:>8.0e}  {proof.compared}",
        flush=True,
    )
    if not proof.ok:
        print(f"     {proof.reason}")
