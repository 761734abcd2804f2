"""The configuration: its dataclasses (each default lives here, once), checks, and arithmetic.

Hydra's object stops at `compose`: everything after it sees `Config`. Imports neither Hydra nor torch.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ftcore.errors import UserError, nearest

__all__ = [
    "Columns",
    "Config",
    "Csv",
    "DataConfig",
    "FilesData",
    "HubData",
    "ModelConfig",
    "OptimConfig",
    "SCHEMAS",
    "TaskConfig",
    "TrainConfig",
    "TrainerConfig",
    "validate",
]

TASKS = ("classify", "causal_lm", "seq2seq")
SCHEDULES = ("constant", "linear", "cosine")
UNESSENTIAL = ("resume", "keep", "keep_last", "log_every")  # of `train`: they change no weight
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass
class ModelConfig:
    """`path` is a directory, a GGUF file, a hub id, or `ftcore:NAME` for a model that ftcore knows."""

    path: str = ""
    revision: str | None = None
    dropout: float | None = None  # every dropout of the model; null leaves each as it is
    trust_remote_code: bool = False
    add_tokens: str | None = None  # a text file, one new token a line


@dataclass
class Columns:
    """Which column of the data is what. `group` names slices to report metrics for."""

    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    target: str = "target"
    group: str | None = None


@dataclass
class Limit:
    """Rows kept of each split: N drawn by `data.split_seed`, labels in proportion; null keeps all."""

    train: int | None = None
    validation: int | None = None
    test: int | None = None


@dataclass
class DataConfig:
    """What every source of data has."""

    source: str = ""
    columns: Columns = field(default_factory=Columns)
    split: list[float] | None = None  # shares [train, validation, test] cut from data.train
    split_seed: int = 0
    limit: Limit = field(default_factory=Limit)
    max_length: int = 256  # tokens a row, special tokens included
    max_truncated: float = 0.5  # largest share of rows that may be cut to max_length
    max_dropped: float = 0.0  # largest share of rows that may be unusable
    workers: int = 1  # processes that format rows


@dataclass
class Csv:
    """How delimited text is written; null is found out from each file."""

    delimiter: str | None = None  # one character, or `tab`
    quote: str | None = None  # one character; "" reads quotes as any other character
    encoding: str | None = None  # a name that Python knows


@dataclass
class FilesData(DataConfig):
    """Files: jsonl, csv or parquet, or a directory of them (`ftcore:NAME` is in the package)."""

    source: str = "files"
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    csv: Csv = field(default_factory=Csv)
    streaming: bool = False


@dataclass
class Splits:
    """The repository's own names of the splits."""

    train: str = "train"
    validation: str | None = "validation"
    test: str | None = "test"


@dataclass
class HubData(DataConfig):
    """A repository that `datasets.load_dataset(path, name)` reads."""

    source: str = "hub"
    path: str = ""
    name: str | None = None
    revision: str | None = None
    splits: Splits = field(default_factory=Splits)
    streaming: bool = False


@dataclass
class TaskConfig:
    """What is learned. `metric` picks the best weights; null is the task's own.

    `name: auto` is seq2seq for an encoder-decoder, and causal_lm for other models.
    """

    name: str = "classify"
    metric: str | None = None
    label_smoothing: float = 0.0
    max_new_tokens: int = 64  # generated at evaluation (seq2seq)


@dataclass
class OptimConfig:
    """AdamW (decoupled decay; none on biases and norms)."""

    lr: float = 2e-5  # files in conf/model/ set what suits their model
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    schedule: str = "linear"  # constant, linear or cosine, after the warm-up
    warmup: float = 0.1  # below 1 a share of all steps, else a number of steps


@dataclass
class TrainerConfig:
    """Where it runs: `single` (one process) or `ddp` (a process per device)."""

    strategy: str = "single"
    devices: int | None = None  # local ranks; null is 1, or every GPU under ddp
    device: str | None = None  # cuda, mps or cpu; null takes the first there is


