"""By the command line: as the README has it, what a mistake looks like, and ranks that die."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli import Process, children, environment, server

from .cases import ROWS

TINY = ["model=tiny_bert", "data=files", "train.batch_size=8", "train.log_every=1", "seed=3"]


def start(tmp: Path, *arguments: str) -> Process:
    """`ftcore ARGUMENTS` in `tmp`, with data there."""
    (tmp / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    own = environment(tmp, TORCHELASTIC_USE_AGENT_STORE="True")  # as in a shell that torchrun started
    del own["DS_ACCELERATOR"]
    return server().start(arguments, tmp, own, streams=("1", "1"))


def ftcore(tmp: Path, *arguments: str) -> tuple[int, str]:
    """Its exit code and all that it printed."""
    process = start(tmp, *arguments)
    said, _ = process.communicate(timeout=400)
    return process.returncode or 0, said


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_one_device_as_the_readme_has_it(tmp_path: Path) -> None:
    """Without DS_ACCELERATOR, a compiler or another device; the run's directory says what the engine got."""
    arguments = [*TINY, "data.train=train.jsonl", "train.steps=2", "hydra.run.dir=run"]
    code, said = ftcore(tmp_path, "+plugin=mixout", "trainer=deepspeed", *arguments)
    assert code == 0, said
    engine = json.loads((tmp_path / "run/deepspeed.json").read_text())
    assert engine["zero_optimization"]["stage"] == 2
    assert json.loads((tmp_path / "run/result.json").read_text())["order"] == ["mixout", "deepspeed"]
    assert "built successfully" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trainer=zero2", "trainer.stage=5"], "trainer: stage must be 0, 1, 2 or 3, got 5"),
        (
            ["trainer=zero2", "trainer.offload_params=true"],
            "trainer: offload_params needs stage 3",
        ),
        (["trainer=zero3", "trainer.devices=two"], "trainer.devices"),
        (["trainer=zero2", "trainer.stge=3"], "no config key 'trainer.stge'; did you mean 'trainer.stage'"),
        (["trainer=zero2", "trainer.config=none.json"], "none.json can't be read"),
        (["trainer=zero2", "trainer.config=ds.json"], "train_batch_size is 99, but train.batch_size is 8"),
        (
            ["trainer=zero1", "+plugin=mixout", "plugin.mixout.mask_scope=micro_batch"],
            "'mixout' needs whole_weights, which 'deepspeed' takes away",
        ),
    ],
)
def test_what_can_not_work_is_said_before_it_trains(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    """One line, exit code 2, nothing written."""
    (tmp_path / "ds.json").write_text('{"train_batch_size": 99}')
    code, said = ftcore(tmp_path, *TINY, "data.train=train.jsonl", *arguments, "hydra.run.dir=run")
    assert code == 2, said
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "run/checkpoints").exists()


CHECK = (
    "import sys; from ftcore.cli import main; code = main(sys.argv[1:]);"
    " sys.exit(code or 100 * ('deepspeed' in sys.modules))"
)


def without_importing(tmp: Path, *arguments: str) -> str:
    """`ftcore ARGUMENTS`, which must not import DeepSpeed; what it printed."""
    command = [sys.executable, "-c", CHECK, *arguments]
    ended = subprocess.run(command, cwd=tmp, env=environment(tmp), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_a_run_without_it_does_not_import_it(tmp_path: Path) -> None:
    """Nor does the export of its model, though DeepSpeed is installed."""
    without_importing(tmp_path, "model=tiny_bert", "train.steps=1", "hydra.run.dir=run")
    assert (tmp_path / "run/model/model.safetensors").is_file()


def test_a_plan_names_the_fastest_layout_that_fits(tmp_path: Path) -> None:
    """And does not import DeepSpeed to know it."""
    line = ["plan", "--gpu-memory", "0.3", "trainer=zero3", "trainer.devices=4", "+plugin=mixout"]
    said = without_importing(tmp_path, *line)
    assert "> trainer.stage=3" in said
    assert "fastest that fits 0.3 GB" in said


def test_killed_ranks_end_the_run_and_it_resumes(tmp_path: Path) -> None:
    """One rank killed mid-step: the others are down within 10 s, it is named, and the run can go on."""
    arguments = [*TINY, "data.train=train.jsonl", "train.steps=40", "train.save_every=5", "trainer=zero3"]
    process = start(tmp_path, *arguments, "trainer.devices=2", "hydra.run.dir=run")
    wait_for(
        lambda: bool(list((tmp_path / "run/checkpoints").glob("step-*"))) or process.poll() is not None, 300
    )
    ranks = children(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    wait_for(lambda: process.poll() is not None, 15)
    said = process.communicate()[0]
    assert process.returncode == 1
    assert "rank 1 was ended by SIGKILL" in said.splitlines()[-1]
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    code, said = ftcore(tmp_path, "resume", "run", "trainer=single")
    assert code == 0, said
    assert "resuming at step" in said
    result: dict[str, Any] = json.loads((tmp_path / "run/result.json").read_text())
    assert result["steps"] == 40
