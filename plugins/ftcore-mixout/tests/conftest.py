"""What the tests share: tiny jobs with mixout, opened as a run opens them, in this process."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

ROWS = [{"text": f"row {i} " + "ab" * (i % 7), "label": "yes" if i % 3 else "no"} for i in range(32)]


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Any]:
    """`config({"train.steps": 3}, {"p": 0.5})`: a tiny BERT; the second argument is mixout's options."""
    from ftcore.config import from_plain

    def make(overrides: Mapping[str, Any] | None = None, mixout: Mapping[str, Any] | None = None) -> Any:
        path = tmp_path / "train.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
        plain: dict[str, Any] = {"trainer": {"strategy": "single", "device": "cpu"}}
        given = {"model.path": "ftcore:tiny_bert", "data.source": "files", "data.train": str(path)}
        given |= {"train.batch_size": 8, "train.steps": 3, "optim.lr": 1e-2, "seed": 3}
        for key, value in {**given, **(overrides or {})}.items():
            *groups, name = key.split(".")
            node = plain
            for group in groups:
                node = node.setdefault(group, {})
            node[name] = value
        return from_plain(plain | {"plugin": {} if mixout is None else {"mixout": dict(mixout)}})

    return make


@pytest.fixture
def open_tiny(config: Any, tmp_path: Path) -> Callable[..., Any]:
    """`open_tiny({"train.steps": 3}, {"p": 0.5}, run="a")`: an open job, in a directory of its own."""
    from ftcore.job import open_job
    from ftcore.screen import Screen
    from ftcore.signals import StopFlag

    def make(overrides: Any = None, mixout: Any = None, run: str = "run", extra: Any = ()) -> Any:
        run_dir = tmp_path / run
        run_dir.mkdir(exist_ok=True)
        return open_job(config(overrides, mixout), run_dir, Screen, StopFlag(), extra)

    return make
