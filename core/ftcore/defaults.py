"""Core's own answers to the hooks, as an ordinary plugin: what a run does where no plugin says otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ftcore import data, models
from ftcore.collate import pad
from ftcore.config import Config
from ftcore.contract import Batch, LossTerm, Sampler, Step
from ftcore.plugins import hookimpl
from ftcore.sampling import LengthBuckets
from ftcore.store import Rows
from ftcore.strategies import DDP, Single, Strategy, base_model
from ftcore.tasks import TASKS

__all__ = ["Defaults"]


class Defaults:
    """Files and hub data, the three tasks, length buckets, fused AdamW, `single` and `ddp`."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.task = TASKS[cfg.task.name]

    @hookimpl(trylast=True)
    def load_data(self, cfg: Config) -> dict[str, Any]:
        return data.load(cfg)

    @hookimpl(trylast=True)
    def load_file(self, path: str, cfg: Config) -> Any:
        return data.load_file(path, cfg)

    @hookimpl(trylast=True)
    def load_tokenizer(self, cfg: Config) -> Any:
        return models.load_tokenizer(cfg)

    @hookimpl(trylast=True)
    def format_examples(
        self,
        examples: Sequence[Mapping[str, Any]],
        tokenizer: Any,
        cfg: Config,
        labels: Sequence[str],
        split: str,
    ) -> Sequence[Any]:
        if split == "predict":
            return self._without_answers(examples, tokenizer, cfg, labels)
        columns, there = cfg.data.columns, list(examples[0])
        needed = {
            "classify": [columns.text, columns.text_pair, columns.label],
            "causal_lm": [columns.text],
            "seq2seq": [columns.text, columns.target],
        }[cfg.task.name]
        data.require_columns(there, [*needed, columns.group], cfg, split)
        entries = self.task.format_examples(examples, tokenizer, cfg, labels)
        if columns.group is None:
            return entries
        return [
            [{**row, "group": str(e[columns.group])} for row in ([x] if isinstance(x, Mapping) else x)]
            for e, x in zip(examples, entries, strict=True)
        ]

    def _without_answers(
        self, examples: Sequence[Mapping[str, Any]], tokenizer: Any, cfg: Config, labels: Sequence[str]
    ) -> Sequence[Any]:
        """Rows of new examples; something stands in for the label or target, which nobody reads."""
        columns = cfg.data.columns
        data.require_columns(list(examples[0]), [columns.text, columns.text_pair], cfg, "given")
        answer = {columns.label: labels[0] if labels else None, columns.target: "?"}
        return self.task.format_examples([{**e, **answer} for e in examples], tokenizer, cfg, labels)

    @hookimpl(trylast=True)
    def build_sampler(self, rows: Rows, batch_size: int, seed: int) -> Sampler:
        return LengthBuckets(rows.lengths, batch_size, seed)

    @hookimpl(trylast=True)
    def collate(
        self,
        examples: Sequence[Mapping[str, Any]],
        tokenizer: Any,
        rng: Callable[[int], np.random.Generator],
    ) -> Batch:
        # To the right, whatever the tokenizer says: absolute positions must not depend on the neighbours.
        return pad(examples, tokenizer.pad_token_id or 0)

    @hookimpl(trylast=True)
    def load_model(self, cfg: Config, tokenizer: Any, labels: Sequence[str]) -> torch.nn.Module:
        return models.load_model(cfg, tokenizer, labels, self.task.AUTO_MODEL)

    @hookimpl(trylast=True)
    def build_optimizer(self, params: list[dict[str, Any]], cfg: Config) -> torch.optim.Optimizer:
        # fused: on CPU about 20 times faster than foreach, on CUDA the fastest too.
        return torch.optim.AdamW(
            params,
            lr=cfg.optim.lr,
            betas=(cfg.optim.betas[0], cfg.optim.betas[1]),
            eps=cfg.optim.eps,
            fused=True,
        )

    @hookimpl(trylast=True)
    def build_strategy(self, cfg: Config) -> Strategy:
        return (DDP if cfg.trainer.strategy == "ddp" else Single)(cfg)

    @hookimpl(trylast=True)
    def count_units(self, batch: Batch) -> dict[str, float]:
        return {
            "examples": len(batch.rows),  # a packed batch has fewer rows of tensors
            "tokens": self.task.count_tokens(batch),
            "micro_batches": 1,
        }

    @hookimpl(trylast=True)
    def forward(self, model: torch.nn.Module, batch: Batch, step: Step) -> Any:
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        base = base_model(model)
        if base.config.is_encoder_decoder and batch["labels"].ndim == 2:
            inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(batch["labels"])
        return model(**inputs, **batch.arguments)

    @hookimpl(trylast=True)
    def compute_loss(self, batch: Batch, outputs: Any) -> dict[str, LossTerm]:
        return {"task": self.task.loss(batch, outputs, self.cfg)}

    @hookimpl(trylast=True)
    def predict(
        self, model: torch.nn.Module, batch: Batch, tokenizer: Any, cfg: Config
    ) -> Mapping[str, Sequence[Any]]:
        return self.task.predict(base_model(model), batch, tokenizer, cfg)

    @hookimpl(trylast=True)
    def evaluate(self, predictions: Mapping[str, Sequence[Any]]) -> dict[str, float]:
        return self.task.evaluate(predictions)
