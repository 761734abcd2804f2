"""One call of the model on a batch, packed or padded, and the losses of its trained tokens."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from ftcore import Batch, LossTerm
from ftcore.strategies import base_model
from ftcore_instruct import _loss
from ftcore_instruct._attention import packed_inputs, set_longest

__all__ = ["WEIGHTED", "call", "count_weights", "loss_term", "losses"]

WEIGHTED = "instruct/weighted_tokens"
"""The unit of a loss whose tokens have weights: their sum."""


def call(model: Any, batch: Batch, *, keep: bool, headless: bool = False) -> Any:
    """The model's output for a batch of `_packing`.

    Args:
        keep: make a decoder's logits only where labels are trained, [rows, kept, vocabulary], if it can.
        headless: make none; the hidden states there are `last_hidden_state`, and `logits` is None.
    """
    base = base_model(model)
    if "attention_mask" in batch:
        inputs: dict[str, Any] = {k: batch[k] for k in ("input_ids", "attention_mask")}
        inputs["use_cache"] = False
        if base.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(batch["labels"])
    else:
        inputs = packed_inputs(batch, base.config)
    set_longest(base, inputs.get("segments"))
    if keep and "kept" in batch and "logits_to_keep" in inspect.signature(base.forward).parameters:
        inputs["logits_to_keep"] = batch["kept"]
    if not headless:
        return model(**inputs)
    with _loss.without_head(base):
        outputs = model(**inputs)
    outputs.last_hidden_state, outputs.logits = outputs.logits, None
    return outputs


def _aligned(batch: Batch, tensor: Tensor) -> Tensor:
    """Of a token column, the entries that the kept logits predict."""
    return tensor[:, batch["kept"] + 1] if "kept" in batch else tensor


def losses(batch: Batch, logits: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Cross entropy of each trained token, fp32 [trained], and the row of the batch it is in, [trained]."""
    labels = _aligned(batch, batch["labels"])
    if logits.shape[1] != labels.shape[1]:
        logits = logits[:, batch["kept"]]  # a model that can't be asked for some
    values = _loss.token_losses(logits, labels, label_smoothing)
    if "attention_mask" in batch:
        return values, (labels != _loss.IGNORED).nonzero()[:, 0]
    sizes = torch.tensor(batch.columns["target_length"], device=labels.device)
    rows = torch.repeat_interleave(torch.arange(len(sizes), device=labels.device), sizes)[None]
    return values, _aligned(batch, rows)[labels != _loss.IGNORED]


def loss_term(model: Any, batch: Batch, outputs: Any, label_smoothing: float) -> LossTerm:
    """The summed loss of a batch, over its trained tokens or, where tokens have weights, over those."""
    labels = _aligned(batch, batch["labels"])
    if outputs.logits is None:
        head = base_model(model).get_output_embeddings()
        trained = labels != _loss.IGNORED
        total = _loss.chunked_sum(outputs.last_hidden_state[trained], head.weight, labels[trained])
        return LossTerm(sum=total, unit="tokens")
    values, _ = losses(batch, outputs.logits, label_smoothing)
    if "weights" not in batch:
        return LossTerm(sum=values.sum(), unit="tokens")
    weights = _aligned(batch, batch["weights"])[labels != _loss.IGNORED]
    return LossTerm(sum=(values * weights).sum(), unit=WEIGHTED)


def count_weights(batch: Batch) -> dict[str, float]:
    """The sum of the trained tokens' weights, where there are any."""
    if "weights" not in batch:
        return {}
    trained = _aligned(batch, batch["labels"]) != _loss.IGNORED
    return {WEIGHTED: float(_aligned(batch, batch["weights"])[trained].sum())}
