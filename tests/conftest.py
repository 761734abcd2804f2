"""What the unit tests share: ranks, and jobs that train in milliseconds."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from .cli import rendezvous

ROWS = [{"text": f"row {i} " + "ab" * (i % 7), "label": "yes" if i % 3 else "no"} for i in range(32)]


@pytest.fixture(scope="session")
def run_ranks() -> Callable[[str, int, Path], None]:
    """`run_ranks(source, world_size, folder)`: a script as gloo ranks, which get the folder as argument."""

    def run(source: str, world_size: int, folder: Path) -> None:
        # As `ftcore.worker` does: in torch 2.13 the exit handlers of a gloo rank now and then abort.
        source += "\nimport os\nos._exit(0)\n"
        command = [sys.executable, "-c", source, str(folder)]
        common = {**os.environ, "OMP_NUM_THREADS": "1"}
        with rendezvous(world_size) as places:
            ranks = [subprocess.Popen(command, env=common | place) for place in places]
            try:
                assert [rank.wait(timeout=60) for rank in ranks] == [0] * world_size
            finally:
                for rank in ranks:
                    rank.kill()
                    rank.wait()

    return run


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Any]:
    """`config({"train.steps": 3}, validation=ROWS)`: a tiny BERT without dropout on rows of text, label."""
    from ftcore.config import from_plain

    def make(overrides: Mapping[str, Any] | None = None, **splits: Sequence[Mapping[str, Any]]) -> Any:
        plain: dict[str, Any] = {"trainer": {"strategy": "single", "device": "cpu"}}
        given = {"model.path": "ftcore:tiny_bert", "model.dropout": 0.0, "data.source": "files"}
        for split, rows in {"train": ROWS, **splits}.items():
            path = tmp_path / f"{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            given[f"data.{split}"] = str(path)
        for key, value in {**given, **(overrides or {})}.items():
            *groups, name = key.split(".")
            node = plain
            for group in groups:
                node = node.setdefault(group, {})
            node[name] = value
        return from_plain(plain)

    return make


@pytest.fixture
def hooks() -> Callable[..., Any]:
    """`hooks(cfg, plugin, ...)`: the hooks of a run with these plugin instances above core's defaults."""
    from ftcore.defaults import Defaults
    from ftcore.hooks import Hooks
    from ftcore.plugins import Enabled

    def make(cfg: Any, *plugins: Any) -> Any:
        enabled = [
            Enabled(name=type(p).__name__.lower(), instance=p, distribution="", version="0", options={})
            for p in plugins
        ]
        return Hooks(Defaults(cfg), enabled, cfg)

    return make


@pytest.fixture
def open_tiny(config: Any, hooks: Any, tmp_path: Path) -> Callable[..., Any]:
    """`open_tiny(overrides, plugin, ..., validation=ROWS)`: an open job, plugins registered as if chosen."""
    from ftcore.job import open_job
    from ftcore.screen import Screen
    from ftcore.signals import StopFlag

    def make(overrides: Mapping[str, Any] | None = None, *plugins: Any, **splits: Any) -> Any:
        run_dir = tmp_path / "run"
        run_dir.mkdir(exist_ok=True)
        job = open_job(config(overrides, **splits), run_dir, Screen, StopFlag())
        return replace(job, hooks=hooks(job.cfg, *plugins))

    return make
