"""The page about one run: curves by loss term, evaluations, who was mistaken for whom, data, plugins."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ftcore_report import _svg
from ftcore_report._html import chart, facts, page, section, table
from ftcore_report._runs import Run, is_number, read_records, read_table
from ftcore_report._table import number

__all__ = ["run_page"]

CLASSES = 30  # more don't fit into a matrix that can be read


def run_page(run: Run) -> str:
    """Everything that the directory tells, finished or not."""
    records = read_records(run.path)
    return page(
        f"Run {run.path.name}",
        [
            section("The run", [facts(_facts(run))]),
            section("Metrics", [_metrics(run), _groups(run)]),
            section("Training", [_curves(records)]),
            section("Who was mistaken for whom", [_confusion(run)]),
            section("Data", [_audit(run)]),
            section("Plugins", [_plugins(run)]),
        ],
    )


def _facts(run: Run) -> list[tuple[str, str]]:
    model, result = run.about.get("model", {}), run.result
    metric = result.get("metric") or {}
    pairs = [
        ("directory", run.path),
        ("state", f"{run.state}{': ' + str(result['error']) if result.get('error') else ''}"),
        ("chosen by", f"{metric['name']} = {metric.get('value')}" if metric.get("name") else None),
        ("model", model.get("path") if isinstance(model, dict) else None),
        ("parameters", f"{model['parameters']:,}" if _is_count(model, "parameters") else None),
        ("seed", run.seed),
        ("steps", result.get("steps")),
        ("seconds", result.get("seconds")),
        ("device", run.about.get("device")),
        ("ranks", run.about.get("world_size")),
        ("ftcore", run.about.get("ftcore")),
        ("commit", run.about.get("git_commit")),
        ("data", run.data or None),
    ]
    return [(name, str(value)) for name, value in pairs if value is not None]


def _is_count(node: Any, key: str) -> bool:
    return isinstance(node, dict) and isinstance(node.get(key), int)


def _metrics(run: Run) -> str:
    """All of them, a column per split; groups apart."""
    whole = {k: v for k, v in run.metrics.items() if k.count("/") == 1}
    splits = list(dict.fromkeys(k.partition("/")[0] for k in whole))
    names = list(dict.fromkeys(k.partition("/")[2] for k in whole))
    shown = {"eval": "validation"}
    rows = [[n, *(number(whole.get(f"{s}/{n}")) for s in splits)] for n in names]
    return table(["metric", *(shown.get(s, s) for s in splits)], rows, "") if rows else ""


def _groups(run: Run) -> str:
    """Bars of the run's metric by group (a task, a domain), test data first."""
    name = str((run.result.get("metric") or {}).get("name", "")).rpartition("/")[2]
    for split in ("test", "eval"):
        prefix = f"{split}/group/"
        rows = [
            (k.removeprefix(prefix).removesuffix(f"/{name}"), v)
            for k, v in run.metrics.items()
            if k.startswith(prefix) and k.endswith(f"/{name}")
        ]
        if rows:
            desc = "; ".join(f"{group}: {value:.4g}" for group, value in rows)
            svg = _svg.bars(f"{name} by group ({split})", desc, rows, name)
            cells = [[group, number(value)] for group, value in rows]
            return chart(f"{name} by group ({split})", svg, ("group", name), cells)
    return ""


def _curves(records: Sequence[Mapping[str, Any]]) -> str:
    """The loss and its terms together, then each other logged figure and each metric of evaluations."""
    names = list(dict.fromkeys(k for r in records for k in r if k not in ("step", "epoch")))
    terms = [n for n in names if n == "loss" or n.startswith("loss/")]
    if terms == ["loss", "loss/task"]:
        terms = ["loss"]  # the only term is the loss
    groups = [terms, *([n] for n in names if not n.startswith("loss") and "group/" not in n)]
    return "".join(_curve(records, group) for group in groups if group)


def _curve(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    bands = []
    for name in names:
        found = [(r["step"], r[name]) for r in records if is_number(r.get(name))]
        if found:
            x, y = zip(*found, strict=True)
            bands.append(_svg.Band(name, x, y, y, y))
    if not bands:
        return ""
    heading = "Loss, by term (unweighted)" if len(names) > 1 else names[0]
    desc = "; ".join(f"{b.label} goes from {b.y[0]:.4g} to {b.y[-1]:.4g}" for b in bands)
    svg = _svg.curves(heading, desc, bands, "step", "")
    rows = [[b.label, f"{x:g}", f"{y:.6g}"] for b in bands for x, y in zip(b.x, b.y, strict=True)]
    return chart(heading, svg, ("name", "step", "value"), rows)


def _confusion(run: Run) -> str:
    for split in ("test", "validation"):
        found = run.test if split == "test" else read_table(run.path / "predictions" / f"{split}.parquet")
        if found is None or not {"label", "prediction", "scores"} <= set(found.column_names):
            continue
        true, said = (list(map(str, found.column(c).to_pylist())) for c in ("label", "prediction"))
        labels = sorted({*true, *said})
        if len(labels) > CLASSES:
            return f"<p>{len(labels)} classes: too many for a matrix.</p>"
        index = {label: i for i, label in enumerate(labels)}
        counts = np.zeros((len(labels), len(labels)), dtype=int)
        np.add.at(counts, ([index[t] for t in true], [index[s] for s in said]), 1)
        right = int(np.trace(counts))
        svg = _svg.matrix(
            f"Confusion matrix ({split})", f"{right} of {len(true)} right", labels, counts.tolist()
        )
        rows = [[label, *map(str, row)] for label, row in zip(labels, counts.tolist(), strict=True)]
        return chart(f"{split}: rows are the labels, columns the answers", svg, ("label", *labels), rows)
    return ""


def _audit(run: Run) -> str:
    data = run.about.get("data", {})
    splits = data.get("splits")
    if not isinstance(splits, dict):
        return ""
    names = list(dict.fromkeys(k for audit in splits.values() if isinstance(audit, dict) for k in audit))
    rows = [[n, *(_plain(a.get(n, "-")) for a in splits.values() if isinstance(a, dict))] for n in names]
    kept = [name for name, audit in splits.items() if isinstance(audit, dict)]
    return table(["what", *kept], rows, "What became of the data") if rows else ""


def _plugins(run: Run) -> str:
    """Each plugin, its options, and what its hooks cost where that was measured."""
    found = [p for p in run.about.get("plugins", []) if isinstance(p, dict)]
    known = {name: cost.get("ms_per_step") for name, cost in run.result.get("plugin_cost", {}).items()}
    costs = {name: ms for name, ms in known.items() if is_number(ms)}
    rows = [
        [
            str(p.get("name")),
            str(p.get("version")),
            _plain(p.get("options")),
            number(costs.get(str(p.get("name"))), 2),
        ]
        for p in found
    ]
    heads = ("plugin", "version", "options", "ms a step in its hooks")
    return table(heads, rows, "", ["options"]) if rows else ""


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
