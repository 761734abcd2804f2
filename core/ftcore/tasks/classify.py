"""Classification of a text, or of a pair of texts: one label a row."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ftcore.columns import is_missing, text
from ftcore.config import Config
from ftcore.contract import Batch, Formatted, LossTerm
from ftcore.errors import UserError
from ftcore.metrics import classification

METRIC = "accuracy"
METRICS: tuple[str, ...] = ("accuracy", "macro_f1", "mcc", "nll")
ANSWERS: tuple[str, ...] = ("label",)
AUTO_MODEL = "AutoModelForSequenceClassification"


def format_examples(
    examples: Sequence[Mapping[str, Any]], tokenizer: Any, cfg: Config, labels: Sequence[str]
) -> list[Formatted | Sequence[Formatted]]:
    """Token rows with the label's index; an empty text or a missing label drops the example."""
    columns, index = cfg.data.columns, {name: i for i, name in enumerate(labels)}
    names = [columns.text, *([columns.text_pair] if columns.text_pair else [])]
    good = [i for i, e in enumerate(examples) if _usable(e, names) and not is_missing(e[columns.label])]
    texts = [[text(examples[i][name], name) for i in good] for name in names]
    entries: list[Formatted | Sequence[Formatted]] = [[] for _ in examples]
    for i, row in zip(good, _encode(texts, tokenizer, cfg.data.max_length), strict=True):
        entries[i] = {**row, "labels": _label(examples[i][columns.label], index, labels)}
    return entries


def _usable(example: Mapping[str, Any], names: Sequence[str]) -> bool:
    return all(text(example[name], name).strip() for name in names)


def _label(value: Any, index: Mapping[str, int], labels: Sequence[str]) -> int:
    if str(value) not in index:
        raise UserError(f"label '{value}' does not occur in the training data ({', '.join(labels[:20])})")
    return index[str(value)]


def _encode(texts: Sequence[list[str]], tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    """Rows with `input_ids`, `token_type_ids` for pairs where the model has them, and `truncated`."""
    if not texts[0]:
        return []
    whole = tokenizer(*texts, verbose=False)
    pair = len(texts) == 2 and "token_type_ids" in whole
    rows = []
    for i, ids in enumerate(whole["input_ids"]):
        cut = max(0, len(ids) - max_length)
        row = {"input_ids": ids, "truncated": cut}
        if pair:
            row["token_type_ids"] = whole["token_type_ids"][i]
        if cut:
            short = tokenizer(*(t[i] for t in texts), truncation=True, max_length=max_length)
            row.update({k: short[k] for k in ("input_ids", "token_type_ids") if k in row})
        rows.append(row)
    return rows


def count_tokens(batch: Batch) -> int:
    """Tokens read: every one that is no padding."""
    return int(batch["attention_mask"].sum())


def loss(batch: Batch, outputs: Any, cfg: Config) -> LossTerm:
    """Cross entropy summed over rows, in fp32."""
    total = F.cross_entropy(
        outputs.logits.float(),
        batch["labels"],
        reduction="sum",
        label_smoothing=cfg.task.label_smoothing,
    )
    return LossTerm(sum=total, unit="examples")


def predict(model: Any, batch: Batch, tokenizer: Any, cfg: Config) -> dict[str, Sequence[Any]]:
    """`label` and `prediction` (class indices), `scores` (log-probabilities, [classes])."""
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    scores = torch.log_softmax(logits.float(), dim=-1)
    return {
        "label": batch["labels"].tolist(),
        "prediction": scores.argmax(dim=-1).tolist(),
        "scores": scores.tolist(),
    }


def evaluate(predictions: Mapping[str, Sequence[Any]]) -> dict[str, float]:
    """Accuracy, macro F1, Matthews correlation, and mean negative log-likelihood."""
    return classification(predictions["label"], predictions["prediction"], predictions["scores"])
