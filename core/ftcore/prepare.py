"""Raw data to token rows: formatted once, audited, cached on disk, before any rank starts.

The cache's key is the content: the data, the tokenizer, the formatters' names, versions, options
and source. Whatever differs makes other files; nothing is ever invalidated by hand.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ftcore import __version__, data
from ftcore.config import Config, FilesData
from ftcore.errors import UserError
from ftcore.hooks import Hooks
from ftcore.store import Rows, write_rows

__all__ = ["Audit", "Prepared", "cache_root", "prepare"]

CHUNK = 1000  # examples per call of format_examples


@dataclass
class Audit:
    """What became of a split. Lengths count tokens.

    `masked` rows train on nothing; `dropped` examples became no row at all.
    """

    examples: int = 0
    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    truncated: int = 0
    truncated_tokens: int = 0
    masked: int = 0
    dropped: int = 0
    unusable: list[int] = field(default_factory=list)  # first few examples dropped or masked, 0-based
    cut: list[int] = field(default_factory=list)  # first few truncated examples, 0-based

    def add(self, example: int, rows: Sequence[Mapping[str, Any]], shift: int) -> None:
        """Count one example and the rows it became; the first `shift` labels of a row train nothing."""
        self.examples += 1
        self.dropped += not rows
        masked = 0
        for row in rows:
            length, labels = len(row["input_ids"]), row.get("labels")
            trained = length if isinstance(labels, int) or labels is None else _trained(labels[shift:])
            self.rows += 1
            self.tokens += length
            self.trained_tokens += trained
            self.longest = max(self.longest, length + int(row.get("truncated", 0)))
            self.truncated += int(row.get("truncated", 0)) > 0
            self.truncated_tokens += int(row.get("truncated", 0))
            masked += trained == 0
        self.masked += masked
        if any(row.get("truncated") for row in rows) and len(self.cut) < 5:
            self.cut.append(example)
        if (not rows or masked) and len(self.unusable) < 5:
            self.unusable.append(example)


def _trained(labels: Sequence[int]) -> int:
    return sum(label != -100 for label in labels)


@dataclass(kw_only=True)
class Prepared:
    """Formatted splits, the class names, what the audit found, and what identifies the data.

    `fingerprint` is of the rows as formatted, so it differs between tokenizers and formatters; `source`
    is of the data they were made from.
    """

    splits: dict[str, Rows]
    labels: list[str]
    audits: dict[str, Audit]
    fingerprint: str
    source: str


def cache_root() -> Path:
    """`$FTCORE_CACHE`, else `ftcore` in the user's cache directory."""
    if root := os.environ.get("FTCORE_CACHE"):
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ftcore"


def prepare(hooks: Hooks, tokenizer: Any) -> Prepared:
    """The formatted data of this config, from the cache or made now.

    Raises:
        UserError: whatever the audit can't accept, with rows and the cure.
    """
    cfg = hooks.cfg
    by_core = hooks.implemented("load_data") == ["core"]
    raw: dict[str, Any] | None = None
    if not (by_core and isinstance(cfg.data, FilesData)):
        raw = hooks.load_data()
    source = data.fingerprint(cfg, raw)
    key = _key(hooks, tokenizer, source)
    directory = cache_root() / "data" / key
    if not (directory / "meta.json").is_file():
        _make(hooks, tokenizer, raw if raw is not None else hooks.load_data(), directory)
    meta = json.loads((directory / "meta.json").read_text())
    prepared = Prepared(
        splits={split: Rows(directory / split) for split in meta["audits"]},
        labels=meta["labels"],
        audits={split: Audit(**audit) for split, audit in meta["audits"].items()},
        fingerprint=key,
        source=source,
    )
    for split, audit in prepared.audits.items():
        _judge(audit, split, cfg)
    return prepared


def _key(hooks: Hooks, tokenizer: Any, raw: str) -> str:
    cfg = hooks.cfg
    columns, task = vars(cfg.data.columns), cfg.task.name
    versions = {p.name: (p.version, p.options) for p in hooks.plugins}
    formatters = [
        (name, versions.get(name, __version__), source) for name, source in hooks.sources("format_examples")
    ]
    parts = (raw, tokenizer_fingerprint(tokenizer), formatters, columns, task, cfg.data.max_length)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of all that decides a tokenizer's output."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        state.pop("truncation", None)  # left over from earlier calls
        state.pop("padding", None)
    else:
        state = sorted(tokenizer.get_vocab().items())
    rest = (type(tokenizer).__name__, str(tokenizer.special_tokens_map), tokenizer.chat_template)
    return hashlib.sha256(repr((state, rest)).encode()).hexdigest()[:16]


