"""By the command line: one gradient however rows are laid out, and talking to the result."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def ftcore(tmp: Path, *arguments: str, said: str = "") -> str:
    """`ftcore ARGUMENTS` to its end; what it printed."""
    own = {"FTCORE_CACHE": str(tmp / "cache"), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    ended = subprocess.run(
        [sys.executable, "-m", "ftcore", *arguments],
        cwd=tmp,
        env=os.environ | own,
        input=said,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert ended.returncode in (0, 2), ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """Eleven prompts of different lengths; two of them are evaluated."""
    rows = [{"prompt": f"say {'ab' * i}", "completion": "ba" * (1 + i % 4)} for i in range(1, 12)]
    found = []
    for split, part in (("train", rows), ("validation", rows[:2])):
        path = tmp_path / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
        found.append(f"data.{split}={path}")
    return [
        "+plugin=instruct",
        "data=files",
        *found,
        "data.test=null",
        "data.max_length=48",
        "model.dropout=0",
        "train.batch_size=100",
        "train.steps=2",
        "train.log_every=1",
        "task.max_new_tokens=4",
    ]


def records(run_dir: Path) -> list[Any]:
    """Loss and gradient norm of each step, and the evaluation."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    keys = ("loss", "grad_norm", "eval/nll")
    return [line[key] for line in lines for key in keys if key in line]


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_t5"])
def test_one_gradient_for_every_layout(tmp_path: Path, data: list[str], model: str) -> None:
    """Packed and padded, whole and in micro-batches, on one rank and two; then the model answers."""
    sweep = ["plugin.instruct.pack=true,false", "train.micro_batch_size=1,100", f"model={model}"]
    name = "hydra.sweep.subdir=${plugin.instruct.pack}-${train.micro_batch_size}"
    ftcore(tmp_path, "-m", *data, *sweep, name, "hydra.sweep.dir=one")
    two = ["trainer=ddp", "trainer.devices=2", "trainer.device=cpu", "train.micro_batch_size=1"]
    ftcore(tmp_path, *data, f"model={model}", *two, "hydra.run.dir=two")
    expected = records(tmp_path / "one" / "False-100")
    assert len(expected) == 5
    for found in [*(tmp_path / "one").iterdir(), tmp_path / "two"]:
        if found.is_dir():
            assert records(found) == pytest.approx(expected, rel=1e-5), found
    talk = ["chat", "one/True-1", "--max-new-tokens", "3"]
    said = ftcore(tmp_path, *talk, said="hello\n\n/reset\nsay ab\n/quit\nnever read\n")
    assert len(said.splitlines()) == 2
    assert "no run has finished there" in ftcore(tmp_path, "chat", "one")


def test_chunked_and_full_loss_train_alike(tmp_path: Path, data: list[str]) -> None:
    """`loss` changes time and memory, not the result; what can't be is refused."""
    sweep = ["-m", *data, "model=tiny_llama", "plugin.instruct.loss=chunked,trained,full"]
    ftcore(tmp_path, *sweep, "hydra.sweep.dir=loss", "hydra.sweep.subdir=${plugin.instruct.loss}")
    expected = records(tmp_path / "loss" / "full")
    for kind in ("chunked", "trained"):
        assert records(tmp_path / "loss" / kind) == pytest.approx(expected, rel=1e-5)
    refused = ftcore(tmp_path, *data, "model=tiny_t5", "plugin.instruct.loss=chunked")
    assert "plugin.instruct.loss=chunked: T5ForConditionalGeneration can't" in refused
