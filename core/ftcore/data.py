"""Raw data: files and hub repositories as `datasets`, split and limited, with errors that say where.

Nothing here knows tokens; `prepare` formats what this reads.
"""

import difflib
import hashlib
import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftcore import columns
from ftcore.config import Config, FilesData, HubData, Limit
from ftcore.errors import UserError, nearest, root_cause
from ftcore.readers import SUFFIXES, content, dialect, head, read

__all__ = ["fingerprint", "guess_columns", "label_names", "load", "load_file", "require_columns"]

SPLITS = ("train", "validation", "test")


def load(cfg: Config) -> dict[str, Any]:
    """The raw splits of `data=files` or `data=hub`, cut by `data.split` and `data.limit`.

    Raises:
        UserError: a missing, empty or broken file (with its line), an unknown split.
    """
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what goes wrong is said once, by us
    data = cfg.data
    splits = _load_files(data) if isinstance(data, FilesData) else _load_hub(data, cfg.offline)
    if data.split is not None:
        from ftcore.split import cut

        splits = cut(splits, cfg)
    for split in splits:
        limit = getattr(data.limit, split)
        if limit is None:
            continue
        if data.streaming:
            splits[split] = splits[split].take(limit)
        elif limit < len(splits[split]):
            drawn = _draw(splits[split], limit, cfg)
            splits[split] = splits[split].select(drawn, keep_in_memory=True)
    return splits


def load_file(path: str, cfg: Config) -> Any:
    """The rows of one file (or a directory of files), whole and in order."""
    own = cfg.data
    if isinstance(own, FilesData):
        asked = replace(
            own, train=path, validation=None, test=None, split=None, limit=Limit(), streaming=False
        )
    else:
        asked = FilesData(train=path, columns=own.columns)
    return load(replace(cfg, data=asked))["train"]


def _load_files(data: FilesData) -> dict[str, Any]:
    if data.train is None:
        raise UserError("data.train is not set: data=files data.train=FILE data.validation=FILE")
    paths = {split: getattr(data, split) for split in SPLITS if getattr(data, split)}
    return {split: read(_files(path, split), data) for split, path in paths.items()}


def local(path: str) -> Path:
    """A path of the config; `ftcore:NAME` is in this package."""
    if path.startswith("ftcore:"):
        return Path(__file__).resolve().parent / path.removeprefix("ftcore:")
    return Path(path).expanduser()


def _files(path: str, split: str) -> list[Path]:
    """The data files at `path`: itself, or those in the directory, sorted."""
    root = local(path)
    if root.is_dir():
        found = sorted(f for f in root.iterdir() if f.suffix.lower() in SUFFIXES)
        if not found:
            raise UserError(f"data.{split}: no {', '.join(SUFFIXES)} file in {root}")
    elif root.is_file():
        found = [root]
    else:
        close = difflib.get_close_matches(root.name, [f.name for f in root.parent.glob("*")])
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise UserError(f"data.{split}: no such file: {root}{hint}")
    for file in found:
        if file.suffix.lower() not in SUFFIXES:
            raise UserError(
                f"data.{split}: can't read '{file.suffix}' files ({file}); known: {', '.join(SUFFIXES)}"
            )
        if file.stat().st_size == 0:
            raise UserError(f"data.{split}: {file} is empty")
    kinds = {f.suffix.lower() for f in found}
    if len(kinds) > 1:
        raise UserError(f"data.{split}: {root} mixes {', '.join(sorted(kinds))} files; keep one kind")
    return found


def _load_hub(data: HubData, offline: bool) -> dict[str, Any]:
    import datasets

    if not data.path:
        raise UserError("data.path is not set: data=hub data.path=org/name")
    wanted = {s: getattr(data.splits, s) for s in SPLITS if getattr(data.splits, s)}
    config = datasets.DownloadConfig(local_files_only=offline)
    try:
        known = datasets.get_dataset_split_names(
            data.path, data.name, revision=data.revision, download_config=config
        )
        for split, name in list(wanted.items()):
            if name not in known:
                if name != getattr(HubData().splits, split) or split == "train":
                    raise UserError(
                        f"data.splits.{split}: {data.path} has no split '{name}'; {nearest(name, known)}"
                    )
                del wanted[split]  # a default name that this repository does not have
        splits = {
            split: datasets.load_dataset(
                data.path,
                data.name,
                revision=data.revision,
                split=name,
                streaming=data.streaming,
                download_config=config,
            )
            for split, name in wanted.items()
        }
        if data.streaming:  # which leaves them no fingerprint: the repository's commit is theirs
            builder = datasets.load_dataset_builder(
                data.path, data.name, revision=data.revision, download_config=config
            )
            for dataset in splits.values():
                dataset._fingerprint = builder.hash
        return splits
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"can't load data.path={data.path}: {root_cause(error)}") from error


