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
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
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
import atexit, json, os, signal, sys, threading
import datasets, hydra.main, pandas, torch, transformers
from transformers import BertForSequenceClassification, LlamaForCausalLM, T5ForConditionalGeneration
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
import ftcore.loop, ftcore.saved
from ftcore.cli import main

get_checkpoint_conversion_mapping("bert")  # builds a table of all models, which saving one needs

def command(arguments, cwd, env, out, streams):
    os.setsid()
    for stream, name in zip((1, 2), streams):
        os.dup2(os.open(f"{out}.{name}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    os.dup2(os.open(f"{out}.in", os.O_RDONLY), 0)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    sys.argv = ["ftcore", *arguments]
    tell(out, "pid", os.getpid())
    try:
        code = main()
    except SystemExit as ended:
        code = ended.code
    threading._shutdown()  # as Python ends, but for taking everything apart
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)

def tell(out, name, number):
    with open(f"{out}.{name}.tmp", "w") as file:
        file.write(str(number))
    os.rename(f"{out}.{name}.tmp", f"{out}.{name}")

signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the watchers
for line in sys.stdin:
    job = json.loads(line)
    if os.fork() == 0:  # a watcher: waits for the command, and writes down how it ended
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        if (child := os.fork()) == 0:
            command(**job)
        tell(job["out"], "code", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        os._exit(0)
"""


class Server:
    """A process that has imported what every run imports; a command is a process forked off it.

    A start of its own takes seconds. `run(python=...)` is one, and so are the tests of what a terminal shows,
    of what is imported when, and the ranks that a run starts.
    """

    def __init__(self) -> None:
        self.folder = Path(mkdtemp(prefix="ftcore-tests-"))
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, env=environment(self.folder), text=True
        )
        atexit.register(self.close)
        self.count = itertools.count()
        self.lock = threading.Lock()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        rmtree(self.folder, ignore_errors=True)

    def start(
        self,
        arguments: Sequence[str],
        cwd: Path,
        env: Mapping[str, str],
        said: str = "",
        streams: tuple[str, str] = ("1", "2"),
    ) -> "Process":
        out = self.folder / str(next(self.count))
        out.with_name(f"{out.name}.in").write_text(said)
        job = {"arguments": list(arguments), "cwd": str(cwd), "env": dict(env), "out": str(out)}
        assert self.process.stdin is not None
        with self.lock:
            self.process.stdin.write(json.dumps({**job, "streams": streams}) + "\n")
            self.process.stdin.flush()
        return Process(self, out)


class Process:
    """A command that the server has started; as far as the tests need it, what `subprocess.Popen` is."""

    def __init__(self, server: Server, out: Path) -> None:
        self.server, self.out = server, out
        self.returncode: int | None = None
        self.pid = self._number("pid", 60)

    def _number(self, name: str, timeout: float) -> int:
        path, deadline = self.out.with_name(f"{self.out.name}.{name}"), time.monotonic() + timeout
        while not path.exists():
            assert self.server.process.poll() is None, "the tests' server has ended"
            assert time.monotonic() < deadline, f"no {name} within {timeout} s; printed: {self.printed('1')}"
            time.sleep(0.005)
        return int(path.read_text())

    def poll(self) -> int | None:
        if self.out.with_name(f"{self.out.name}.code").exists():
            self.returncode = self._number("code", 0)
        return self.returncode

    def printed(self, stream: str) -> str:
        """What it has printed so far, on stream 1 or 2."""
        path = self.out.with_name(f"{self.out.name}.{stream}")
        return path.read_text() if path.exists() else ""

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        """Wait for its end; what it printed."""
        self.returncode = self._number("code", timeout)
        return self.printed("1"), self.printed("2")

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


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
    ranks: int = 1,
    said: str = "",
) -> subprocess.CompletedProcess[str]:
    """`ftcore ARGUMENTS` in `cwd`, to its end; by another `python`, in a process of that.

    With `ranks`, so many at once as torchrun would start them; the result is the first one's, or that of one
    that failed. `said` is the standard input.
    """
    whole = environment(cwd) | dict(env or {})
    if python is None:
        with rendezvous(ranks) if ranks > 1 else nullcontext([{}]) as places:
            processes = [server().start(arguments, cwd, whole | place, said) for place in places]
            ended = [(*process.communicate(), process.returncode or 0) for process in processes]
        stdout, stderr, code = next((one for one in ended if one[2]), ended[0])
        return subprocess.CompletedProcess(list(arguments), code, stdout, stderr)
    return subprocess.run(
        [python, "-m", "ftcore", *arguments],
        cwd=cwd,
        env=whole,
        capture_output=True,
        text=True,
        timeout=240,
    )


@contextmanager
def rendezvous(ranks: int) -> Iterator[list[dict[str, str]]]:
    """The environment of each of `ranks` processes, as torchrun's; they meet in a store of this process.

    A port that was only probed for could be taken meanwhile.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    common |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    common |= {"GLOO_SOCKET_IFNAME": "lo"}
    yield [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


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


def start(arguments: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None) -> Process:
    """`ftcore ARGUMENTS` in the background, leading a process group of its own; output in one stream."""
    return server().start(arguments, cwd, environment(cwd) | dict(env or {}), streams=("1", "1"))


def wait_for_step(process: Process, run_dir: Path, step: int, timeout: float = 120) -> None:
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


def kill_all(process: Process) -> None:
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
