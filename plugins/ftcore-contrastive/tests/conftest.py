"""What the tests share: tiny jobs with the plugin, opened as a run opens them, here or as ranks."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.cli import rendezvous

LABELS = ("late", "refund", "praise")
ROWS = [
    {"text": f"{LABELS[i % 3]} row {i} " + "ab" * (i % 7), "label": LABELS[i % 3 if i % 5 else 0]}
    for i in range(22)
]


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Any]:
    """`config({"train.steps": 3}, {"weight": 0.5})`: a tiny BERT; other plugins by keyword."""
    from ftcore.config import from_plain

    def make(
        overrides: Mapping[str, Any] | None = None,
        contrastive: Mapping[str, Any] | None = None,
        rows: Sequence[Mapping[str, Any]] = ROWS,
        **plugins: Mapping[str, Any],
    ) -> Any:
        path = tmp_path / "train.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        plain: dict[str, Any] = {"trainer": {"strategy": "single", "device": "cpu"}}
        given = {"model.path": "ftcore:tiny_bert", "data.source": "files", "data.train": str(path)}
        given |= {"train.batch_size": 16, "train.steps": 2, "optim.lr": 1e-2, "seed": 1}
        for key, value in {**given, **(overrides or {})}.items():
            *groups, name = key.split(".")
            node = plain
            for group in groups:
                node = node.setdefault(group, {})
            node[name] = value
        chosen = {name: dict(options) for name, options in plugins.items()}
        return from_plain(
            plain | {"plugin": chosen | ({} if contrastive is None else {"contrastive": dict(contrastive)})}
        )

    return make


@pytest.fixture
def open_tiny(config: Any, tmp_path: Path) -> Callable[..., Any]:
    """`open_tiny({"train.steps": 3}, {"weight": 0.5}, run="a")`: an open job, in a directory of its own."""
    from ftcore.job import open_job
    from ftcore.screen import Screen
    from ftcore.signals import StopFlag

    def make(
        overrides: Any = None, contrastive: Any = None, run: str = "run", rows: Any = ROWS, **plugins: Any
    ) -> Any:
        run_dir = tmp_path / run
        run_dir.mkdir(exist_ok=True)
        return open_job(config(overrides, contrastive, rows, **plugins), run_dir, Screen, StopFlag())

    return make


@pytest.fixture(scope="session")
def run_forked() -> Callable[[str, Sequence[dict[str, Any]], Path], None]:
    """`run_forked(source, runs, folder)`: a script that forks the gloo ranks of each run, of `world` each.

    It gets the folder as argument, and there `runs.json`, with the environments of each run's ranks as
    `places`. Forked ranks import torch once for all.
    """

    def run(source: str, runs: Sequence[dict[str, Any]], folder: Path) -> None:
        with ExitStack() as stack:
            described = [{**one, "places": stack.enter_context(rendezvous(one["world"]))} for one in runs]
            (folder / "runs.json").write_text(json.dumps(described))
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run([sys.executable, "-c", source, str(folder)], env=env, check=True, timeout=400)

    return run
