"""`ftcore check`: does this command line's run work, and is what it trains scaled right? In seconds.

First a whole run of a few steps on a few rows of the user's data, then the proofs of `ftcore.proofs`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore.commands import Parser

if TYPE_CHECKING:
    from ftcore.config import Config
    from ftcore.proofs import Proof

__all__ = ["check"]


def check(arguments: Sequence[str]) -> int:
    """Prove a command line; exit code 1 where something is off."""
    parser = Parser(
        prog="ftcore check",
        description="Try a run's whole course on a few rows, and prove that its gradient is scaled right.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("overrides", nargs="*", help="the run's own arguments (key=value)")
    options = parser.parse_args(arguments)
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
    """Each proof as it is made; one that fails to run is off, with its error for a reason.

    Raises:
        UserError: the run can't even be opened.
    """
    from ftcore import proofs
    from ftcore.errors import TrainingError, UserError

    kinds: list[Callable[[Config, Path], Proof]] = [
        proofs.export_proof,  # first: a whole run with evaluations, saves and the export
        proofs.resume_proof,
        proofs.repeat_proof,
        proofs.split_proof,
        proofs.rank_proof,
    ]
    for number, kind in enumerate(kinds):
        name = kind.__name__.removesuffix("_proof")
        try:
            yield kind(cfg, folder / name)
        except (UserError, TrainingError):
            if number == 0:
                raise
            raise
        except Exception as error:
            if number == 0:
                raise
            why = f"{type(error).__name__}: {error}"
            yield proofs.Proof(name=name, compared="it did not run", difference=float("inf"), reason=why)


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