def guess_columns(cfg: Config, fixed: Sequence[str]) -> list[str]:
    """Set those of `data.columns` that the files lack to what they seem to be called; returns what to say.

    Args:
        fixed: the keys of `data.columns` that the user set, which stay.
    """
    if not isinstance(cfg.data, FilesData) or cfg.data.train is None:
        return []
    notes = []
    try:
        for path in dict.fromkeys(getattr(cfg.data, split) for split in SPLITS):
            file = _files(path, "train")[0] if path else None
            if file and SUFFIXES[file.suffix.lower()] == "csv":
                notes.append(f"{file.name}: {dialect(file, cfg.data)}")
        rows = list(itertools.islice(head(_files(cfg.data.train, "train")[0], cfg.data), 1000))
    except (OSError, UserError, ValueError):
        return []  # said when the files are read
    found = columns.guess(cfg.task.name, vars(cfg.data.columns), fixed, rows) if rows else {}
    for key, name in found.items():
        setattr(cfg.data.columns, key, name)
    if found:
        said = " ".join(f"data.columns.{key}={name}" for key, name in found.items())
        notes.append(f"guessed {said} (columns: {', '.join(rows[0])})")
    return notes


def _draw(dataset: Any, count: int, cfg: Config) -> list[int]:
    """`count` rows by `data.split_seed`, each label in proportion, and at least once where they suffice.

    A smaller count draws a part of what a larger one does.
    """
    import numpy as np

    groups, rng = _groups(dataset, cfg), np.random.default_rng(cfg.data.split_seed)
    places = np.empty(len(groups))
    for label in sorted(set(groups)):
        rows = rng.permutation(np.flatnonzero(groups == label))
        places[rows] = (np.arange(len(rows)) + 0.5) / len(rows)  # evenly: any part is in proportion
        places[rows[0]] = 0.0
    order = np.lexsort((rng.random(len(groups)), places))
    return sorted(order[:count].tolist())


def _groups(dataset: Any, cfg: Config) -> Any:
    """Each row's label as a string (classification); one and the same where there are none."""
    import numpy as np

    if cfg.task.name == "classify" and cfg.data.columns.label in dataset.column_names:
        return np.asarray([str(v) for v in dataset[cfg.data.columns.label]], dtype=object)
    return np.zeros(len(dataset), dtype=object)


class MissingColumn(UserError):
    """A fault of the whole split, not of one row."""


def require_columns(there: Sequence[str], names: Sequence[str | None], cfg: Config, split: str) -> None:
    """Raise where a needed column is missing, naming those there are; None asks for nothing."""
    keys = {column: key for key, column in vars(cfg.data.columns).items()}
    for name in names:
        if name is not None and name not in there:
            raise MissingColumn(
                f"no column '{name}' in the {split} data; there are: {', '.join(there)}"
                f" (set data.columns.{keys[name]})"
            )


def class_names(dataset: Any, column: str) -> list[str]:
    """The names of a `ClassLabel` column, whose values are indices of them; empty for other columns."""
    return list(getattr((getattr(dataset, "features", None) or {}).get(column), "names", None) or ())


def label_names(dataset: Any, column: str) -> list[str]:
    """The class names of a label column: the feature's own, or the sorted distinct values."""
    if names := class_names(dataset, column):
        return names
    narrow = dataset.select_columns([column]) if hasattr(dataset, "select_columns") else dataset
    found = (row[column] for row in narrow)
    values = {tuple(v) if isinstance(v, list) else v for v in found if not columns.is_missing(v)}
    if any(isinstance(v, tuple) for v in values):
        raise UserError(f"column '{column}' holds lists; classification takes one label a row, not several")
    stripped: dict[str, Any] = {}
    for value in values:
        if (other := stripped.setdefault(str(value).strip(), value)) != value and str(other) != str(value):
            raise UserError(
                f"column '{column}' has the labels '{other}' and '{value}', which differ by outer space"
                " alone; make them one"
            )
    numbers = {value: number for value in values if (number := _number(value)) is not None}
    if values and len(numbers) == len(values):
        ordered = sorted(values, key=lambda v: (numbers[v], str(v)))
        if fractions := [str(v) for v in ordered if numbers[v] % 1]:
            raise UserError(
                f"column '{column}' holds fractions ({', '.join(fractions[:3])}, ...), which are no classes;"
                " which task is meant? For task=classify make each label a word or a whole number, or set"
                " data.columns.label; to learn text, task=causal_lm or task=seq2seq"
            )
        return [str(v) for v in ordered]
    try:
        return [str(v) for v in sorted(values)]
    except TypeError:
        raise UserError(f"column '{column}' mixes types; make every label a word") from None


def _number(value: Any) -> float | None:
    """A number, or a text that is one; None for everything else."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def fingerprint(cfg: Config, splits: dict[str, Any] | None) -> str:
    """Identifies the raw data by content: the bytes of the config's files (None), or loaded splits' own."""
    digest = hashlib.sha256()
    if splits is None:
        for split in SPLITS:
            if path := getattr(cfg.data, split):
                digest.update(f"{split}:{content(_files(path, split))}".encode())
    else:
        for split, dataset in splits.items():
            own = getattr(dataset, "fingerprint", None) or getattr(dataset, "_fingerprint", None)
            digest.update(f"{split}:{own or dataset.info}".encode())
        hub = cfg.data.path if isinstance(cfg.data, HubData) else None
        if hub and (root := Path(hub).expanduser()).is_dir():
            # The data sets' own is of the files' times, and of nothing where they are streamed.
            digest.update(content(sorted(f for f in root.rglob("*") if f.is_file())).encode())
    csv = getattr(cfg.data, "csv", None)
    first = cfg.data.streaming  # of a stream a limit takes the first rows, else it draws
    cut = (cfg.data.split, cfg.data.split_seed, vars(cfg.data.limit), csv, first)
    digest.update(repr(cut).encode())
    return digest.hexdigest()[:16]
