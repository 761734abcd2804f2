"""Raw data: files and hub repositories as `datasets`, split and limited, with errors that say where.

Nothing here knows tokens; `prepare` formats what this reads.
"""

import contextlib
import difflib
import hashlib
import itertools
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ftcore import columns, delimited
from ftcore.config import Config, FilesData, HubData
from ftcore.errors import UserError, nearest

__all__ = ["cache_root", "fingerprint", "guess_columns", "label_names", "load", "require_columns"]

SUFFIXES = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
SPLITS = ("train", "validation", "test")
CHUNK = 10_000  # rows of a CSV file turned into Arrow at once


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
            shuffled = splits[split].shuffle(seed=data.split_seed, keep_in_memory=True)
            splits[split] = shuffled.select(range(limit), keep_in_memory=True)
    return splits


def _load_files(data: FilesData) -> dict[str, Any]:
    if data.train is None:
        raise UserError("data.train is not set: data=files data.train=FILE data.validation=FILE")
    paths = {split: getattr(data, split) for split in SPLITS if getattr(data, split)}
    return {split: _read(_files(path, split), data) for split, path in paths.items()}


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


def _read(files: Sequence[Path], data: FilesData) -> Any:
    import datasets

    kind = SUFFIXES[files[0].suffix.lower()]
    if kind == "csv":
        return _read_csv(files, data)
    if kind == "json":
        for file in files:
            _check_json(file)
    try:
        # The Arrow copy is mapped into memory; its file can go at once, so nothing stale is ever found.
        with scratch_directory() as scratch:
            dataset = datasets.load_dataset(
                kind,
                data_files=[str(f) for f in files],
                split="train",
                streaming=data.streaming,
                cache_dir=str(scratch),
            )
    except UserError:
        raise
    except Exception as error:
        if "corresponds to no data" in str(error):
            raise UserError(f"{files[0]} has no rows") from error
        raise UserError(f"can't read {files[0]}: {_root(error)}") from error
    if not data.streaming and len(dataset) == 0:
        raise UserError(f"{files[0]} has no rows")
    return dataset


def _root(error: BaseException) -> str:
    """The first line of the innermost cause: what libraries wrap is rarely helpful."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).partition("\n")[0]


def _check_json(file: Path) -> None:
    """Raise for the first line that is no JSON object, or whose text is no text."""
    with file.open("rb") as lines:
        if lines.read(1) == b"[":
            _check_json_array(file)
            return
        lines.seek(0)
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line) if line.strip() else {}
                reason = "" if isinstance(row, dict) else "is no JSON object"
            except ValueError as error:
                reason = f"is broken JSON ({error})"
            if not reason and b"\\ud" in line.lower():  # what an escaped surrogate starts with
                reason = _lone_surrogate(row)
            if reason:
                raise UserError(f"{file} line {number} {reason}; mend or remove that line")


def _check_json_array(file: Path) -> None:
    try:
        rows = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is broken JSON ({error}); mend it") from error
    for number, row in enumerate(rows):
        reason = _lone_surrogate(row) if isinstance(row, dict) else "is no JSON object"
        if reason:
            raise UserError(f"{file}, entry {number} (0-based) {reason}; mend or remove it")


def _lone_surrogate(row: Any) -> str:
    """What is wrong with a row that holds half of a surrogate pair: it can't be encoded, nor tokenised."""
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds a lone surrogate (\\u{ord(text[error.start]):04x}), which is no character"
    return ""


