"""A trained model opened to answer: a run's directory, a model directory or a hub id.

A run brings its config, so that rows are formatted, batched and scored as they were in training. A
model brings its own class and label names. Nothing is written where it lies.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftcore.config import Config, TrainerConfig, from_plain
from ftcore.errors import UserError
from ftcore.job import Job, build_hooks
from ftcore.models import check_positions, go_offline, locate, text_task
from ftcore.prepare import prepare
from ftcore.run import read_config
from ftcore.screen import Screen
from ftcore.signals import StopFlag
from ftcore.strategies import Single

__all__ = ["Saved", "model_of", "open_saved", "ready"]

SETTINGS = (
    "data.",
    "task.max_new_tokens",
    "train.micro_batch_size",
    "train.precision",
    "trainer.device",
    "model.revision",
    "model.trust_remote_code",
    "offline",
)
"""What may be set when a trained model is used; other keys would do nothing."""

TASKS_BY_CLASS = {
    "ForSequenceClassification": "classify",
    "ForConditionalGeneration": "seq2seq",
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
}


@dataclass(kw_only=True)
class Saved:
    """A trained model, and the config that uses it.

    Attributes:
        cfg: with `model.path` at the trained model, one process, and the settings given.
        labels: class names in the model's order; empty where it does not classify.
        run: what `run.json` says; None for a model that is no run's.
        result: the run's `result.json`.
    """

    cfg: Config
    labels: list[str]
    run: dict[str, Any] | None = None
    result: dict[str, Any] | None = None


def open_saved(where: str, settings: Sequence[str]) -> Saved:
    """Read what `where` says of itself, and take over `settings` (`key=value`); no weights yet.

    Raises:
        UserError: no model there, a run that has not finished, a setting that would do nothing.
    """
    folder = Path(where).expanduser()
    saved = _of_run(folder.resolve()) if (folder / "config.yaml").is_file() else _of_model(where, settings)
    saved.cfg = _set(saved.cfg, settings)
    return saved


def model_of(folder: Path) -> Path:
    """The directory of a finished run's model.

    Raises:
        UserError: it has not finished, was pruned, or its model was taken away.
    """
    if not (folder / "result.json").is_file():
        raise UserError(f"{folder} has not finished; go on with: ftcore resume {folder}")
    if not (folder / "model").is_dir():
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        pruned = f": it was pruned ({result.get('reason')})" if result.get("status") == "pruned" else ""
        raise UserError(f"{folder} has no model/{pruned}; force=true with its command trains it again")
    return folder / "model"


def _of_run(folder: Path) -> Saved:
    cfg = read_config(folder)
    model = model_of(folder)
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    device = cfg.trainer.get("device") if isinstance(cfg.trainer, dict) else cfg.trainer.device
    cfg.model.path, cfg.model.revision, cfg.model.add_tokens = str(model), None, None
    cfg.trainer = TrainerConfig(device=device)
    if cfg.task.name == "auto":
        cfg.task.name = text_task(cfg)
    cfg.train.micro_batch_size = run["micro_batch_size"]  # the same batches, so the same digits
    cfg.train.batch_size = max(cfg.train.batch_size, run["micro_batch_size"])
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return Saved(cfg=cfg, labels=run["data"]["labels"], run=run, result=result)


def _of_model(where: str, settings: Sequence[str]) -> Saved:
    cfg = Config(trainer=TrainerConfig())
    cfg.model.path = str(Path(where).expanduser().absolute()) if Path(where).expanduser().is_dir() else where
    settled = _set(cfg, [s for s in settings if s.startswith(("model.", "offline"))])
    go_offline(settled)
    path = locate(settled.model)
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(
            path,
            revision=settled.model.revision,
            trust_remote_code=settled.model.trust_remote_code,
            local_files_only=settled.offline,
        )
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{where} is neither a run nor a model: {reason}") from error
    kind = (config.architectures or [""])[0]
    task = next((t for suffix, t in TASKS_BY_CLASS.items() if kind.endswith(suffix)), None)
    if task is None:
        raise UserError(
            f"{where} is a {kind or config.model_type}, which has no head for a task; train it first"
        )
    cfg.task.name = task
    names: dict[int, str] = config.id2label if task == "classify" else {}
    return Saved(cfg=cfg, labels=[str(names[i]) for i in sorted(names)])


def _set(cfg: Config, settings: Sequence[str]) -> Config:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for setting in settings:
        if "=" not in setting:
            raise UserError(f"can't read '{setting}': write key=value")
        if not setting.startswith(SETTINGS):
            known = ", ".join(f"{s}*" if s.endswith(".") else s for s in SETTINGS)
            raise UserError(f"'{setting}' would do nothing here; what can be set: {known}")
    plain = asdict(cfg)
    try:
        changed: Any = OmegaConf.merge(OmegaConf.create(plain), OmegaConf.from_dotlist(list(settings)))
    except OmegaConfBaseException as error:
        raise UserError(f"can't read {' '.join(settings)}: {str(error).partition(chr(10))[0]}") from error
    wanted: Any = OmegaConf.to_container(changed)
    if any(s.startswith("train.micro_batch_size") for s in settings):  # nothing is trained here
        wanted["train"]["batch_size"] = wanted["train"]["micro_batch_size"] or cfg.train.batch_size
    return from_plain(wanted)


def ready(saved: Saved, screen: Screen, file: str | None = None, split: str = "test") -> Job:
    """The model on its device and the data formatted: what `evaluation.predict` works with.

    Args:
        file: rows in place of the config's own data, which become `split`.

    Raises:
        UserError: labels that are not the model's, or whatever the data can't be read or formatted for.
    """
    import torch

    cfg, raw = saved.cfg, None
    hooks = build_hooks(cfg)
    tokenizer = hooks.load_tokenizer()
    if file is not None:
        raw = {split: hooks.load_file(str(Path(file).expanduser().absolute()), split)}
        if split == "test":
            _check_labels(saved, raw[split], file)
    prepared = prepare(hooks, tokenizer, raw=raw, labels=saved.labels if raw is not None else None)
    if prepared.labels != saved.labels:
        raise UserError(
            f"the data's labels are {', '.join(prepared.labels)}; the model's are {', '.join(saved.labels)}"
        )
    strategy = Single(cfg)
    if saved.run is not None and strategy.device.type == "cpu":
        # Another number of threads adds up in another order, which changes last digits.
        torch.set_num_threads(saved.run["machine"].get("threads") or torch.get_num_threads())
    model: Any = hooks.load_exported(tokenizer, saved.labels)
    check_positions(model, prepared.longest())
    if getattr(model.config, "use_cache", None):
        model.config.use_cache = False
    strategy.prepare(model, lambda m: torch.optim.SGD(m.parameters()))
    return Job(
        cfg=cfg,
        hooks=hooks,
        strategy=strategy,
        tokenizer=tokenizer,
        prepared=prepared,
        run_dir=Path(cfg.model.path).parent,
        screen=screen,
        stop=StopFlag(),
    )


def _check_labels(saved: Saved, dataset: Any, file: str) -> None:
    """Refuse data whose labels are not the model's, before anything is formatted."""
    if saved.cfg.task.name != "classify":
        return
    from ftcore.data import label_names, require_columns

    column = saved.cfg.data.columns.label
    require_columns(dataset.column_names, [column], saved.cfg, "test")
    found = label_names(dataset, column)
    if unknown := [name for name in found if name not in saved.labels]:
        raise UserError(
            f"{file}: the model does not know the labels {', '.join(map(repr, unknown[:5]))} of column"
            f" '{column}'; it knows {', '.join(map(repr, saved.labels[:20]))}"
        )