def _make(hooks: Hooks, tokenizer: Any, raw: dict[str, Any], directory: Path) -> None:
    cfg = hooks.cfg
    labels: list[str] = []
    if cfg.task.name == "classify":
        there = raw["train"].column_names or list(next(iter(raw["train"])))
        data.require_columns(there, [cfg.data.columns.label], cfg, "train")
        labels = data.label_names(raw["train"], cfg.data.columns.label)
        if len(labels) < 2:
            raise UserError(
                f"column '{cfg.data.columns.label}' has only the label {labels}; classification needs two"
            )
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".making-", dir=directory.parent))
    try:
        audits = {}
        for split, dataset in raw.items():
            audits[split] = Audit()
            rows = _format(hooks, tokenizer, dataset, labels, split, audits[split])
            if write_rows(rows, scratch / split) == 0:
                raise UserError(
                    f"no usable row in the {split} data: {audits[split].dropped} of"
                    f" {audits[split].examples} have an empty text or no label"
                )
        meta = {"labels": labels, "audits": {s: asdict(a) for s, a in audits.items()}}
        (scratch / "meta.json").write_text(json.dumps(meta))
        try:
            scratch.rename(directory)
        except OSError:
            if not (directory / "meta.json").is_file():  # else another process was faster
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _format(
    hooks: Hooks, tokenizer: Any, dataset: Any, labels: Sequence[str], split: str, audit: Audit
) -> Iterator[dict[str, Any]]:
    """Formatted rows of a split, one at a time, counted in `audit`."""
    column = hooks.cfg.data.columns.label
    names = data.class_names(dataset, column)
    for start, examples in _chunks(dataset):
        for example in examples if names else ():
            index = example[column]  # -1 stands for no label
            example[column] = None if index is None or index < 0 else names[index]
        try:
            entries = hooks.format_examples(examples, tokenizer, labels, split)
        except data.MissingColumn:
            raise
        except Exception as error:
            row = _blame(hooks, tokenizer, examples, labels, split)
            where = f"row {start + row}" if row is not None else f"rows {start}-{start + len(examples) - 1}"
            raise UserError(f"{split} data, {where} (0-based): {error}") from error
        for number, entry in enumerate(entries, start):
            rows = [entry] if isinstance(entry, Mapping) else list(entry)
            audit.add(number, rows, shift=int(hooks.cfg.task.name == "causal_lm"))
            yield from ({k: v for k, v in r.items() if k != "truncated"} for r in rows)


def _chunks(dataset: Any) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    start, chunk = 0, []
    for example in dataset:
        chunk.append(example)
        if len(chunk) == CHUNK:
            yield start, chunk
            start, chunk = start + CHUNK, []
    if chunk:
        yield start, chunk


def _blame(
    hooks: Hooks, tokenizer: Any, examples: Sequence[Any], labels: Sequence[str], split: str
) -> int | None:
    """Index of the first example that can't be formatted by itself."""
    for index, example in enumerate(examples):
        try:
            hooks.format_examples([example], tokenizer, labels, split)
        except Exception:
            return index
    return None


def _judge(audit: Audit, split: str, cfg: Config) -> None:
    """Fail the run where more rows than allowed are cut or unusable."""
    if audit.trained_tokens == 0:
        raise UserError(f"the {split} data trains on nothing: every label of its {audit.rows} rows is masked")
    truncated = audit.truncated / max(1, audit.rows)
    if truncated > cfg.data.max_truncated:
        raise UserError(
            f"{audit.truncated} of {audit.rows} rows in the {split} data are truncated to"
            f" data.max_length={cfg.data.max_length} tokens (the longest has {audit.longest},"
            f" examples {audit.cut} (0-based) are cut); raise data.max_length, or allow it by"
            f" data.max_truncated={_round_up(truncated)}"
        )
    unusable = (audit.dropped + audit.masked) / max(1, audit.examples)
    if unusable > cfg.data.max_dropped:
        raise UserError(
            f"{audit.dropped + audit.masked} of {audit.examples} rows in the {split} data have an empty"
            f" text, no label, or nothing to train on (rows {audit.unusable}, 0-based); mend them,"
            f" or allow it by data.max_dropped={_round_up(unusable)}"
        )


def _round_up(share: float) -> float:
    return math.ceil(share * 1000) / 1000
