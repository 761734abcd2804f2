"""What a run leaves behind: `config.yaml`, `run.json`, `metrics.jsonl`, `result.json`, `model/`."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any

import torch

from ftcore import __version__, models
from ftcore.card import model_card
from ftcore.errors import UserError
from ftcore.job import Job
from ftcore.predictions import tabulate, write_table
from ftcore.strategies import base_model, whole_shape

__all__ = [
    "append_metrics",
    "cut_metrics",
    "describe_run",
    "export",
    "keep_predictions",
    "plugin_cost",
    "write_json",
]

PACKAGES = (
    "transformers",
    "tokenizers",
    "datasets",
    "hydra-core",
    "omegaconf",
    "pluggy",
    "numpy",
)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old one or the new one, never half of it."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    scratch.replace(path)


def append_metrics(run_dir: Path, record: Mapping[str, Any]) -> None:
    """Add one record to `metrics.jsonl`."""
    with (run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def cut_metrics(run_dir: Path, step: int, evaluated: int) -> None:
    """Take away the records of steps that a resumed run makes again."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the last line of a killed run may be half written
        if record["step"] <= (step if "loss" in record else evaluated):
            kept.append(line + "\n")
    scratch = path.with_name(".metrics.jsonl")
    scratch.write_text("".join(kept), encoding="utf-8")
    scratch.replace(path)


def keep_predictions(job: Job, predictions: Mapping[str, Sequence[Any]], split: str, directory: Path) -> None:
    """Write `SPLIT.parquet`, a line per row of the data (rank 0)."""
    if job.strategy.rank == 0:
        examples = job.prepared.splits[split].examples.tolist()
        table = tabulate(predictions, job.prepared.labels, examples)
        try:
            write_table(table, directory / f"{split}.parquet")
        except UserError as error:
            raise UserError(f"{error}; make room and run `ftcore resume {job.run_dir}`") from error


def describe_run(job: Job) -> dict[str, Any]:
    """What `run.json` holds: plugins, versions, data, model, code and machine."""
    cfg, model = job.cfg, base_model(job.strategy.model)
    return {
        "ftcore": __version__,
        "plugins": [
            {
                "name": p.name,
                "distribution": p.distribution,
                "version": p.version,
                "source": p.source,
                "options": p.options,
                # What the plugin did to this model, where it says so.
                **({"describes": p.instance.describe()} if hasattr(p.instance, "describe") else {}),
            }
            for p in job.hooks.plugins
        ],
        # torch's own version says for which CUDA it was built, too.
        "packages": {"torch": torch.__version__, **{name: v for name in PACKAGES if (v := _version(name))}},
        "data": {
            "fingerprint": job.prepared.fingerprint,
            "source": job.prepared.source,
            "from_files": job.prepared.from_files,
            "splits": {name: asdict(audit) for name, audit in job.prepared.audits.items()},
            "labels": job.prepared.labels,
        },
        "model": {
            **models.origin(cfg, model),
            "class": type(model).__name__,
            "parameters": sum(prod(whole_shape(p)) for p in model.parameters()),
            "new_parameters": sorted(getattr(model, "ftcore_new", ())),
            "trained_parameters": sum(prod(whole_shape(p)) for p in model.parameters() if p.requires_grad),
        },
        "world_size": job.strategy.world_size,
        "micro_batch_size": cfg.micro_batch_size(job.strategy.world_size),
        "device": _device_name(job.strategy.device),
        "git_commit": _git_commit(),
        "machine": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
    }


STEP_HOOKS = (
    "collate",
    "count_units",
    "on_step_start",
    "forward",
    "compute_loss",
    "on_backward_end",
    "regularize",
    "on_gradients",
)


def plugin_cost(job: Job) -> dict[str, dict[str, Any]]:
    """What each plugin cost: its hooks' seconds, and of those in steps the time and share of a step.

    Time of the host, on rank 0, since this process started; what a hook adds to a backward pass, or a
    device has not yet done, is not in it.
    """
    costs = {}
    for name, hooks in job.hooks.seconds.items():
        in_steps = sum(hooks.get(hook, 0.0) for hook in STEP_HOOKS)
        costs[name] = {
            "ms_per_step": round(1e3 * in_steps / max(1, job.steps), 4),
            "share_of_step": round(in_steps / max(job.step_seconds, 1e-9), 4),
            "seconds": {hook: round(seconds, 4) for hook, seconds in hooks.items()},
        }
    return costs


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _git_commit() -> str | None:
    """The commit of the directory ftcore was started in, `+` where files differ from it."""
    try:
        git = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
        dirty = subprocess.run(["git", "diff", "--quiet", "HEAD"], capture_output=True, timeout=5).returncode
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if dirty else "")


def export(job: Job, metrics: Mapping[str, float]) -> None:
    """Write `model/`: weights, config, tokenizer and a model card; loads without ftcore."""
    model, folder = base_model(job.hooks.on_export(job.strategy.model)), job.run_dir / "model"
    model.config.use_cache = True
    if (generation := getattr(model, "generation_config", None)) is not None:
        _generate_as_evaluated(generation, job)
    job.strategy.export(model, folder)
    if job.strategy.rank == 0:
        job.tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(model_card(job, type(model).__name__, metrics), encoding="utf-8")


def _generate_as_evaluated(generation: Any, job: Job) -> None:
    """Make plain `model.generate(**inputs)` answer as the evaluation did; a decoder keeps its own ways."""
    generation._from_model_config = False  # else it is made anew from the model's config when loaded
    generation.use_cache = True
    if generation.pad_token_id is None:
        generation.pad_token_id = job.tokenizer.pad_token_id
    if job.cfg.task.name == "seq2seq":
        generation.do_sample, generation.num_beams = False, 1
        generation.max_new_tokens = job.cfg.task.max_new_tokens
        generation.max_length = None
