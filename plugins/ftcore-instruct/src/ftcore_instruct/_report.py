"""The table of the mixture, and the overlap report: shown before training, and kept in the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ftcore.launch import rank_environment
from ftcore.results import write_json
from ftcore.store import Rows
from ftcore_instruct._mixture import FORM, EpochOrder

__all__ = ["mixture", "show"]

SHOWN = 20  # sources; the file has all


def mixture(rows: Rows, order: EpochOrder, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """For each source: its rows (`sizes`), those of an epoch and their share, tokens, and of the rows that
    were formatted how many are cut, and how many have each form."""
    source, cut = rows.numbers("source"), rows.numbers("cut")
    made = np.bincount(source, minlength=len(order.names))
    tokens = np.bincount(source, weights=rows.lengths, minlength=len(order.names))
    truncated = np.bincount(source[cut > 0], minlength=len(order.names))
    forms = {f: np.bincount(source, rows.numbers(f), len(order.names)) for f in FORM}
    return [
        {
            "source": name,
            "rows": sizes[i],
            "per_epoch": quota,
            "share": quota / order.rows_per_epoch,
            "tokens_per_epoch": round(quota * tokens[i] / max(1, made[i])),
            "truncated": int(truncated[i]),
            "formatted": int(made[i]),
            **{form: int(count[i]) for form, count in forms.items()},
        }
        for i, (name, quota) in enumerate(zip(order.names, order.quotas, strict=True))
    ]


def show(table: Sequence[Mapping[str, Any]], overlap: Mapping[str, Any], run_dir: Path) -> None:
    """Print the largest sources of the mixture on rank 0; write `mixture.json` and `overlap.json` there."""
    if rank_environment()[0] != 0:
        return
    write_json(run_dir / "mixture.json", list(table))
    write_json(run_dir / "overlap.json", dict(overlap))
    width = max(len(str(r["source"])) for r in table[:SHOWN])
    print(f"{'source':<{width}}     rows  per epoch  share     tokens  truncated")
    largest = sorted(table, key=lambda r: -r["per_epoch"])
    for r in largest[:SHOWN]:
        print(
            f"{r['source']:<{width}} {r['rows']:>8} {r['per_epoch']:>10} {r['share']:>6.1%}"
            f" {r['tokens_per_epoch']:>10} {r['truncated']:>10}"
        )
    if len(table) > SHOWN:
        print(f"and {len(table) - SHOWN} more sources (mixture.json)")
    shares = [sum(r[form] for r in table) / max(1, sum(r["formatted"] for r in table)) for form in FORM]
    print(
        "of the rows {:.1%} have exemplars, {:.1%} list options, {:.1%} reason first, {:.1%} are turned"
        " around".format(*shares)
    )
    if fewer := sum(r["per_epoch"] < r["rows"] for r in table):
        print(
            f"{fewer} of {len(table)} sources give an epoch fewer rows than they have; the next takes others"
        )
