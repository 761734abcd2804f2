"""Warm-up of the embeddings of added tokens: for its first steps a run trains nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ftcore import Shard, UserError
from ftcore.config import Config

__all__ = ["keep_new_rows", "new_rows"]


def new_rows(model: Any, tokenizer: Any, cfg: Config) -> dict[str, torch.Tensor]:
    """The rows of the tokens of `model.add_tokens`, int64 [tokens], by the name of each embedding matrix.

    Raises:
        UserError: no tokens are added, or weight decay would change the other rows.
    """
    if cfg.model.add_tokens is None:
        raise UserError("plugin.instruct.warm_new_tokens: no tokens are added; set model.add_tokens=FILE")
    if cfg.optim.weight_decay:
        raise UserError(
            "plugin.instruct.warm_new_tokens trains new embeddings alone, but weight decay changes all;"
            " set optim.weight_decay=0"
        )
    tokens = Path(cfg.model.add_tokens).read_text(encoding="utf-8").splitlines()
    rows = torch.tensor([tokenizer.convert_tokens_to_ids(t) for t in tokens if t.strip()])
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = {id(layer.weight) for layer in layers if layer is not None}
    return {name: rows for name, p in model.named_parameters() if id(p) in weights}


def keep_new_rows(shard: Shard, rows: torch.Tensor | None) -> None:
    """Zero the gradient of a shard but in these rows of its matrix (None: everywhere)."""
    if shard.grad is None:
        return
    if rows is None:
        shard.grad.zero_()
        return
    width = shard.shape[1]
    at = torch.arange(shard.offset, shard.offset + len(shard.grad), device=shard.grad.device) // width
    shard.grad.masked_fill_(~torch.isin(at, rows.to(at.device)), 0.0)
