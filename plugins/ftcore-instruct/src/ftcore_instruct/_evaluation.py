"""Evaluation: likelihood, generated answers, multiple choice; each task's score, their normalised average.

`predict` runs the model, everything below it is a function of texts and numbers.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftcore import Batch
from ftcore.metrics import exact_match, rouge
from ftcore.strategies import base_model
from ftcore_instruct._attention import set_longest
from ftcore_instruct._forward import call, losses

__all__ = ["evaluate", "extract_answer", "normalized", "predict", "token_f1"]

IGNORED = -100
Collate = Callable[[list[dict[str, Any]]], Batch]


def predict(
    model: Any, batch: Batch, tokenizer: Any, collate: Collate, max_new_tokens: int | None
) -> dict[str, Sequence[Any]]:
    """Columns for `evaluate`, an entry for each row.

    Args:
        collate: rows (`input_ids`, `labels`) to a batch, as in training.
        max_new_tokens: of an answer, greedily decoded; None generates none.

    Returns:
        `nll` (of the row's labels, summed, in nats), `tokens` (labels), `prediction` (the generated last
        answer), and `choice_prediction` (the index of the likeliest choice by mean log-likelihood of its
        tokens; -1 where the row has no choices).
    """
    rows = _rows(batch)
    nll, tokens = _row_nll(model, batch, len(rows))
    answer: dict[str, Sequence[Any]] = {"nll": nll, "tokens": tokens}
    if "choice_ids" in batch.columns:
        answer["choice_prediction"] = _choose(model, batch, rows, collate)
    set_longest(base_model(model), None)
    if max_new_tokens is not None:
        answer["prediction"] = _generate(base_model(model), rows, batch, tokenizer, max_new_tokens)
    return answer


def _rows(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """(input_ids, labels) of each row, without padding, on the CPU."""
    ids, labels = batch["input_ids"].cpu(), batch["labels"].cpu()
    if "attention_mask" not in batch:
        sizes, target_sizes = list(batch.columns["length"]), list(batch.columns["target_length"])
        return list(zip(torch.split(ids[0], sizes), torch.split(labels[0], target_sizes), strict=True))
    masks = batch["attention_mask"].cpu().bool()
    aligned = "kept" in batch
    return [(i[m], t[m] if aligned else t[t != IGNORED]) for i, t, m in zip(ids, labels, masks, strict=True)]


def _row_nll(model: Any, batch: Batch, count: int) -> tuple[list[float], list[int]]:
    """Of each row, its labels' summed negative log-likelihood, and how many there are."""
    values, rows = losses(batch, call(model, batch, keep=True).logits)
    nll = torch.zeros(count, dtype=torch.float64, device=values.device).index_add_(0, rows, values.double())
    return nll.tolist(), torch.bincount(rows, minlength=count).tolist()


def _prompt(ids: Tensor, labels: Tensor, is_encoder_decoder: bool) -> Tensor:
    """What stands before the last answer: of a decoder's row, before its last run of labels."""
    if is_encoder_decoder:
        return ids
    trained = (labels != IGNORED).nonzero().flatten()
    masked = (labels[: int(trained[-1]) + 1] == IGNORED).nonzero().flatten()
    return ids[: int(masked[-1]) + 1] if len(masked) else ids[:0]


def _choose(model: Any, batch: Batch, rows: Sequence[tuple[Tensor, Tensor]], collate: Collate) -> list[int]:
    """The likeliest choice of each row by log-likelihood per token; -1 where there are none."""
    is_encoder_decoder = base_model(model).config.is_encoder_decoder
    candidates: list[tuple[int, dict[str, Any]]] = []
    for number, (ids, labels) in enumerate(rows):
        prompt = _prompt(ids, labels, is_encoder_decoder).numpy()
        ends = np.cumsum(batch.columns["choice_lengths"][number])[:-1]
        if not batch.columns["choice_lengths"][number]:
            continue
        for choice in np.split(np.asarray(batch.columns["choice_ids"][number], np.int64), ends):
            masked = np.full(len(prompt), IGNORED)
            row = {"input_ids": prompt, "labels": choice}
            if not is_encoder_decoder:
                row = {"input_ids": np.append(prompt, choice), "labels": np.append(masked, choice)}
            candidates.append((number, row))
    best: list[tuple[float, int]] = [(-np.inf, -1)] * len(rows)
    seen = [0] * len(rows)
    for start in range(0, len(candidates), len(rows)):  # no more rows at a time than the batch has
        part = candidates[start : start + len(rows)]
        made = collate([row for _, row in part]).to(batch["input_ids"].device)
        for (number, _), nll, count in zip(part, *_row_nll(model, made, len(part)), strict=True):
            score = -nll / max(1, count)
            if score > best[number][0]:
                best[number] = (score, seen[number])
            seen[number] += 1
    return [index for _, index in best]


