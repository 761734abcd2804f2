"""Stopped in any way and resumed, a run ends bit for bit as one that never stopped."""

import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from .cli import (
    Process,
    children,
    evaluations,
    is_alive,
    kill_all,
    make_data,
    records,
    run,
    start,
    steps,
    wait_for_step,
    weights,
)

STEPS = 60
TWO = ["trainer=ddp", "trainer.devices=2"]
RUN = [
    "train.batch_size=8",
    f"train.steps={STEPS}",
    "train.log_every=1",
    "train.save_every=2",
    "train.eval_every=7",
    "optim.lr=3e-3",
    "model.dropout=0.2",
    "seed=3",
]


def command(tmp: Path, name: str, *more: str) -> list[str]:
    """The arguments of one and the same run, in another directory."""
    return [*make_data(tmp, "classify"), *RUN, *more, f"hydra.run.dir={name}"]


class Story:
    """A run that is stopped again and again; `seen` is what it did each time."""

    def __init__(self, tmp: Path, name: str, *more: str) -> None:
        self.run_dir = tmp / name
        self.begin = command(tmp, name, *more)
        self.seen: dict[str, Any] = {}

    def until(self, step: int) -> Process:
        """Start or resume it, and return when it has saved a checkpoint of `step` or later."""
        again = ["resume", str(self.run_dir)]
        process = start(again if self.run_dir.exists() else self.begin, self.run_dir.parent)
        wait_for_step(process, self.run_dir, step)
        return process

    def further(self) -> Process:
        """Resume it, and return when it has saved two more checkpoints."""
        return self.until(self.newest() + 4)

    def newest(self) -> int:
        """The step of its newest checkpoint."""
        return max(int(d.name[5:]) for d in (self.run_dir / "checkpoints").glob("step-*"))

    def finish(self) -> subprocess.CompletedProcess[str]:
        """`ftcore resume`, to the end."""
        return run(["resume", str(self.run_dir)], self.run_dir.parent)


def ended(process: Process) -> tuple[int, str]:
    """Exit code and output, once it has ended."""
    output = process.communicate(timeout=60)[0]
    return process.returncode, output


def whole(tmp: Path) -> Story:
    """Never stopped; it keeps its checkpoint."""
    story = Story(tmp, "whole", "train.keep=resume")
    story.seen["end"] = run(story.begin, tmp)
    return story


def whole_ranks(tmp: Path) -> Story:
    """Never stopped, on two ranks."""
    story = Story(tmp, "whole", *TWO)
    story.seen["end"] = run(story.begin, tmp)
    return story


def killed(tmp: Path) -> Story:
    """Killed three times; then a byte of the newest checkpoint is flipped, and it runs to the end."""
    story = Story(tmp, "killed")
    for step, delay in ((3, 0.05), (15, 0.0), (29, 0.02)):
        process = story.until(step)
        time.sleep(delay)  # so as not always to be in the same place of the loop
        kill_all(process)
    story.seen["damaged"] = story.newest()
    file = story.run_dir / f"checkpoints/step-{story.newest()}/rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    story.seen["end"] = story.finish()
    return story


def stopped(tmp: Path) -> Story:
    """SIGTERM, Ctrl-C, and a disk on which no checkpoint has room; then the command line of its start."""
    story = Story(tmp, "stopped")
    for step, number in ((5, signal.SIGTERM), (15, signal.SIGINT)):
        process = story.until(step)
        process.send_signal(number)
        story.seen[number.name] = (*ended(process), story.newest())
    process = start(["resume", "stopped"], tmp)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    story.seen["full"] = (*ended(process), story.newest())
    story.seen["end"] = run(story.begin, tmp)
    return story


