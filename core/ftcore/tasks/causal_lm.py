"""Language modelling of plain text: adapting a decoder to a domain or a language."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ftcore.columns import text
from ftcore.config import Config
from ftcore.contract import Batch, Formatted, LossTerm

METRIC = "-perplexity"
METRICS: tuple[str, ...] = ("nll", "perplexity")
ANSWERS: tuple[str, ...] = ()
AUTO_MODEL = "AutoModelForCausalLM"


def format_examples(
    examples: Sequence[Mapping[str, Any]], tokenizer: Any, cfg: Config, labels: Sequence[str]
) -> list[Formatted | Sequence[Formatted]]:
    """A text and an end token, in consecutive windows of `data.max_length`: nothing is cut off.

    A window's first token is predicted by nothing, so windows overlap by one token: each token of
    the text is trained once.
    """
    texts = [text(e[cfg.data.columns.text], cfg.data.columns.text) for e in examples]
    size = cfg.data.max_length
    entries: list[Formatted | Sequence[Formatted]] = []
    for one, ids in zip(texts, tokenizer(texts, verbose=False)["input_ids"], strict=True):
        if ids[-1:] != [tokenizer.eos_token_id] and tokenizer.eos_token_id is not None:
            ids = [*ids, tokenizer.eos_token_id]
        starts = range(0, max(1, len(ids) - 1), size - 1) if one.strip() else ()
        windows = [ids[s : s + size] for s in starts]
        entries.append([{"input_ids": w, "labels": w} for w in windows])
    return entries


def count_tokens(batch: Batch) -> int:
    """Trained tokens: labels after the shift."""
    return int((batch["labels"][:, 1:] != -100).sum())


def loss(batch: Batch, outputs: Any, cfg: Config) -> LossTerm:
    """Cross entropy of each next token, summed over trained tokens, in fp32."""
    labels = batch["labels"][:, 1:]
    trained = labels != -100
    total = F.cross_entropy(
        outputs.logits[:, :-1][trained].float(),  # masked rows cost neither time nor memory
        labels[trained],
        reduction="sum",
        label_smoothing=cfg.task.label_smoothing,
    )
    return LossTerm(sum=total, unit="tokens")


def predict(model: Any, batch: Batch, tokenizer: Any, cfg: Config) -> dict[str, Sequence[Any]]:
    """`nll` (summed over the row's tokens, in nats) and `tokens`."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    return token_nll(model(**inputs, use_cache=False).logits[:, :-1], batch["labels"][:, 1:])


def token_nll(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Sequence[Any]]:
    """Per row: summed negative log-likelihood of its labels (-100 left out), and how many there are."""
    nll = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
    return {"nll": nll.sum(dim=1).tolist(), "tokens": (labels != -100).sum(dim=1).tolist()}


def evaluate(predictions: Mapping[str, Sequence[Any]]) -> dict[str, float]:
    """Mean loss per token, and perplexity, its exponential."""
    mean = math.fsum(predictions["nll"]) / max(1, sum(predictions["tokens"]))
    return {"nll": mean, "perplexity": math.exp(min(mean, 700.0))}