def _generate(
    model: Any, rows: Sequence[tuple[Tensor, Tensor]], batch: Batch, tokenizer: Any, max_new_tokens: int
) -> list[str]:
    """Each row's last answer, generated greedily from what stands before it."""
    is_encoder_decoder = model.config.is_encoder_decoder
    prompts = [_prompt(ids, labels, is_encoder_decoder) for ids, labels in rows]
    longest, pad = max(map(len, prompts)), tokenizer.pad_token_id or 0
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):  # to the left: answers go on from the prompt's end
        ids[i, longest - len(prompt) :] = prompt
        mask[i, longest - len(prompt) :] = 1
    device = batch["input_ids"].device
    made = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=_stops(rows, tokenizer),
        pad_token_id=pad,
    )
    if not is_encoder_decoder:
        made = made[:, longest:]
    return [text.strip() for text in tokenizer.batch_decode(made, skip_special_tokens=True)]


def _stops(rows: Sequence[tuple[Tensor, Tensor]], tokenizer: Any) -> list[int]:
    """What ends an answer: the end token, and the special tokens that trained answers end with."""
    last = {int(t) for _, labels in rows for t in labels[labels != IGNORED][-2:]}
    return sorted({tokenizer.eos_token_id, *(last & set(tokenizer.all_special_ids))} - {None})


# Of texts and numbers.


def extract_answer(text: str, mark: str = "the answer is") -> str:
    """The final answer of a chain of thought: what follows the last `mark`, or `####`; else the text."""
    found = re.split(rf"{re.escape(mark)}:?|####", text, flags=re.IGNORECASE)
    return found[-1].strip().removesuffix(".").strip() if len(found) > 1 else text.strip()


def token_f1(prediction: str, target: str) -> float:
    """F1 of the two texts' words, as SQuAD has it: in lower case, without punctuation and articles."""
    a, b = _words(prediction), _words(target)
    if not a or not b:
        return float(a == b)
    hits = sum((Counter(a) & Counter(b)).values())
    return 2 * hits / (len(a) + len(b))


def _words(text: str) -> list[str]:
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in plain.split() if word not in ("a", "an", "the")]


def normalized(raw: float, floor: float) -> float:
    """100 · (raw - floor) / (100 - floor): 0 is a guess, 100 is perfect, below 0 is worse than a guess."""
    return 100 * (raw - floor) / (100 - floor)


def evaluate(
    predictions: Mapping[str, Sequence[Any]], floors: Mapping[str, float], with_texts: bool
) -> dict[str, float]:
    """Metrics of the columns of `predict` and of the data.

    A task's score, in percent, is the accuracy of its choices where it has them, else the share of answers
    that match. Its floor, what a guess gives, is then 100 / choices, or 0; `floors` says otherwise by task.

    Args:
        with_texts: give `exact_match` and `rougeL` too (core gives them for encoder-decoders).

    Returns:
        `answer_match` (the final answer is one of the targets), `f1`, `choice_accuracy`, and
        `normalized_average`, the mean over tasks of `normalized`; of more tasks than one,
        `group/TASK/score` of each.
    """
    count = len(predictions["nll"])
    metrics: dict[str, float] = {}
    scores, chances = [np.nan] * count, [0.0] * count
    if "prediction" in predictions:
        targets = [json.loads(t) or [""] for t in predictions["targets"]]
        matches = [_matches(p, t) for p, t in zip(predictions["prediction"], targets, strict=True)]
        scores = [100.0 * m for m in matches]
        pairs = list(zip(predictions["prediction"], targets, strict=True))
        metrics["answer_match"] = float(np.mean(matches))
        metrics["f1"] = float(np.mean([max(token_f1(p, t) for t in many) for p, many in pairs]))
        if with_texts:
            metrics["exact_match"] = float(np.mean([max(exact_match([(p, t)]) for t in m) for p, m in pairs]))
            metrics["rougeL"] = float(np.mean([max(rouge([(p, t)])["rougeL"] for t in m) for p, m in pairs]))
    chosen = predictions.get("choice_prediction", [-1] * count)
    right = predictions.get("choice", [-1] * count)
    hits = [c == r for c, r in zip(chosen, right, strict=True) if c >= 0 and r >= 0]
    for i, (c, r) in enumerate(zip(chosen, right, strict=True)):
        if c >= 0 and r >= 0:
            scores[i], chances[i] = 100.0 * (c == r), 100 / len(predictions["choice_lengths"][i])
    if hits:
        metrics["choice_accuracy"] = float(np.mean(hits))
    return {**metrics, **_by_task(predictions["task"], scores, chances, floors)}


def _matches(prediction: str, targets: Sequence[str]) -> bool:
    """Whether the final answer is one of the targets, in any case."""
    answer = extract_answer(prediction).casefold()
    return any(answer == extract_answer(target).casefold() for target in targets)


def _by_task(
    tasks: Sequence[str], scores: Sequence[float], chances: Sequence[float], floors: Mapping[str, float]
) -> dict[str, float]:
    rows: dict[str, list[int]] = {}
    for i, (task, score) in enumerate(zip(tasks, scores, strict=True)):
        if not np.isnan(score):
            rows.setdefault(task, []).append(i)
    raw = {task: float(np.mean([scores[i] for i in numbers])) for task, numbers in sorted(rows.items())}
    floor = {t: floors.get(t, float(np.mean([chances[i] for i in n]))) for t, n in rows.items()}
    if not raw:
        return {}
    average = float(np.mean([normalized(raw[task], floor[task]) for task in raw]))
    table = {f"group/{task}/score": score for task, score in raw.items()} if len(raw) > 1 else {}
    return {"normalized_average": average, **table}
