"""ftcore by its command line, for the tests `test_cli_*.py`: runs, what they leave, data, plugins."""

import atexit
import functools
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

import torch

CLASSES = ("late delivery", "refund", "praise")
WORDS = {
    "late delivery": ("parcel", "still", "waiting", "courier", "days", "tracking"),
    "refund": ("money", "back", "return", "charged", "twice", "card"),
    "praise": ("lovely", "great", "thanks", "perfect", "quick", "happy"),
}


def environment(tmp: Path, **extra: str) -> dict[str, str]:
    """The environment of every run: nothing from the net, an own cache, one thread (tiny models)."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("FTCORE_", "PYTEST_", "HYDRA_"))}
    own = {"FTCORE_CACHE": str(tmp / "cache"), "HF_HOME": str(tmp / "hf"), "HF_HUB_OFFLINE": "1"}
    if torch.cuda.device_count() == 1:  # many runs have two ranks
        own["CUDA_VISIBLE_DEVICES"] = ""
    return {**inherited, **own, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **extra}


SERVER = """
import json, os, signal, sys
import hydra.main, torch, transformers
from transformers import BertForSequenceClassification, LlamaForCausalLM, T5ForConditionalGeneration
import ftcore.loop, ftcore.saved
from ftcore.cli import main

def command(arguments, cwd, env, out):
    for stream in (1, 2):
        os.dup2(os.open(f"{out}.{stream}", os.O_CREAT | os.O_WRONLY), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    sys.argv = ["ftcore", *arguments]
    try:
        code = main()
    except SystemExit as ended:
        code = ended.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)

signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the watchers
for line in sys.stdin:
    job = json.loads(line)
    if os.fork() == 0:  # a watcher: waits for the command, and writes down how it ended
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        if (child := os.fork()) == 0:
            command(**job)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with open(job["out"] + ".tmp", "w") as file:
            file.write(str(code))
        os.rename(job["out"] + ".tmp", job["out"] + ".code")
        os._exit(0)
