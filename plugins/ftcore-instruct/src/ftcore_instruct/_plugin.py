"""The plugin: which hook does what. Each hook calls functions of the other files."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ftcore import Batch, LossTerm, Sampler, Shard, State, Step, UserError, hookimpl, plugin
from ftcore.config import Config
from ftcore.plugins import Meta
from ftcore.sampling import LengthBuckets
from ftcore.store import Rows
from ftcore.strategies import DTYPES, base_model
from ftcore_instruct import _data, _report
from ftcore_instruct._attention import check_flash, check_packing, use_segments
from ftcore_instruct._chat_template import PLAIN
from ftcore_instruct._evaluation import evaluate, predict
from ftcore_instruct._forward import call, count_weights, loss_term
from ftcore_instruct._loss import CHUNK, has_plain_head
from ftcore_instruct._mixture import EpochOrder
from ftcore_instruct._new_tokens import keep_new_rows, new_rows
from ftcore_instruct._packing import PackSampler, flatten, padded
from ftcore_instruct._rows import Encoder

__all__ = ["Instruct"]


@plugin(after=("lora",))  # an adapted head is not read as a plain one: `has_plain_head` sees it
class Instruct:
    """Tune on instructions and chats: formats, mixtures, packing, evaluation (Chung et al., 2022)."""

    # Formats.
    format: Literal["auto", "messages", "sharegpt", "task", "alpaca", "prompt"] = "auto"
    train_on: Literal["assistant", "last", "weights"] = "assistant"
    wrap: Literal["auto", "true", "false"] = "auto"
    system: str | None = None
    chat_template: str | None = None
    templates: str | None = None
    # The mixture.
    sources: dict[str, Any] = field(default_factory=dict)
    cap: int | None = None
    dry: Literal["repeat", "drop", "error"] = "repeat"
    few_shot: float = 0.5
    shots: int = 4
    options: float = 0.5
    cot: float = 0.5
    invert: float = 0.0
    variants: int = 4
    num_tasks: int | None = None
    # What is evaluated.
    held_out: list[str] = field(default_factory=list)
    overlap: Literal["drop", "report", "error", "off"] = "drop"
    overlap_words: int = 8
    overlap_share: float = 0.5
    eval_shots: int = 0
    eval_cot: bool = False
    # Packing, loss and evaluation.
    pack: bool = True
    loss: Literal["auto", "trained", "chunked", "full"] = "auto"
    warm_new_tokens: int = 0
    generate: bool = True
    floors: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("few_shot", "options", "cot", "invert"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a share, 0 to 1, got {getattr(self, name)}")
        for name in ("variants", "overlap_words"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("cap", "num_tasks"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 or null, got {value}")
        if min(self.shots, self.eval_shots, self.warm_new_tokens) < 0:
            raise ValueError("shots, eval_shots and warm_new_tokens must be at least 0")
        if not 0 <= self.overlap_share < 1:
            raise ValueError(f"overlap_share must be in [0, 1), got {self.overlap_share}")
        self._has_template, self._tokenizer = False, None
        self._splits: _data.Splits | None = None
        self._encoders: dict[str, Encoder] = {}
        self._table: list[dict[str, Any]] = []
        if wrong := [t for t, floor in self.floors.items() if not 0 <= floor < 100]:
            raise ValueError(f"floors.{wrong[0]} must be in [0, 100), got {self.floors[wrong[0]]}")
        taken = {"row_tensors": self.pack, "logits": self.loss != "full"}
        meta: Meta = getattr(type(self), "__ftcore__")  # noqa: B009, mypy does not see the decorator's work
        self.__ftcore__ = replace(meta, removes=tuple(w for w, away in taken.items() if away))
        self._decoder, self._can_chunk, self._label_smoothing, self._precision = True, False, 0.0, "fp32"
        self._new_rows: dict[str, Any] = {}

    # Data.

    @hookimpl(wrapper=True)
    def load_tokenizer(self) -> Generator[None, Any, Any]:
        """Give the tokenizer the chat template to train with; it is exported with it."""
        tokenizer = yield
        if self.chat_template is not None:
            tokenizer.chat_template = _read(self.chat_template)
        if tokenizer.chat_template is None:
            tokenizer.chat_template = PLAIN
        self._has_template = tokenizer.chat_template != PLAIN  # which a trained model brings, too
        self._tokenizer = tokenizer
        return tokenizer

    @hookimpl
    def load_data(self, cfg: Config) -> dict[str, Any]:
        self._check(cfg)
        self._splits = _data.load(cfg, vars(self), self._tokenizer)
        if self.system is not None and not self._wraps:
            _data.check_system(self._splits)
        return dict(self._splits.items)

    def _check(self, cfg: Config) -> None:
        """Refuse keys of core's that would do nothing here, and a metric that will not be there."""
        if cfg.data.columns.group is not None:
            raise UserError(
                "data.columns.group does nothing with plugin.instruct, which reports by task; name the column"
                " 'task', or take the key away"
            )
        if cfg.task.name == "seq2seq" and not self.generate and cfg.task.metric is None:
            raise UserError(
                "plugin.instruct.generate=false makes no answers to measure rougeL by; set task.metric=-nll,"
                " choice_accuracy or normalized_average"
            )

    @hookimpl
    def load_file(self, path: str, cfg: Config, split: str) -> Any:
        return _data.load_file(path, cfg, vars(self), asked=split == "predict")

    @hookimpl
    def format_examples(
        self, examples: Sequence[Mapping[str, Any]], tokenizer: Any, cfg: Config, split: str
    ) -> Sequence[Any]:
        # A chat that is too long loses its end, but where an answer is asked for.
        train_on = "last" if split == "predict" else self.train_on
        if train_on not in self._encoders:
            self._encoders[train_on] = Encoder(
                tokenizer,
                seq2seq=cfg.task.name == "seq2seq",
                max_length=cfg.data.max_length,
                train_on=train_on,
                wrap=self._wraps,
                system=self.system,
            )
        return self._encoders[train_on].rows(examples, evaluated=split != "train")

    @property
    def _wraps(self) -> bool:
        """Whether prompts and tasks become chats."""
        return self._has_template if self.wrap == "auto" else self.wrap == "true"

    @hookimpl
    def build_sampler(self, rows: Rows, batch_size: int, seed: int, cfg: Config) -> Sampler:
        assert self._splits is not None
        train = self._splits.items["train"]
        order = EpochOrder(
            rows,
            self._splits.quotas,
            [(train.passes(i) or [0])[0] for i in range(len(train.sources))],
            [s.name for s in train.sources],
            [s.settings.dry for s in train.sources],
            seed,
        )
        self._table = _report.mixture(rows, order, [len(s.kept) for s in train.sources])
        if self.pack:
            sides = [rows.sizes(name) for name in ("input_ids", "labels")]
            longer = np.maximum(*sides).astype(np.int32)
            return PackSampler(order, longer, cfg.data.max_length, batch_size, seed)
        return LengthBuckets(rows.lengths, batch_size, seed, order=order)

    @hookimpl
    def on_train_start(self, state: State) -> None:
        """Show the mixture, and write it and the overlap report into the run's directory.

        Raises:
            UserError: a floor of a task that is not evaluated. (`ftcore evaluate` may be given other tasks.)
                Or flash attention that does not compute, on this GPU, what attention row by row does.
        """
        assert self._splits is not None
        if self._splits.no_floor:
            raise UserError(self._splits.no_floor)
        _report.show(self._table, self._splits.overlap, state.run_dir)
        if self.pack and state.device.type == "cuda" and self._precision in DTYPES:
            config = base_model(state.model).config.get_text_config()
            has_windows = getattr(config, "sliding_window", None) is not None
            for window in (None, 64) if has_windows else (None,):
                check_flash(state.device, DTYPES[self._precision], window=window, cross=not self._decoder)

    # Training.

    @hookimpl(wrapper=True)
    def load_model(self) -> Generator[None, Any, Any]:
        """Packed rows must not see each other: also where a trained model is loaded to be evaluated."""
        model = yield
        self._decoder = not model.config.is_encoder_decoder
        if self.pack:
            use_segments(model)
        return model

    @hookimpl
    def setup_model(self, model: Any, cfg: Config) -> None:
        """Prove that the model can train on packed rows before it does."""
        self._label_smoothing, self._precision = cfg.task.label_smoothing, cfg.train.precision
        can_chunk = self._decoder and has_plain_head(model) and not self._label_smoothing
        self._can_chunk = can_chunk and cfg.train.precision != "fp16" and self.train_on != "weights"
        if self.loss == "chunked" and not self._can_chunk:
            raise UserError(
                f"plugin.instruct.loss=chunked: {type(model).__name__} can't, or not with fp16, label"
                " smoothing or weights; use auto"
            )
        if self.warm_new_tokens:
            self._new_rows = new_rows(model, self._tokenizer, cfg)
        if self.pack:
            check_packing(model, lambda rows: flatten(rows, self._decoder))

    @hookimpl
    def collate(self, examples: Sequence[Mapping[str, Any]], tokenizer: Any) -> Batch:
        if self.pack:
            return flatten(examples, self._decoder)
        return padded(examples, self._decoder, tokenizer.pad_token_id or 0)

    @hookimpl
    def count_units(self, batch: Batch) -> dict[str, float]:
        return count_weights(batch)

    @hookimpl
    def forward(self, model: Any, batch: Batch) -> Any:
        kept = batch["kept"].numel() * base_model(model).config.vocab_size if self._can_chunk else 0
        least = {"auto": CHUNK, "chunked": 0}.get(self.loss)
        return call(model, batch, keep=self.loss != "full", headless=least is not None and kept > least)

    @hookimpl
    def compute_loss(self, model: Any, batch: Batch, outputs: Any) -> dict[str, LossTerm]:
        return {"task": loss_term(model, batch, outputs, self._label_smoothing)}

    @hookimpl
    def on_gradients(self, shards: Sequence[Shard], step: Step) -> None:
        for shard in shards if step.index < self.warm_new_tokens else ():
            keep_new_rows(shard, self._new_rows.get(shard.name))

    # Evaluation.

    @hookimpl
    def predict(self, model: Any, batch: Batch, tokenizer: Any, cfg: Config) -> Mapping[str, Sequence[Any]]:
        def collate(rows: list[dict[str, Any]]) -> Batch:
            return self.collate(rows, tokenizer)

        is_asked = "targets" not in batch.columns
        tokens = cfg.task.max_new_tokens if self.generate or is_asked else None
        answers = predict(model, batch, tokenizer, collate, tokens)
        return {k: v for k, v in answers.items() if not (is_asked and k in ("nll", "tokens"))}

    @hookimpl
    def evaluate(self, predictions: Mapping[str, Sequence[Any]]) -> dict[str, float]:
        return evaluate(predictions, self.floors, with_texts=self._decoder)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"plugin.instruct.chat_template: can't read {path}: {error.strerror}") from error