@dataclass
class TrainConfig:
    """How it trains. Sizes count rows."""

    batch_size: int = 16  # per optimiser step, over all ranks
    micro_batch_size: int | None = None  # per forward on one rank; null is batch_size / ranks
    epochs: float = 8
    steps: int | None = None  # wins over epochs
    precision: str = "fp32"
    max_grad_norm: float | None = 1.0
    gradient_checkpointing: bool = False
    eval_every: int | None = None  # steps; null is once an epoch
    save_every: int | None = None  # steps; null is once an epoch
    log_every: int = 10
    keep_last: int = 2  # checkpoints kept while training
    early_stop: int | None = None  # stop after so many evaluations without a new best
    resume: bool = True  # go on from an unfinished run's checkpoint
    keep: str = "result"  # `resume` keeps the last checkpoint, optimiser state and all, after success


@dataclass
class Config:
    """One run."""

    model: Any = field(default_factory=ModelConfig)
    data: Any = field(default_factory=FilesData)
    task: Any = field(default_factory=TaskConfig)
    optim: Any = field(default_factory=OptimConfig)
    trainer: Any = field(default_factory=TrainerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    plugin: dict[str, Any] = field(default_factory=dict)  # name: options, the chosen ones, in order
    name: str = "default"
    seed: int = 0
    offline: bool = False
    force: bool = False

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same run: everything but how it is started, kept and split over devices."""
        plain = dataclasses.asdict(self)
        for key in ("force", "name", "offline", "trainer"):
            del plain[key]
        del plain["data"]["workers"]
        for key in UNESSENTIAL:
            del plain["train"][key]
        return plain

    def chosen_plugins(self) -> dict[str, dict[str, Any]]:
        """Options by plugin, in the order of selection; a strategy that a plugin brings comes last."""
        chosen = dict(self.plugin)
        if self.trainer_plugin is not None:
            chosen[self.trainer_plugin] = {k: v for k, v in self.trainer.items() if k != "strategy"}
        return chosen

    @property
    def trainer_plugin(self) -> str | None:
        """The plugin that brings the strategy, whose options are the trainer's."""
        return str(self.trainer["strategy"]) if isinstance(self.trainer, dict) else None

    def micro_batch_size(self, world_size: int) -> int:
        """Rows per forward on one rank; the default shares the batch out over the ranks."""
        return self.train.micro_batch_size or -(-self.train.batch_size // world_size)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimiser steps of the whole run."""
        if self.train.steps is not None:
            return self.train.steps
        return max(1, math.ceil(self.train.epochs * steps_per_epoch))


SCHEMAS: dict[str, dict[str, type[Any]]] = {
    "model": {"model": ModelConfig},
    "data": {"files": FilesData, "hub": HubData},
    "task": {"task": TaskConfig},
    "optim": {"optim": OptimConfig},
    "trainer": {"trainer": TrainerConfig},
}
"""Per config group, the schemas that a YAML file takes by `defaults: [/schema/NAME@_here_]`."""


def from_plain(plain: dict[str, Any]) -> Config:
    """Typed `Config` from nested dicts (a composed config, or a saved `config.yaml`).

    The trainer node of a strategy that a plugin brings stays a dict: it holds that plugin's options.

    Raises:
        UserError: unknown key (with the nearest), wrong type, or a value out of range.
    """
    types = {group: next(iter(schemas.values())) for group, schemas in SCHEMAS.items()}
    source = (plain.get("data") or {}).get("source", "")
    if source not in SCHEMAS["data"]:
        raise UserError(f"data.source '{source}': {nearest(str(source), SCHEMAS['data'])}")
    types["data"] = SCHEMAS["data"][source]
    nodes = {}
    for group, schema in types.items():
        node = plain.get(group) or {}
        if group == "trainer" and node.get("strategy", "single") not in ("single", "ddp"):
            nodes[group] = node
        else:
            nodes[group] = _typed(schema, node, group)
    rest = {k: v for k, v in plain.items() if k not in nodes and k != "plugin"}
    cfg: Config = _typed(Config, rest, "")
    for group, node in nodes.items():
        setattr(cfg, group, node)
    cfg.plugin = {name: dict(options or {}) for name, options in (plain.get("plugin") or {}).items()}
    validate(cfg)
    return cfg


def _typed(schema: type[Any], node: dict[str, Any], prefix: str) -> Any:
    """`node` merged into a dataclass, by OmegaConf's own conversions."""
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), node))
    except ConfigKeyError as error:
        key = ".".join(filter(None, (prefix, error.full_key)))
        known = [f.name for f in dataclasses.fields(error.object_type or schema)]
        hint = nearest(str(error.key), known, key.removesuffix(str(error.key)))
        raise UserError(f"no config key '{key}'; {hint}") from error
    except OmegaConfBaseException as error:
        key = ".".join(filter(None, (prefix, error.full_key)))
        raise UserError(f"{key}: wrong type: {str(error).partition(chr(10))[0]}") from error


