"""Text to text with an encoder-decoder (T5 and the like): exact match and ROUGE of generated text."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F

from ftcore.columns import text
from ftcore.config import Config
from ftcore.contract import Batch, Formatted, LossTerm
from ftcore.metrics import exact_match, rouge
from ftcore.tasks.causal_lm import token_nll

METRIC = "rougeL"
METRICS: tuple[str, ...] = ("exact_match", "rouge1", "rougeL", "nll")
ANSWERS: tuple[str, ...] = ("target", "nll", "tokens")
AUTO_MODEL = "AutoModelForSeq2SeqLM"


def format_examples(
    examples: Sequence[Mapping[str, Any]], tokenizer: Any, cfg: Config, labels: Sequence[str]
) -> list[Formatted | Sequence[Formatted]]:
    """Source tokens, target tokens as labels, and the target's text; empty ones drop the example."""
    columns, size = cfg.data.columns, cfg.data.max_length
    entries: list[Formatted | Sequence[Formatted]] = []
    for example in examples:
        source, target = (text(example[c], c) for c in (columns.text, columns.target))
        if not source.strip() or not target.strip():
            entries.append([])
            continue
        ids = tokenizer(source, verbose=False)["input_ids"]
        answer = tokenizer(text_target=target, verbose=False)["input_ids"]
        cut = max(0, len(ids) - size) + max(0, len(answer) - size)
        if len(ids) > size:
            ids = tokenizer(source, truncation=True, max_length=size)["input_ids"]
        if len(answer) > size:
            answer = tokenizer(text_target=target, truncation=True, max_length=size)["input_ids"]
        entries.append({"input_ids": ids, "labels": answer, "target": target, "truncated": cut})
    return entries


def count_tokens(batch: Batch) -> int:
    """Trained tokens: of the targets."""
    return int((batch["labels"] != -100).sum())


def loss(batch: Batch, outputs: Any, cfg: Config) -> LossTerm:
    """Cross entropy summed over the targets' tokens, in fp32."""
    total = F.cross_entropy(
        outputs.logits.flatten(0, 1).float(),
        batch["labels"].flatten(),
        reduction="sum",
        label_smoothing=cfg.task.label_smoothing,
    )
    return LossTerm(sum=total, unit="tokens")


def predict(model: Any, batch: Batch, tokenizer: Any, cfg: Config) -> dict[str, Sequence[Any]]:
    """`prediction` (greedy) and `target` texts, `nll` of the target in nats, and its `tokens`."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    decoder_input_ids = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    logits = model(**inputs, decoder_input_ids=decoder_input_ids, use_cache=False).logits
    generated = model.generate(
        **inputs, max_new_tokens=cfg.task.max_new_tokens, do_sample=False, num_beams=1, use_cache=True
    )
    texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
    return {
        "prediction": [t.strip() for t in texts],
        "target": batch.columns["target"],
        **token_nll(logits, batch["labels"]),
    }


def evaluate(predictions: Mapping[str, Sequence[Any]]) -> dict[str, float]:
    """Exact match, ROUGE-1 and ROUGE-L (F-measures, mean over rows), and mean loss per token.

    The loss alone where a plugin's `predict` generated nothing.
    """
    nll = {"nll": math.fsum(predictions["nll"]) / max(1, sum(predictions["tokens"]))}
    if "prediction" not in predictions:
        return nll
    pairs = list(zip(predictions["prediction"], predictions["target"], strict=True))
    return {"exact_match": exact_match(pairs), **rouge(pairs), **nll}
