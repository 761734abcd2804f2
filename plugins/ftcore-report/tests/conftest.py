"""Run directories as ftcore leaves them, made without training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

LABELS = ("late delivery", "praise", "refund")

CONFIG: dict[str, Any] = {
    "model": {"path": "ftcore:tiny_bert", "dropout": None},
    "data": {"source": "files", "train": "/data/train.jsonl", "test": "/data/test.jsonl"},
    "task": {"name": "classify", "metric": None},
    "optim": {"lr": 1e-3, "betas": [0.9, 0.999]},
    "trainer": {"strategy": "single"},
    "train": {"batch_size": 16, "epochs": 2.0, "steps": None, "log_every": 10, "resume": True},
    "name": "default",
    "force": False,
    "offline": False,
}

Answers = np.ndarray  # bool [rows]: which test rows are answered rightly


def predictions(answers: Answers) -> pa.Table:
    """A table as core writes it; the row's own label in turn, wrong answers are the next label."""
    names = [LABELS[i % 3] for i in range(len(answers))]
    said = [
        name if right else LABELS[(i + 1) % 3]
        for i, (name, right) in enumerate(zip(names, answers, strict=True))
    ]
    chances = [[0.8 if s == label else 0.1 for s in said] for label in LABELS]
    scores = pa.StructArray.from_arrays([pa.array(c) for c in chances], names=list(LABELS))
    rows = pa.array(range(len(answers)), pa.int64())
    return pa.table({"row": rows, "label": names, "prediction": said, "scores": scores})


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """`make_run("a", seed=1, answers=..., config={"optim.lr": 0.1}, plugins={"mixout": {"p": 0.7}})`."""

    def make(
        name: str,
        *,
        seed: int = 0,
        answers: Answers | None = None,
        config: Mapping[str, Any] | None = None,
        plugins: Mapping[str, Mapping[str, Any]] | None = None,
        data: str = "0123456789abcdef",
        finished: bool = True,
        metrics: Mapping[str, float] | None = None,
    ) -> Path:
        answers = np.arange(30) % 4 > 0 if answers is None else answers
        path = tmp_path / "runs" / name
        path.mkdir(parents=True)
        plain = json.loads(json.dumps(CONFIG)) | {"seed": seed, "plugin": dict(plugins or {})}
        for key, value in (config or {}).items():
            group, _, last = key.rpartition(".")
            (plain[group] if group else plain)[last] = value
        (path / "config.yaml").write_text(yaml.safe_dump(plain))
        about = {
            "data": {"source": data, "labels": LABELS, "splits": {"train": {"rows": 90, "truncated": 0}}},
            "plugins": [
                {"name": n, "version": "0.1.0", "distribution": f"ftcore-{n}", "options": o}
                for n, o in (plugins or {}).items()
            ],
            "model": {"path": plain["model"]["path"], "parameters": 43272},
            "device": "cpu",
        }
        (path / "run.json").write_text(json.dumps(about))
        figures = {"eval/accuracy": 0.5, "test/accuracy": float(np.mean(answers))}
        common = {"grad_norm": 1.0, "lr": 1e-3}
        records = [
            {"step": s, "epoch": s / 6, "loss": 1 / s, "loss/task": 1 / s, "memory_mb": 99.0 + s, **common}
            for s in (1, 6, 12)
        ]
        evaluations = [{"step": s, "eval/accuracy": float(np.mean(answers)) * s / 12} for s in (6, 12)]
        lines = sorted([*records, *evaluations], key=lambda r: r["step"])
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if finished:
            (path / "predictions").mkdir()
            pq.write_table(predictions(answers), path / "predictions" / "test.parquet")
            result = {
                "status": "finished",
                "metric": {"name": "eval/accuracy", "value": 0.5},
                "metrics": figures if metrics is None else dict(metrics),
                "steps": 12,
                "tokens": 1200,
                "seconds": 10.0 + seed,
                "seed": seed,
                "plugin_cost": {name: {"ms_per_step": 1.25} for name in plugins or {}},
            }
            (path / "result.json").write_text(json.dumps(result))
        return path

    return make
