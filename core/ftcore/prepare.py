"""Raw data to token rows: formatted once, audited, cached on disk, before any rank starts.

The cache's key is the content: the data, the tokenizer, the formatters' names, versions, options
and source. Whatever differs makes other files; nothing is ever invalidated by hand.
"""

import contextlib
import hashlib
import json
import math
from array import array
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ftcore import __version__, data
from ftcore.config import Config, FilesData
from ftcore.contract import Dropped
from ftcore.errors import UserError
from ftcore.hooks import Hooks
from ftcore.parallel import fork_map
from ftcore.readers import cache_root, scratch_directory
from ftcore.store import Rows, write_examples, write_rows

__all__ = ["Audit", "Prepared", "cache_root", "prepare"]

CHUNK = 1000  # examples per call of format_examples
FORMAT = 2  # of a cache entry; another number makes other entries


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
    sha256: str = ""  # of the raw examples, in order: equal where two runs share the split
    unusable: list[int] = field(default_factory=list)  # first few examples dropped or masked, 0-based
    reasons: dict[str, list[Any]] = field(default_factory=dict)  # of dropped ones: [how many, *places]
    cut: list[int] = field(default_factory=list)  # first few truncated examples, 0-based
    remarks: list[str] = field(default_factory=list)  # what the data set says of itself

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
        if isinstance(rows, Dropped):
            count, *places = self.reasons.get(rows.reason, [0])
            if len(places) < 5:
                places.append(rows.where or f"row {example}")
            self.reasons[rows.reason] = [count + 1, *places]

    def why(self) -> str:
        """What is wrong with the unusable examples, and where, as far as the formatter said."""
        if not self.reasons:
            return f"have an empty text, no label, or nothing to train on (rows {self.unusable}, 0-based)"
        told = [f"{n} {reason} ({', '.join(places)})" for reason, (n, *places) in self.reasons.items()]
        return f"are unusable (0-based): {'; '.join(told)}"

    def notes(self) -> list[str]:
        """What to know beside the rows: tokens and trained share, rows cut, unusable, and left out."""
        share = 100 * self.trained_tokens / max(1, self.tokens)
        notes = [f"{self.tokens:,} tokens, {share:.0f}% trained", f"longest {self.longest}"]
        notes += [f"{self.truncated} truncated"] if self.truncated else []
        notes += [f"{self.dropped + self.masked} unusable"] if self.dropped + self.masked else []
        return notes + self.remarks

    def describe(self, split: str) -> str:
        """The split in one line."""
        return f"{split:<11}" + ", ".join([f"{self.rows} rows", *self.notes()])


def _trained(labels: Sequence[int]) -> int:
    return int(np.count_nonzero(np.asarray(labels) != -100))


@dataclass(kw_only=True)
class Prepared:
    """Formatted splits, the class names, what the audit found, and what identifies the data.

    `fingerprint` is of the rows as formatted, so it differs between tokenizers and formatters; `source`
    is of the data they were made from, `from_files` where that is the bytes of files that core read.
    """

    splits: dict[str, Rows]
    labels: list[str]
    audits: dict[str, Audit]
    fingerprint: str
    source: str
    from_files: bool

    def longest(self) -> dict[str, int]:
        """Tokens of the longest row of each split."""
        return {split: int(rows.lengths.max()) for split, rows in self.splits.items()}


def prepare(
    hooks: Hooks,
    tokenizer: Any,
    *,
    raw: dict[str, Any] | None = None,
    labels: Sequence[str] | None = None,
) -> Prepared:
    """The formatted data of this config, from the cache or made now.

    Args:
        raw: splits to format in place of the config's own data.
        labels: the class names, where a trained model has them; None takes those of the training data.

    Raises:
        UserError: whatever the audit can't accept, with rows and the cure; a cache that can't be written.
    """
    cfg = hooks.cfg
    if raw is None and not _are_files(hooks):
        raw = hooks.load_data()
    source = data.fingerprint(cfg, raw)
    key = _key(hooks, tokenizer, source, labels)
    directory = cache_root() / "data" / key
    if not (directory / "meta.json").is_file():
        with scratch_directory() as scratch, _only_one(directory):  # many processes may want these rows
            if not (directory / "meta.json").is_file():
                _make(hooks, tokenizer, hooks.load_data() if raw is None else raw, scratch, labels)
                if raw is None and data.fingerprint(cfg, None) != source:
                    raise UserError(
                        "a file of the data changed while it was read; run again when it is complete"
                    )
                scratch.rename(directory)
    prepared = _open(directory, source, raw is None)
    for split, audit in prepared.audits.items():
        _judge(audit, split, cfg)
    return prepared


def cached(hooks: Hooks, tokenizer: Any) -> Prepared | None:
    """What `prepare` would return, where it is in the cache already and comes from files; else None."""
    if not _are_files(hooks):
        return None
    source = data.fingerprint(hooks.cfg, None)
    directory = cache_root() / "data" / _key(hooks, tokenizer, source, None)
    return _open(directory, source, True) if (directory / "meta.json").is_file() else None


def _are_files(hooks: Hooks) -> bool:
    """Whether core reads files: their bytes identify the data, without reading rows."""
    return hooks.implemented("load_data") == ["core"] and isinstance(hooks.cfg.data, FilesData)


def _open(directory: Path, source: str, from_files: bool) -> Prepared:
    meta = json.loads((directory / "meta.json").read_text())
    return Prepared(
        splits={split: Rows(directory / split) for split in meta["audits"]},
        labels=meta["labels"],
        audits={split: Audit(**audit) for split, audit in meta["audits"].items()},
        fingerprint=directory.name,
        source=source,
        from_files=from_files,
    )


