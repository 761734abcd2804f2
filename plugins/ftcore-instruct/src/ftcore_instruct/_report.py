"""The table of the mixture, and the overlap report: shown before training, and kept in the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ftcore.results import write_json
from ftcore.store import Rows
from ftcore.strategies import rank_environment
from ftcore_instruct._mixture import EpochOrder

__all__ = ["mixture", "show"]

SHOWN = 20  # sources; the file has all


def mixture(rows: Rows, order: EpochOrder) -> list[dict[str, Any]]:
    """For each source: rows there are, rows of an epoch and their share, mean tokens, truncated rows."""
    source = np.asarray(rows.column("source"))
    variant = np.asarray(rows.column("variant"))
    cut = np.asarray(rows.column("cut"))
    count = np.bincount(source[variant == 0], minlength=len(order.names))
    made = np.bincount(source, minlength=len(order.names))
    tokens = np.bincount(source, weights=rows.lengths, minlength=len(order.names))
    truncated = np.bincount(source[cut > 0], minlength=len(order.names))
    return [
        {
            "source": name,
            "rows": int(count[i]),
            "per_epoch": quota,
            "share": quota / order.rows_per_epoch,
            "tokens_per_epoch": round(quota * tokens[i] / max(1, made[i])),
            "truncated": int(truncated[i]),
            "formatted": int(made[i]),
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
    if overlap.get("rows"):
        did = "taken out" if overlap["policy"] == "drop" else "found"
        print(f"{overlap['rows']} training rows that overlap evaluated ones {did} (overlap.json)")
