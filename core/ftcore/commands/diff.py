"""`ftcore diff`: what two runs differ in: config, versions, data, figures, and rows that flipped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from ftcore.commands import Parser
from ftcore.errors import UserError

__all__ = ["main"]

SHOWN = 10  # flipped rows that are listed


def main(arguments: Sequence[str]) -> int:
    """Print the differences of two finished runs."""
    parser = Parser(
        prog="ftcore diff",
        description="What two runs differ in: config, versions, data, figures, and which rows flipped.",
    )
    parser.add_argument("first", type=Path, metavar="RUN")
    parser.add_argument("second", type=Path, metavar="RUN")
    parser.add_argument("--json", action="store_true", help="print JSON, with every flipped row")
    options = parser.parse_args(arguments)
    report = compare(options.first, options.second)
    print(json.dumps(report, indent=2, ensure_ascii=False) if options.json else _text(report))
    return 0


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Differences under `config`, `made_with`, `metrics` (key: both values), and `rows` by split.

    Raises:
        UserError: a directory that is no finished run.
    """
    a, b = _read(first), _read(second)
    report: dict[str, Any] = {"runs": [str(first), str(second)]}
    for part in ("config", "made_with", "metrics"):
        one, other = a[part], b[part]
        keys = dict.fromkeys([*one, *other])
        report[part] = {k: [one.get(k), other.get(k)] for k in keys if one.get(k) != other.get(k)}
    report["rows"] = {}
    for split in ("validation", "test"):
        files = [folder / "predictions" / f"{split}.parquet" for folder in (first, second)]
        if all(f.is_file() for f in files):
            report["rows"][split] = _rows(*files)
    return report


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    from omegaconf import OmegaConf

    for name in ("config.yaml", "run.json", "result.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is no finished run: it has no {name}")
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    config = cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")))
    kept = {k: v for k, v in run.items() if k not in ("data", "plugins", "machine")}
    kept["data"] = {"fingerprint": run["data"]["fingerprint"]}
    kept["plugins"] = {p["name"]: p["version"] for p in run["plugins"]}
    kept["machine"] = run["machine"]
    figures = {**result["metrics"], "steps": result["steps"], "best_step": result["best_step"]}
    return {
        "config": dict(_flat(config, "")),
        "made_with": dict(_flat(kept, "")),
        "metrics": {**figures, "seconds": result["seconds"]},
    }


def _flat(node: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _rows(first: Path, second: Path) -> dict[str, Any]:
    """Which rows have another prediction, and which of those became right or wrong."""
    import pyarrow.parquet

    one, other = (pyarrow.parquet.read_table(f) for f in (first, second))
    right = next((c for c in ("label", "target") if c in one.column_names), "")
    if "prediction" not in one.column_names or "prediction" not in other.column_names:
        return {"note": "this task predicts no answer per row"}
    columns = ["row", *([right] if right else [])]
    if one.select(columns).to_pylist() != other.select(columns).to_pylist():
        return {"note": "not comparable: the runs have other rows"}
    answers = (one["prediction"].to_pylist(), other["prediction"].to_pylist())
    truth = one[right].to_pylist() if right else [None] * one.num_rows
    flipped = [
        {"row": row, right or "answer": wanted, "first": a, "second": b}
        for row, wanted, a, b in zip(one["row"].to_pylist(), truth, *answers, strict=True)
        if a != b
    ]
    return {
        "rows": one.num_rows,
        "flipped": len(flipped),
        "only_first_right": sum(f["first"] == f.get(right) for f in flipped) if right else None,
        "only_second_right": sum(f["second"] == f.get(right) for f in flipped) if right else None,
        "which": flipped,
    }


def _text(report: dict[str, Any]) -> str:
    lines = [f"first   {report['runs'][0]}", f"second  {report['runs'][1]}"]
    for part in ("config", "made_with", "metrics"):
        lines.append(part.replace("_", " ") + (":" if report[part] else ": the same"))
        width = max(map(len, report[part]), default=0)
        lines += [f"  {key:<{width}}  {a}  |  {b}" for key, (a, b) in report[part].items()]
    for split, rows in report["rows"].items():
        if "note" in rows:
            lines.append(f"{split} rows: {rows['note']}")
            continue
        right = ""
        if rows["only_first_right"] is not None:
            right = (
                f"; only the first is right on {rows['only_first_right']},"
                f" only the second on {rows['only_second_right']}"
            )
        lines.append(f"{split} rows: {rows['flipped']} of {rows['rows']} have another prediction{right}")
        for found in rows["which"][:SHOWN]:
            row, wanted, a, b = found.values()
            lines.append(f"  row {row} ({wanted}): {a}  |  {b}" if wanted else f"  row {row}: {a}  |  {b}")
        if len(rows["which"]) > SHOWN:
            lines.append(f"  and {len(rows['which']) - SHOWN} more (--json lists them)")
    return "\n".join(lines)
