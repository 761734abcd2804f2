"""Runs in one process or on real ranks, many to a process: starting one takes longer than a tiny run.

    cases.py FOLDER PLACES    forks a rank for each environment of PLACES, which runs all of FOLDER/cases.json
    run_case(...)             one case, in this process

A case is a config (dotted keys), and what to do: `from` (the case whose checkpoint it goes on from),
`stop_at` a step, fp16's first loss `scale`, a rank with a NaN loss (`nan_on`), `export`; or a whole
`config`, as `compose` gives it. It leaves folder/NAME/, with losses and gradient norms in metrics.jsonl.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

ROWS = [{"text": f"row {i} " + "ab" * (i * 5 % 11), "label": ("yes", "no", "so")[i % 3]} for i in range(41)]
COMMON = {
    "model.path": "ftcore:tiny_bert",
    "model.dropout": 0.0,
    "data.source": "files",
    "train.batch_size": 8,
    "train.micro_batch_size": 2,
    "train.log_every": 1,
    "train.steps": 4,
    "train.keep": "resume",
    "optim.lr": 1e-2,
    "seed": 3,
}


def zero(stage: int, **options: Any) -> dict[str, Any]:
    """The trainer node of ZeRO."""
    return {"trainer": {"strategy": "deepspeed", "stage": stage, **options}}


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested dicts."""
    plain: dict[str, Any] = {}
    for key, value in flat.items():
        *groups, name = key.split(".")
        node = plain
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = value
    return plain


def write(folder: Path, cases: Mapping[str, Mapping[str, Any]]) -> None:
    """Data and cases, for ranks to run."""
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "cases.json").write_text(json.dumps(cases))


def run_case(folder: Path, name: str, case: Mapping[str, Any]) -> Any:
    """Train one case to its end, or to `stop_at`; returns the job."""
    from ftcore.config import from_plain
    from ftcore.errors import Interrupted, TrainingError
    from ftcore.job import open_job
    from ftcore.launch import rank_environment
    from ftcore.loop import train
    from ftcore.results import cut_metrics, export
    from ftcore.screen import Screen
    from ftcore.signals import StopFlag

    run_dir, first = folder / name, rank_environment()[0] == 0
    if first:
        shutil.copytree(folder / case["from"], run_dir) if "from" in case else run_dir.mkdir()
        (run_dir / "metrics.jsonl").unlink(missing_ok=True)
    overrides = {
        k: v for k, v in case.items() if k not in ("from", "export", "stop_at", "scale", "nan_on", "config")
    }
    made = nested(COMMON | {"data.train": str(folder / "train.jsonl")} | overrides)
    cfg = from_plain(case.get("config", made))
    stop = StopFlag()
    _barrier()
    job = open_job(cfg, run_dir, lambda _: Screen(False), stop)
    if first:
        cut_metrics(run_dir, job.progress.step, job.progress.evaluated)
    if "scale" in case:
        job.strategy.scaler.load_state_dict(job.strategy.scaler.state_dict() | {"scale": case["scale"]})
    if "stop_at" in case:
        hook = job.hooks.on_step_end

        def on_step_end(state: Any) -> None:
            hook(state)
            stop.code = 75 if state.step + 1 >= case["stop_at"] else 0  # is seen in the step after

        job.hooks.on_step_end = on_step_end
    if case.get("nan_on") == job.strategy.rank:
        compute = job.hooks.compute_loss

        def compute_loss(*arguments: Any) -> Any:
            task = compute(*arguments)["task"]
            return {"task": replace(task, sum=task.sum * float("nan"))}

        job.hooks.compute_loss = compute_loss
    try:
        with contextlib.suppress(Interrupted):
            train(job)
    except TrainingError as error:
        (run_dir / f"error-{job.strategy.rank}").write_text(str(error))
    if case.get("export"):
        export(job, {})
    return job


def run_toy(folder: Path, name: str, case: Mapping[str, Any]) -> None:
    """Two layers, of which the second step uses one: gradients of each, by rank, and what a shard writes."""
    import torch

    from ftcore import UserError
    from ftcore.config import Config
    from ftcore_deepspeed import DeepSpeed
    from ftcore_deepspeed._config import derive
    from ftcore_deepspeed._strategy import ZeRO

    cfg, options = Config(), DeepSpeed(stage=case["toy"])
    strategy = ZeRO(cfg, options, *derive(cfg, options, 2))
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 5), "b": torch.nn.Linear(3, 5)})
    model.forward = lambda x, layers: sum(model[layer](x).sum() for layer in layers)
    strategy.prepare(model, lambda m: torch.optim.AdamW(m.parameters(), lr=0.1))
    found: dict[str, Any] = {"gradients": [], "covered": {}}
    x = torch.ones(2, 3) * (1 + strategy.rank)
    for layers in ("ab", "a"):
        for last in (False, True):
            strategy.backward(strategy.model(x, layers), last=last)
        strategy.finish_gradients()
        shards = strategy.shards()
        found["gradients"].append({s.name: s.grad.tolist() for s in shards if s.grad is not None})
        found["covered"] = {s.name: [s.offset, s.value.numel(), *s.shape] for s in shards}
        strategy.clip(None)
        strategy.step(0.1)
    for shard in strategy.shards():
        shard.value.copy_(torch.arange(shard.value.numel()) + float(shard.offset))
    strategy.sync_shards()
    found["output"] = float(strategy.model(torch.ones(1, 3), "ab").detach())
    if strategy.slices is not None:
        strategy.slices.parts |= {"a.weight": replace(strategy.slices.parts["a.weight"], numel=0)}
        try:
            strategy._check_slices(strategy.slices)
        except UserError as error:
            found["refused"] = str(error)
    strategy.close()
    (folder / f"{name}-{strategy.rank}.json").write_text(json.dumps(found))


def _barrier() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()


def main(folder: Path) -> None:
    """A rank: all cases, one after another."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        if "toy" in case:
            run_toy(folder, name, case)
        else:
            run_case(folder, name, case).strategy.close()
    _barrier()


def trajectory(folder: Path, name: str) -> list[float]:
    """Loss and gradient norm of every step."""
    records = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
    return [value for r in records for value in (r["loss"], r["grad_norm"])]


def fork(folder: Path, place: Mapping[str, str]) -> int:
    """A rank as a process forked off this one, which has imported what takes seconds; its process id."""
    if child := os.fork():
        return child
    code = 1
    try:
        os.environ.update(place)
        main(folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    import deepspeed  # noqa: F401
    from transformers import BertForSequenceClassification, LlamaForCausalLM, T5ForConditionalGeneration  # noqa: F401

    ranks = {fork(Path(sys.argv[1]), place) for place in json.loads(sys.argv[2])}
    while ranks:
        ended, status = os.wait()
        ranks.remove(ended)
        if status:  # the others wait for it
            for rank in ranks:
                os.kill(rank, signal.SIGKILL)
            sys.exit(1)
