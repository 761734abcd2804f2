"""The card of a trained model: data, recipe, plugins, figures, and code that loads it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from string import Template
from typing import Any

from ftcore import __version__, models
from ftcore.job import Job

__all__ = ["model_card"]

CARD = Template("""\
---
$header
---
# $title

$labels```python
from transformers import AutoTokenizer, $model_class

model = $model_class.from_pretrained("model")  # this directory
tokenizer = AutoTokenizer.from_pretrained("model")
$example
```

## Figures

`eval` is of the validation data, which picked these weights; `test` is of data that nothing was picked by.

$figures

## Data

$data

Fingerprint $fingerprint.

## Recipe

Made by ftcore $version; the whole of it is in the run's `config.yaml`.

$recipe

$plugins
""")

EXAMPLES = {
    "classify": """inputs = tokenizer({texts}, truncation=True, max_length={length}, return_tensors="pt")
print(model.config.id2label[int(model(**inputs).logits.argmax())])""",
    "seq2seq": """inputs = tokenizer("a text", truncation=True, max_length={length}, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs)[0], skip_special_tokens=True))""",
    "causal_lm": """inputs = tokenizer("a text", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0], skip_special_tokens=True))""",
    "chat": """messages = [{{"role": "user", "content": "a question"}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=200)[0], skip_special_tokens=True))""",
}
"""How a model of each task answers, in plain transformers."""


def model_card(job: Job, model_class: str, metrics: Mapping[str, float]) -> str:
    """The README of `model/`."""
    cfg, prepared, recipe = job.cfg, job.prepared, _recipe(job)
    base = {"ftcore:minilm": models.MINILM}.get(cfg.model.path, cfg.model.path)
    is_public = not base.startswith(("ftcore:", "/", "."))  # a path says nothing elsewhere
    header = {"library_name": "transformers", "base_model": base if is_public else "", "tags": "[ftcore]"}
    audits = [
        (split, f"{a.rows:,}", f"{a.tokens:,}", f"{a.truncated:,}") for split, a in prepared.audits.items()
    ]
    plugins = [
        f"- {p.name} ({p.distribution} {p.version}): {json.dumps(p.options)}" for p in job.hooks.plugins
    ]
    example = EXAMPLES["chat" if job.tokenizer.chat_template else cfg.task.name]
    texts = '"a text", "its pair"' if cfg.data.columns.text_pair else '"a text"'
    return CARD.substitute(
        header="\n".join(f"{key}: {value}" for key, value in header.items() if value),
        title=f"{base if is_public else Path(base).name}, fine-tuned for {cfg.task.name}",
        labels=f"Labels: {', '.join(prepared.labels)}.\n\n" if prepared.labels else "",
        model_class=model_class,
        example=example.format(texts=texts, length=cfg.data.max_length),
        figures=_table(("metric", "value"), ((name, f"{value:.4f}") for name, value in metrics.items())),
        data=_table(("split", "rows", "tokens", "truncated"), audits),
        fingerprint=prepared.fingerprint,
        version=__version__,
        recipe=_table(("setting", "value"), recipe.items()),
        plugins="\n".join(["Plugins, in call order:", "", *plugins] if plugins else ["No plugins."]),
    )


def _recipe(job: Job) -> dict[str, Any]:
    cfg = job.cfg
    return {
        "steps": job.progress.step,
        "rows per step": cfg.train.batch_size,
        "learning rate": f"{cfg.optim.lr} ({cfg.optim.schedule}, warmup {cfg.optim.warmup})",
        "weight decay": cfg.optim.weight_decay,
        "precision": cfg.train.precision,
        "longest row": f"{cfg.data.max_length} tokens",
        "seed": cfg.seed,
    }


def _table(names: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    """Rows in Markdown."""
    lines = [names, ("---",) * len(names), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
