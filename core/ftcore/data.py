"""Raw data: files and hub repositories as `datasets`, split and limited, with errors that say where.

Nothing here knows tokens; `prepare` formats what this reads.
"""

import csv
import difflib
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftcore.config import Config, FilesData, HubData
from ftcore.errors import UserError, nearest

__all__ = ["fingerprint", "label_names", "load", "require_columns"]

SUFFIXES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
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
        splits = _cut(splits, data.split, data.split_seed, cfg)
    for split in splits:
        limit = getattr(data.limit, split)
        if limit is None:
            continue
        if data.streaming:
            splits[split] = splits[split].take(limit)
        elif limit < len(splits[split]):
            splits[split] = splits[split].shuffle(seed=data.split_seed).select(range(limit))
    return splits


def _load_files(data: FilesData) -> dict[str, Any]:
    if data.train is None:
        raise UserError("data.train is not set: data=files data.train=FILE data.validation=FILE")
    paths = {split: getattr(data, split) for split in SPLITS if getattr(data, split)}
    return {split: _read(_files(path, split), data.streaming) for split, path in paths.items()}


def local(path: str) -> Path:
    """A path of the config; `ftcore:NAME` is in this package."""
    if path.startswith("ftcore:"):
        return Path(__file__).resolve().parent / path.removeprefix("ftcore:")
    return Path(path).expanduser()


def _files(path: str, split: str) -> list[Path]:
    """The data files at `path`: itself, or those in the directory, sorted."""
    root = local(path)
    if root.is_dir():
        found = sorted(f for f in root.iterdir() if f.suffix in SUFFIXES)
        if not found:
            raise UserError(f"data.{split}: no {', '.join(SUFFIXES)} file in {root}")
    elif root.is_file():
        found = [root]
    else:
        close = difflib.get_close_matches(root.name, [f.name for f in root.parent.glob("*")])
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise UserError(f"data.{split}: no such file: {root}{hint}")
    for file in found:
        if file.suffix not in SUFFIXES:
            raise UserError(
                f"data.{split}: can't read '{file.suffix}' files ({file}); known: {', '.join(SUFFIXES)}"
            )
        if file.stat().st_size == 0:
            raise UserError(f"data.{split}: {file} is empty")
    kinds = {f.suffix for f in found}
    if len(kinds) > 1:
        raise UserError(f"data.{split}: {root} mixes {', '.join(sorted(kinds))} files; keep one kind")
    return found


def _read(files: Sequence[Path], streaming: bool) -> Any:
    import datasets

    kind = SUFFIXES[files[0].suffix]
    options: dict[str, Any] = {}
    if kind == "csv":  # words such as NA and None are words; only an empty field is missing
        options = {"keep_default_na": False, "na_values": [""]}
        options["sep"] = "\t" if files[0].suffix == ".tsv" else ","
    if kind == "json":
        for file in files:
            _check_json_lines(file)
    try:
        dataset = datasets.load_dataset(
            kind, data_files=[str(f) for f in files], split="train", streaming=streaming, **options
        )
    except Exception as error:
        for file in files:
            if kind == "csv":
                _check_csv(file, options["sep"])
        if "corresponds to no data" in str(error):
            raise UserError(f"{files[0]} has no rows") from error
        raise UserError(f"can't read {files[0]}: {_root(error)}") from error
    if not streaming and len(dataset) == 0:
        raise UserError(f"{files[0]} has no rows")
    return dataset


def _root(error: BaseException) -> str:
    """The first line of the innermost cause: what libraries wrap is rarely helpful."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).partition("\n")[0]


def _check_json_lines(file: Path) -> None:
    """Raise for the first line that is no JSON object."""
    with file.open("rb") as lines:
        if lines.read(1) == b"[":
            return  # one JSON array; the reader takes it whole
        lines.seek(0)
        for number, line in enumerate(lines, start=1):
            try:
                good = not line.strip() or isinstance(json.loads(line), dict)
                reason = "is no JSON object"
            except ValueError as error:
                good, reason = False, f"is broken JSON ({error})"
            if not good:
                raise UserError(f"{file} line {number} {reason}; mend or remove that line")


def _check_csv(file: Path, delimiter: str) -> None:
    """Raise for the first row with another number of fields than the header, or text that is no UTF-8."""
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            reader = csv.reader(lines, delimiter=delimiter)
            header = next(reader)
            for row in reader:
                if row and len(row) != len(header):
                    raise UserError(
                        f"{file} line {reader.line_num}: {len(row)} fields, the header has {len(header)}"
                    )
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 ({error.reason}, byte {error.start})") from error


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
        return {
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
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"can't load data.path={data.path}: {_root(error)}") from error


def _cut(splits: dict[str, Any], shares: Sequence[float], seed: int, cfg: Config) -> dict[str, Any]:
    """Cut `train` into the three splits, each label in proportion (classification)."""
    import numpy as np

    if set(splits) != {"train"}:
        raise UserError("data.split cuts data.train alone; take data.validation and data.test away (=null)")
    train = splits["train"]
    if cfg.data.streaming:
        raise UserError("data.split needs the whole data set; it can't be used with data.streaming")
    groups = np.zeros(len(train), dtype=object)
    if cfg.task.name == "classify" and cfg.data.columns.label in train.column_names:
        groups = np.asarray([str(v) for v in train[cfg.data.columns.label]], dtype=object)
    rng = np.random.default_rng(seed)
    parts: dict[str, list[int]] = {s: [] for s in SPLITS}
    for label in sorted(set(groups)):
        rows = rng.permutation(np.flatnonzero(groups == label))
        ends = np.rint(np.cumsum(shares) * len(rows)).astype(int)
        for split, part in zip(SPLITS, np.split(rows, ends[:-1]), strict=True):
            parts[split] += part.tolist()
    return {s: train.select(sorted(rows)) for s, rows in parts.items() if rows}


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
    values = {row[column] for row in dataset} - {None}
    if any(isinstance(v, float) and not v.is_integer() for v in values):
        raise UserError(
            f"column '{column}' holds fractions, so it is no class label; "
            "classification needs words or whole numbers"
        )
    try:
        return [str(v) for v in sorted(values)]
    except TypeError:
        raise UserError(f"column '{column}' mixes types; make every label a word") from None


def fingerprint(cfg: Config, splits: dict[str, Any] | None) -> str:
    """Identifies the raw data by content: the bytes of the config's files (None), or loaded splits' own."""
    digest = hashlib.sha256()
    if splits is None:
        for split in SPLITS:
            for file in _files(path, split) if (path := getattr(cfg.data, split)) else ():
                digest.update(f"{split}:{file.name}".encode())
                with file.open("rb") as content:
                    digest.update(hashlib.file_digest(content, "sha256").digest())
    else:
        for split, dataset in splits.items():
            own = getattr(dataset, "fingerprint", None) or getattr(dataset, "_fingerprint", None)
            digest.update(f"{split}:{own or dataset.info}".encode())
    cut = (cfg.data.split, cfg.data.split_seed, vars(cfg.data.limit))
    digest.update(repr(cut).encode())
    return digest.hexdigest()[:16]