def _read_csv(files: Sequence[Path], data: FilesData) -> Any:
    """Every field as text; all files have the same columns."""
    import datasets
    import pyarrow as pa

    dialects = [dialect(file, data) for file in files]
    names = delimited.header(files[0], dialects[0])
    for file, one in zip(files[1:], dialects[1:], strict=True):
        if (other := delimited.header(file, one)) != names:
            raise UserError(f"{file} has columns {', '.join(other)}; {files[0]} has {', '.join(names)}")

    def rows() -> Iterator[list[str | None]]:
        for file, one in zip(files, dialects, strict=True):
            yield from (fields for _, fields in delimited.read(file, one))

    if next(rows(), None) is None:
        raise UserError(f"{files[0]} has no rows")
    if data.streaming:
        features = datasets.Features({name: datasets.Value("string") for name in names})
        return datasets.IterableDataset.from_generator(
            lambda: (dict(zip(names, row, strict=True)) for row in rows()), features=features
        )
    schema, found = pa.schema([(name, pa.string()) for name in names]), rows()
    batches = []
    while chunk := list(itertools.islice(found, CHUNK)):
        columns = zip(*chunk, strict=True)
        batches.append(pa.record_batch([pa.array(c, pa.string()) for c in columns], schema=schema))
    return datasets.Dataset(pa.Table.from_batches(batches))


def dialect(file: Path, data: FilesData) -> delimited.Dialect:
    """How a delimited file is written: as `data.csv` says, else found out."""
    given = data.csv.delimiter
    return delimited.detect(
        file,
        delimiter="\t" if given in ("tab", "\\t") else given,
        quote=data.csv.quote,
        encoding=data.csv.encoding,
    )


def cache_root() -> Path:
    """`$FTCORE_CACHE`, else `ftcore` in the user's cache directory."""
    if root := os.environ.get("FTCORE_CACHE"):
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ftcore"


@contextlib.contextmanager
def scratch_directory() -> Iterator[Path]:
    """A directory in the cache that is gone afterwards.

    Raises:
        UserError: a cache that can't be written to.
    """
    root = cache_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.mkdtemp(prefix=".making-", dir=root)
    except OSError as error:
        raise UserError(
            f"can't write to the cache {root} ({error.strerror});"
            " set FTCORE_CACHE to a directory that you may write to"
        ) from error
    try:
        yield Path(scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


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
        rows = list(itertools.islice(_head(_files(cfg.data.train, "train")[0], cfg.data), 1000))
    except (OSError, UserError, ValueError):
        return []  # said when the files are read
    found = columns.guess(cfg.task.name, vars(cfg.data.columns), fixed, rows) if rows else {}
    for key, name in found.items():
        setattr(cfg.data.columns, key, name)
    if found:
        said = " ".join(f"data.columns.{key}={name}" for key, name in found.items())
        notes.append(f"guessed {said} (columns: {', '.join(rows[0])})")
    return notes


def _head(file: Path, data: FilesData) -> Iterator[dict[str, Any]]:
    """The first rows of a file, read without the others; none of a large JSON array."""
    kind = SUFFIXES[file.suffix.lower()]
    if kind == "csv":
        how = dialect(file, data)
        names = delimited.header(file, how)
        yield from (dict(zip(names, row, strict=True)) for _, row in delimited.read(file, how))
    elif kind == "parquet":
        from pyarrow.parquet import ParquetFile

        for batch in ParquetFile(file).iter_batches(batch_size=1000):
            yield from batch.to_pylist()
    else:
        with file.open("rb") as lines:
            if lines.read(1) != b"[":
                lines.seek(0)
                yield from (json.loads(line) for line in lines if line.strip())
            elif file.stat().st_size <= 1 << 26:
                yield from json.loads(file.read_bytes())


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
    return list(getattr((dataset.features or {}).get(column), "names", None) or ())


def label_names(dataset: Any, column: str) -> list[str]:
    """The class names of a label column: the feature's own, or the sorted distinct values."""
    if names := class_names(dataset, column):
        return names
    values = {row[column] for row in dataset.select_columns([column])} - {None}
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
            for file in _files(path, split) if (path := getattr(cfg.data, split)) else ():
                digest.update(f"{split}:{file.name}".encode())
                with file.open("rb") as content:
                    digest.update(hashlib.file_digest(content, "sha256").digest())
    else:
        for split, dataset in splits.items():
            digest.update(f"{split}:{getattr(dataset, '_fingerprint', dataset.info)}".encode())
    cut = (cfg.data.split, cfg.data.split_seed, vars(cfg.data.limit), getattr(cfg.data, "csv", None))
    digest.update(repr(cut).encode())
    return digest.hexdigest()[:16]