"""


class Server:
    """A process that has imported what every run imports; a command is a process forked off it.

    A start of its own takes seconds. `start` and `run(python=...)` are such, and the tests of what is
    imported when.
    """

    def __init__(self) -> None:
        self.folder = Path(mkdtemp(prefix="ftcore-tests-"))
        atexit.register(rmtree, self.folder, ignore_errors=True)
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, env=environment(self.folder), text=True
        )
        atexit.register(self.process.kill)
        self.count = itertools.count()
        self.lock = threading.Lock()

    def run(
        self, arguments: Sequence[str], cwd: Path, env: Mapping[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        out = self.folder / str(next(self.count))
        job = {"arguments": list(arguments), "cwd": str(cwd), "env": dict(env), "out": str(out)}
        assert self.process.stdin is not None
        with self.lock:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
        deadline = time.monotonic() + timeout
        code = out.with_name(f"{out.name}.code")
        while not code.exists():
            assert self.process.poll() is None, "the tests' server has ended"
            assert time.monotonic() < deadline, f"{arguments} takes more than {timeout} s"
            time.sleep(0.01)
        said = [out.with_name(f"{out.name}.{stream}").read_text() for stream in (1, 2)]
        return subprocess.CompletedProcess(list(arguments), int(code.read_text()), *said)


LOCK = threading.Lock()
_made = functools.cache(Server)


def server() -> Server:
    """The server of this process of tests, made when it is first asked for."""
    with LOCK:  # some tests run commands from threads
        return _made()


def run(
    arguments: Sequence[str],
    cwd: Path,
    env: Mapping[str, str] | None = None,
    *,
    python: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """`ftcore ARGUMENTS` in `cwd`, to its end; by another `python`, in a process of that."""
    whole = environment(cwd) | dict(env or {})
    if python is None:
        return server().run(arguments, cwd, whole, timeout=240)
    return subprocess.run(
        [python, "-m", "ftcore", *arguments],
        cwd=cwd,
        env=whole,
        capture_output=True,
        text=True,
        timeout=240,
    )


def runs(many: Sequence[Sequence[str]], cwd: Path) -> list[subprocess.CompletedProcess[str]]:
    """`run` of several command lines, two at a time; each has to end well."""
    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(lambda arguments: run(arguments, cwd), many))
    for one in ended:
        assert one.returncode == 0, f"{one.args}\n{one.stdout}\n{one.stderr}"
    return ended


def run_each(
    many: Sequence[Sequence[str]], cwd: Path, env: Mapping[str, str] | None = None
) -> list[subprocess.CompletedProcess[str]]:
    """`run` of several command lines, one after another, however they end."""
    return [run(arguments, cwd, env) for arguments in many]


def start(arguments: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """`ftcore ARGUMENTS` in the background, leading a process group of its own; output in one stream."""
    return subprocess.Popen(
        [sys.executable, "-m", "ftcore", *arguments],
        cwd=cwd,
        env=environment(cwd) | dict(env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int, timeout: float = 120) -> None:
    """Wait until the run has saved a checkpoint of `step` or later."""
    deadline = time.monotonic() + timeout
    while not any(int(d.name[5:]) >= step for d in (run_dir / "checkpoints").glob("step-*")):
        assert process.poll() is None, f"ended before step {step}: {process.communicate()[0]}"
        assert time.monotonic() < deadline, f"no checkpoint of step {step} in {timeout} s"
        time.sleep(0.005)


def children(pid: int) -> list[int]:
    """Direct child processes of `pid` that are ranks."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            command = (stat.parent / "cmdline").read_bytes()
        except OSError:
            continue  # it ended meanwhile
        if int(fields[1]) == pid and b"ftcore.worker" in command:
            found.append(int(stat.parent.name))
    return sorted(found)


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill_all(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the run and its ranks, as a machine that goes down."""
    ranks = children(process.pid)
    for pid in (process.pid, *ranks):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"


def result(run_dir: Path) -> dict[str, Any]:
    """`result.json` of a run."""
    read: dict[str, Any] = json.loads((run_dir / "result.json").read_text())
    return read


def records(run_dir: Path) -> list[dict[str, Any]]:
    """Every record of `metrics.jsonl`."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def steps(run_dir: Path) -> list[dict[str, Any]]:
    """The training records."""
    return [r for r in records(run_dir) if "loss" in r]


def evaluations(run_dir: Path) -> list[dict[str, Any]]:
    """The evaluation records."""
    return [r for r in records(run_dir) if "loss" not in r]


def weights(run_dir: Path) -> bytes:
    """The exported weights, to compare bit for bit."""
    return (run_dir / "model" / "model.safetensors").read_bytes()


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """A jsonl file; returns its path as an argument takes it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_rows(task: str, count: int, seed: int = 0) -> list[dict[str, str]]:
    """Ragged rows (2 to 15 words) that a tiny model can learn something from."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        label = CLASSES[i % len(CLASSES)]
        text = " ".join(rng.choice(WORDS[label]) for _ in range(rng.randint(2, 15)))
        row = {"classify": {"label": label}, "seq2seq": {"target": label}, "causal_lm": {}}[task]
        rows.append({"text": f"{text} {i}", "second": f"about {label}", "shop": "ab"[i % 2], **row})
    return rows


def make_data(folder: Path, task: str, train: int = 41, other: int = 12) -> list[str]:
    """Data of a task as files, and the arguments that use them with the task's tiny model."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"train": train, "validation": other, "test": other}
    files = [
        f"data.{split}={write_rows(folder / f'{split}.jsonl', make_rows(task, size, seed))}"
        for seed, (split, size) in enumerate(sizes.items())
    ]
    model = {"classify": "tiny_bert", "causal_lm": "tiny_llama", "seq2seq": "tiny_t5"}[task]
    return [f"task={task}", f"model={model}", "data=files", *files, "task.max_new_tokens=8"]


def make_plugin(site: Path, name: str, source: str, options: str = "", requires: str = "ftcore") -> None:
    """Install a plugin as pip would: a package with `conf/`, and its dist-info, in a directory.

    Args:
        site: the directory, to be given as PYTHONPATH.
        source: the package's `__init__.py`; its class is called `Plugin`.
        options: the lines of its YAML after the package line.
    """
    package = site / f"ftcore_{name}"
    (package / "conf" / "plugin").mkdir(parents=True)
    (package / "__init__.py").write_text(source)
    (package / "conf" / "plugin" / f"{name}.yaml").write_text(f"# @package plugin.{name}\n{options}\n")
    info = site / f"ftcore_{name}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: ftcore-{name}\nVersion: 1.2\nRequires-Dist: {requires}\n"
    )
    (info / "entry_points.txt").write_text(f"[ftcore.plugins]\n{name} = ftcore_{name}:Plugin\n")