COUNTS = (
    *("train.batch_size", "train.micro_batch_size", "train.steps", "train.eval_every", "train.save_every"),
    *("train.log_every", "train.keep_last", "train.early_stop", "task.max_new_tokens", "data.workers"),
    *("data.limit.train", "data.limit.validation", "data.limit.test"),
)
"""Keys of at least 1, or null."""

RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "train.epochs": ("above 0, and finite", lambda x: 0 < x < math.inf),
    "train.max_grad_norm": ("above 0 (null does not clip)", lambda x: x is None or x > 0),
    "train.keep": ("'result' or 'resume'", lambda x: x in ("result", "resume")),
    "train.precision": (f"one of {PRECISIONS}", lambda x: x in PRECISIONS),
    "optim.lr (the learning rate)": ("above 0", lambda x: x > 0),
    "optim.weight_decay": ("at least 0", lambda x: x >= 0),
    "optim.eps": ("above 0", lambda x: x > 0),
    "optim.warmup": ("at least 0", lambda x: x >= 0),
    "optim.schedule": (f"one of {SCHEDULES}", lambda x: x in SCHEDULES),
    "optim.betas": ("two numbers in [0, 1)", lambda x: len(x) == 2 and all(0 <= beta < 1 for beta in x)),
    "task.label_smoothing": ("in [0, 1)", lambda x: 0 <= x < 1),
    "task.name": (f"one of {(*TASKS, 'auto')}", lambda x: x in (*TASKS, "auto")),
    "model.dropout": ("in [0, 1) or null", lambda x: x is None or 0 <= x < 1),
    "data.max_length": ("at least 4", lambda x: x >= 4),
    "data.max_truncated": ("a share, 0 to 1", lambda x: 0 <= x <= 1),
    "data.max_dropped": ("a share, 0 to 1", lambda x: 0 <= x <= 1),
    "data.split_seed": ("at least 0", lambda x: x >= 0),
    "data.split": (
        "three shares that sum to 1: train (above 0), validation, test",
        lambda x: x is None or (len(x) == 3 and min(x) >= 0 < x[0] and abs(sum(x) - 1) < 1e-6),
    ),
    "data.csv.delimiter": ("one character or 'tab'", lambda x: x in (None, "tab") or len(x) == 1),
    "data.csv.quote": ("one character or ''", lambda x: x is None or len(x) <= 1),
    "trainer.devices": ("at least 1", lambda x: x is None or x >= 1),
}
"""What a key's value must be, in words, and whether it is."""


def validate(cfg: Config) -> None:
    """Refuse values that no run can work with.

    Raises:
        UserError: names the key, the rule and the value.
    """
    for key in COUNTS:
        _check(cfg, key, "at least 1", lambda x: x is None or x >= 1)
    for key, (must, holds) in RULES.items():
        _check(cfg, key, must, holds)
    size, task, trainer = cfg.train.batch_size, cfg.task.name, cfg.trainer
    at_most = f"at most train.batch_size ({size})"
    _check(cfg, "train.micro_batch_size", at_most, lambda x: (x or 1) <= size)
    if task != "classify":
        null = f"null for task={task}, which reads one text"
        _check(cfg, "data.columns.text_pair", null, lambda x: x is None)
    if isinstance(trainer, TrainerConfig) and trainer.strategy == "single" and (trainer.devices or 1) > 1:
        raise UserError(
            f"trainer=single runs on one device, got trainer.devices={trainer.devices}; use trainer=ddp"
        )


def _check(cfg: Config, key: str, must: str, holds: Callable[[Any], bool]) -> None:
    """Refuse a key's value, where the key is: sources of data and plugins' trainers have others.

    What follows a space in `key` explains it to the user.
    """
    node: Any = cfg
    *groups, name = key.partition(" ")[0].split(".")
    for group in groups:
        node = getattr(node, group, None)
    if hasattr(node, name) and not holds(value := getattr(node, name)):
        raise UserError(f"{key} must be {must}, got {value}")