@contextlib.contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    """Hold the lock of one cache entry; the cache can be written to."""
    from filelock import FileLock

    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.with_name(f".lock-{directory.name}")):
        yield


def _key(hooks: Hooks, tokenizer: Any, raw: str, labels: Sequence[str] | None) -> str:
    cfg = hooks.cfg
    columns, task = vars(cfg.data.columns), cfg.task.name
    versions = {p.name: (p.version, p.options) for p in hooks.plugins}
    formatters = [
        (name, versions.get(name, __version__), source) for name, source in hooks.sources("format_examples")
    ]
    parts = (
        FORMAT,
        raw,
        labels,
        tokenizer_fingerprint(tokenizer),
        formatters,
        columns,
        task,
        cfg.data.max_length,
    )
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
    side, specials = getattr(tokenizer, "truncation_side", ""), str(tokenizer.special_tokens_map)
    rest = (type(tokenizer).__name__, specials, tokenizer.chat_template, side)
    return hashlib.sha256(repr((state, rest)).encode()).hexdigest()[:16]


def _make(
    hooks: Hooks, tokenizer: Any, raw: dict[str, Any], scratch: Path, given: Sequence[str] | None
) -> None:
    cfg = hooks.cfg
    labels = list(given or ())
    if cfg.task.name == "classify" and given is None:
        there = raw["train"].column_names or list(next(iter(raw["train"])))
        data.require_columns(there, [cfg.data.columns.label], cfg, "train")
        labels = data.label_names(raw["train"], cfg.data.columns.label)
        if len(labels) < 2:
            raise UserError(
                f"column '{cfg.data.columns.label}' has only the label {labels}; classification needs two"
            )
    audits = {}
    for split, dataset in raw.items():
        audits[split], examples = Audit(remarks=list(getattr(dataset, "remarks", ()))), array("q")
        rows = _format(hooks, tokenizer, dataset, labels, split, audits[split], examples)
        if write_rows(rows, scratch / split) == 0:
            raise UserError(
                f"no usable row in the {split} data: {audits[split].dropped} of"
                f" {audits[split].examples} {audits[split].why()}"
            )
        write_examples(examples, scratch / split)
    meta = {"labels": labels, "audits": {s: asdict(a) for s, a in audits.items()}}
    (scratch / "meta.json").write_text(json.dumps(meta))


def _format(
    hooks: Hooks,
    tokenizer: Any,
    dataset: Any,
    labels: Sequence[str],
    split: str,
    audit: Audit,
    examples_of: "array[int]",
) -> Iterator[dict[str, Any]]:
    """Formatted rows of a split, one at a time, counted in `audit`; their examples go to `examples_of`."""
    column = hooks.cfg.data.columns.label
    names, digest = data.class_names(dataset, column), hashlib.sha256()
    waiting: deque[tuple[int, list[dict[str, Any]]]] = deque()  # chunks that are being formatted

    def chunks() -> Iterator[list[dict[str, Any]]]:
        for start, examples in _chunks(dataset):
            for example in examples:
                digest.update(json.dumps(example, sort_keys=True, default=str).encode())
            for example in examples if names and split != "predict" else ():
                index = example[column]  # -1 stands for no label
                example[column] = None if index is None or index < 0 else names[index]
            waiting.append((start, examples))
            yield examples

    def make(examples: list[dict[str, Any]]) -> Any:
        return list(hooks.format_examples(examples, tokenizer, labels, split))

    for entries in fork_map(make, chunks(), hooks.cfg.data.workers):
        start, examples = waiting.popleft()
        if isinstance(entries, data.MissingColumn):
            raise entries
        if isinstance(entries, Exception):
            row = _blame(hooks, tokenizer, examples, labels, split)
            where = f"row {start + row}" if row is not None else f"rows {start}-{start + len(examples) - 1}"
            where += _counted(hooks.cfg, split)
            raise UserError(f"{split} data, {where} (0-based): {entries}") from entries
        for number, entry in enumerate(entries, start):
            rows = [entry] if isinstance(entry, Mapping) else entry
            audit.add(number, rows, shift=int(hooks.cfg.task.name == "causal_lm"))
            examples_of.extend([number] * len(rows))
            yield from ({k: v for k, v in r.items() if k != "truncated"} for r in rows)
    audit.sha256 = digest.hexdigest()


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
    counted = _counted(cfg, split)
    truncated = audit.truncated / max(1, audit.rows)
    if truncated > cfg.data.max_truncated:
        raise UserError(
            f"{audit.truncated} of {audit.rows} rows in the {split} data are truncated to"
            f" data.max_length={cfg.data.max_length} tokens (the longest has {audit.longest},"
            f" examples {audit.cut} (0-based){counted} are cut); raise data.max_length, or allow it by"
            f" data.max_truncated={_round_up(truncated)}"
        )
    unusable = (audit.dropped + audit.masked) / max(1, audit.examples)
    if unusable > cfg.data.max_dropped:
        raise UserError(
            f"{audit.dropped + audit.masked} of {audit.examples} rows in the {split} data"
            f" {audit.why()}{counted}; mend them, or allow it by data.max_dropped={_round_up(unusable)}"
        )


def _counted(cfg: Config, split: str) -> str:
    """What to say of row numbers that are not those of the file."""
    cut = cfg.data.split is not None or getattr(cfg.data.limit, split, None) is not None
    return ", counted after data.split and data.limit" if cut else ""


def _round_up(share: float) -> float:
    return math.ceil(share * 1000) / 1000