def ranks(tmp: Path) -> Story:
    """Two ranks: the parent alone killed, one rank alone killed, asked to stop; then to the end."""
    story = Story(tmp, "ranks", *TWO)
    process = story.until(3)
    story.seen["orphans"] = children(process.pid)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while any(map(is_alive, story.seen["orphans"])) and time.monotonic() < deadline:
        time.sleep(0.1)
    story.seen["left"] = [pid for pid in story.seen["orphans"] if is_alive(pid)]

    process = story.further()
    siblings = children(process.pid)
    os.kill(siblings[1], signal.SIGKILL)
    story.seen["lost"] = (*ended(process), [pid for pid in siblings if is_alive(pid)])

    kill_all(story.further())
    process = story.further()
    process.send_signal(signal.SIGTERM)
    story.seen["SIGTERM"] = ended(process)
    story.seen["end"] = story.finish()
    return story


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Story]]]:
    """Every story, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        tellers = (ranks, killed, whole, stopped, whole_ranks)
        yield {teller.__name__: pool.submit(teller, tmp_path_factory.mktemp("told")) for teller in tellers}
        pool.shutdown(cancel_futures=True)  # those that no selected test asked for


def assert_same(one: Story, other: Story) -> None:
    """Each step and evaluation is there once, with the same numbers; the weights are the same bits."""

    def numbers(story: Story) -> list[dict[str, Any]]:
        assert story.seen["end"].returncode == 0, story.seen["end"].stderr
        measured = ("tokens_per_second", "memory_mb")
        return [{k: v for k, v in r.items() if k not in measured} for r in records(story.run_dir)]

    assert [r["step"] for r in steps(other.run_dir)] == list(range(1, STEPS + 1))
    assert [r["step"] for r in evaluations(other.run_dir)] == [*range(7, STEPS, 7), STEPS]
    assert numbers(one) == numbers(other)
    assert weights(one.run_dir) == weights(other.run_dir)


Told = dict[str, Future[Story]]


def test_killed_and_resumed_is_as_never_killed(told: Told) -> None:
    """SIGKILL three times with dropout on: same steps, same losses, same weights, bit for bit."""
    assert_same(told["killed"].result(), told["whole"].result())


def test_stopped_and_resumed_is_as_never_stopped(told: Told) -> None:
    """Signals and a full disk; then the same command line goes on, and ends bit for bit the same."""
    assert f"resuming at step {told['stopped'].result().seen['full'][2]} " in (
        told["stopped"].result().seen["end"].stdout
    )
    assert_same(told["stopped"].result(), told["whole"].result())


def test_two_ranks_stopped_four_times_end_as_never_stopped(told: Told) -> None:
    """On two ranks too, the resumed run has the weights and losses of one never stopped."""
    assert_same(told["ranks"].result(), told["whole_ranks"].result())


def test_a_damaged_checkpoint_is_passed_over(told: Told) -> None:
    """A flipped byte in the newest checkpoint: named in a warning, and the one before it is resumed."""
    seen = told["killed"].result().seen
    said = seen["end"].stdout
    assert re.search(rf"warning: .*step-{seen['damaged']} is damaged: rank-00000.safetensors", said), said
    assert int(re.findall(r"resuming at step (\d+)", said)[0]) == seen["damaged"] - 2


def test_keep_resume_keeps_the_last_checkpoint(told: Told) -> None:
    """`train.keep=resume` leaves the optimiser's state behind; otherwise no checkpoint is left."""
    kept = told["whole"].result().run_dir / "checkpoints" / f"step-{STEPS}"
    assert b"exp_avg_sq/" in (kept / "rank-00000.safetensors").read_bytes()
    assert not (told["killed"].result().run_dir / "checkpoints").exists()


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGINT", 130)])
def test_asked_to_stop_it_saves_and_says_how_to_go_on(told: Told, name: str, code: int) -> None:
    """The step is finished and saved; the exit code is for a scheduler, the message for a person."""
    story = told["stopped"].result()
    returned, output, newest = story.seen[name]
    assert returned == code, output
    assert f"stopped at step {newest}, saved" in output
    assert f"ftcore resume {story.run_dir}" in output
    assert "Traceback" not in output


def test_a_checkpoint_that_can_not_be_written_is_one_line(told: Told) -> None:
    """It ends the run with exit 2 and names the checkpoint; the one before it stays."""
    story = told["stopped"].result()
    code, output, newest = story.seen["full"]
    assert code == 2, output
    line = r"^ftcore: error: can't save \S+/checkpoints/(step|best)-\d+: .*ftcore resume \S+/stopped`?\n\Z"
    assert re.search(line, output, re.M), output
    assert "Traceback" not in output
    assert newest == story.seen["SIGINT"][2]


def fill(descriptor: int) -> None:
    """Write until the disk is full."""
    while True:
        os.write(descriptor, bytes(4096))


def test_a_disk_that_fills_up_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """A real file system with no room left: exit 2, one line, and what was saved is still whole."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "ftcore-test", disk]).returncode:
        return  # only root may; a limit on the size of files has shown the same above
    try:
        story = Story(disk, "run", "train.steps=3000")
        process = story.until(4)
        filler = os.open(disk / "filler", os.O_CREAT | os.O_WRONLY)
        with pytest.raises(OSError, match="No space"):
            fill(filler)
        os.close(filler)
        code, output = ended(process)
        assert (code, "Traceback" in output) == (2, False), output
        assert re.search(r"^ftcore: error: .*No space left on device.*ftcore resume", output, re.M), output
        newest = story.run_dir / f"checkpoints/step-{story.newest()}"
        for name, digest in json.loads((newest / "manifest.json").read_text()).items():
            assert hashlib.sha256((newest / name).read_bytes()).hexdigest() == digest
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_ranks_leave_when_their_parent_is_gone(told: Told) -> None:
    """The parent alone is killed: both ranks end by themselves, so that nothing holds the device."""
    seen = told["ranks"].result().seen
    assert len(seen["orphans"]) == 2
    assert seen["left"] == []


def test_a_lost_rank_ends_the_run_with_a_message(told: Told) -> None:
    """One rank is killed: the other goes too, and the run fails in one line that says which it was."""
    code, output, left = told["ranks"].result().seen["lost"]
    assert (code, left) == (1, []), output
    assert "Traceback" not in output
    assert re.search(r"^ftcore: failed: .*rank 1\b.*(killed|SIGKILL|-9)", output, re.M), output


def test_ranks_asked_to_stop_save_together(told: Told) -> None:
    """SIGTERM to the parent reaches every rank: one message, exit 75."""
    story = told["ranks"].result()
    code, output = story.seen["SIGTERM"]
    assert code == 75, output
    assert len(re.findall(rf"ftcore resume {story.run_dir}", output)) == 1


def test_a_run_that_asked_to_start_anew_can_be_resumed(tmp_path: Path) -> None:
    """`train.resume=false` is for that start alone: resuming must not begin again."""
    story = Story(tmp_path, "anew", "train.steps=3000", "train.resume=false")
    process = story.until(4)
    process.send_signal(signal.SIGINT)
    code, output = ended(process)
    assert code == 130, output
    assert "resume: true" in (story.run_dir / "config.yaml").read_text()
    process = story.further()  # `ftcore resume`
    process.send_signal(signal.SIGINT)
    _, output = ended(process)
    assert "resuming at step" in output
