"""Files as `datasets`: JSON, delimited text and Parquet, loaded or streamed, with errors that say where.

Loaded data are an Arrow file mapped into memory, whose name is gone at once: nothing stale is ever found, and
data larger than memory can be loaded. Delimited text and Parquet are read in batches by this module:
`datasets` turns `007` into 7, and keeps a whole Parquet file in memory [datasets 5.2, streaming too].
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ftcore import delimited
from ftcore.config import FilesData
from ftcore.errors import UserError, root_cause

__all__ = ["SUFFIXES", "cache_root", "content", "dialect", "head", "read", "scratch_directory"]

SUFFIXES = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
CHUNK = 1000  # rows of an Arrow batch
DATE = re.compile(rb'"\d{4}-\d\d-\d\d')  # how a text begins that Arrow would take for a time


def read(files: Sequence[Path], data: FilesData) -> Any:
    """The rows of files of one kind, in order.

    Raises:
        UserError: a file that is broken (with its line) or has no rows, or columns that differ.
    """
    kind = SUFFIXES[files[0].suffix.lower()]
    try:
        if kind == "json":
            dataset = _read_json(files, data.streaming)
        else:
            schema, batches = (_csv if kind == "csv" else _parquet)(files, data)
            if next(batches(), None) is None:
                raise UserError(f"{files[0]} has no rows")
            dataset = _stream(schema, batches) if data.streaming else _load(schema, batches)
        dataset._fingerprint = content(files, data.csv)  # its own is of paths and times
        return dataset
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"can't read {files[0]}: {root_cause(error)}") from error


def content(files: Sequence[Path], *more: Any) -> str:
    """Digest of the files' names and bytes, and of what else decides the rows."""
    digest = hashlib.sha256(repr(more).encode())
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def head(file: Path, data: FilesData) -> Iterator[dict[str, Any]]:
    """The first rows of a file, read without the others; none of a large JSON array."""
    kind = SUFFIXES[file.suffix.lower()]
    if kind != "json":
        for batch in (_csv if kind == "csv" else _parquet)([file], data)[1]():
            yield from batch.to_pylist()
        return
    with file.open("rb") as lines:
        if lines.read(1) != b"[":
            lines.seek(0)
            yield from (json.loads(line) for line in lines if line.strip())
        elif file.stat().st_size <= 1 << 26:
            yield from json.loads(file.read_bytes())


def _stream(schema: Any, batches: Callable[[], Iterator[Any]]) -> Any:
    import datasets

    return datasets.IterableDataset.from_generator(
        lambda: (row for batch in batches() for row in batch.to_pylist()),
        features=datasets.Features.from_arrow_schema(schema),
    )


def _load(schema: Any, batches: Callable[[], Iterator[Any]]) -> Any:
    import datasets
    import pyarrow as pa

    with scratch_directory() as scratch:
        with pa.OSFile(str(scratch / "rows.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as out:
            for batch in batches():
                out.write_batch(batch)
        return datasets.Dataset.from_file(str(scratch / "rows.arrow"))


def _csv(files: Sequence[Path], data: FilesData) -> tuple[Any, Callable[[], Iterator[Any]]]:
    """Schema and batches of delimited text; every field is text."""
    import pyarrow as pa

    dialects = {file: dialect(file, data) for file in files}
    names = delimited.header(files[0], dialects[files[0]])
    for file, how in dialects.items():
        if (other := delimited.header(file, how)) != names:
            raise UserError(f"{file} has columns {', '.join(other)}; {files[0]} has {', '.join(names)}")
    schema = pa.schema([(name, pa.string()) for name in names])

    def batches() -> Iterator[Any]:
        rows = (fields for file, how in dialects.items() for _, fields in delimited.read(file, how))
        while chunk := list(itertools.islice(rows, CHUNK)):
            columns = zip(*chunk, strict=True)
            yield pa.record_batch([pa.array(column, pa.string()) for column in columns], schema=schema)

    return schema, batches


def _parquet(files: Sequence[Path], data: FilesData) -> tuple[Any, Callable[[], Iterator[Any]]]:
    """Schema and batches of Parquet, with little read ahead."""
    from pyarrow.parquet import ParquetFile, read_schema

    schema = read_schema(files[0])
    for file in files[1:]:
        if not (other := read_schema(file)).equals(schema):
            raise UserError(f"{file} has columns {_columns(other)}; {files[0]} has {_columns(schema)}")

    def batches() -> Iterator[Any]:
        for file in files:
            with ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as content:
                yield from content.iter_batches(batch_size=CHUNK)

    return schema, batches


def _columns(schema: Any) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


def dialect(file: Path, data: FilesData) -> delimited.Dialect:
    """How a delimited file is written: as `data.csv` says, else found out."""
    given = data.csv.delimiter
    return delimited.detect(
        file,
        delimiter="\t" if given in ("tab", "\\t") else given,
        quote=data.csv.quote,
        encoding=data.csv.encoding,
    )


def _read_json(files: Sequence[Path], streaming: bool) -> Any:
    import datasets

    has_dates = sum(map(_check_json, files)) > 0  # each file is checked
    with scratch_directory() as scratch:
        load = functools.partial(
            datasets.load_dataset,
            "json",
            data_files=[str(f) for f in files],
            split="train",
            cache_dir=str(scratch),
        )
        dataset = load(streaming=streaming)
        if not streaming and len(dataset) == 0:
            raise UserError(f"{files[0]} has no rows")
        if not has_dates:
            return dataset
        found = dataset.features or load().features  # of a streamed array they are not known
        features = datasets.Features({name: _without_times(kind) for name, kind in found.items()})
        rows = functools.partial(_json_rows, files, features)
        if streaming:
            return datasets.IterableDataset.from_generator(rows, features=features)
        return datasets.Dataset.from_generator(rows, features=features, cache_dir=str(scratch))


def _json_rows(files: Sequence[Path], features: Any) -> Iterator[dict[str, Any]]:
    """The rows as they stand in the files, which were checked."""
    for file in files:
        with file.open("rb") as lines:
            is_array = lines.read(1) == b"["
            lines.seek(0)
            for row in json.loads(lines.read()) if is_array else (json.loads(x) for x in lines if x.strip()):
                if late := row.keys() - features.keys():
                    raise UserError(f"{file}: '{late.pop()}' stands in late rows alone; give it to the first")
                yield row


def _without_times(feature: Any) -> Any:
    """A feature with texts where Arrow found times, by which it would write 2024-05-01 otherwise."""
    import datasets

    if isinstance(feature, dict):
        return {name: _without_times(one) for name, one in feature.items()}
    if isinstance(feature, datasets.List):
        return datasets.List(_without_times(feature.feature))
    is_time = isinstance(feature, datasets.Value) and feature.dtype.startswith(("timestamp", "date", "time"))
    return datasets.Value("string") if is_time else feature


def _check_json(file: Path) -> bool:
    """Raise for the first line that is no JSON object, or whose text is no text; whether dates are there."""
    has_dates = False
    with file.open("rb") as lines:
        if lines.read(1) == b"[":
            return _check_json_array(file)
        lines.seek(0)
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line) if line.strip() else {}
                reason = "" if isinstance(row, dict) else "is no JSON object"
            except ValueError as error:
                reason = f"is broken JSON ({error})"
            has_dates = has_dates or DATE.search(line) is not None
            if not reason and b"\\ud" in line.lower():  # what an escaped surrogate starts with
                reason = _lone_surrogate(row)
            if reason:
                raise UserError(f"{file} line {number} {reason}; mend or remove that line")
    return has_dates


def _check_json_array(file: Path) -> bool:
    content = file.read_bytes()
    try:
        rows = json.loads(content)
    except ValueError as error:
        raise UserError(f"{file} is broken JSON ({error}); mend it") from error
    for number, row in enumerate(rows):
        reason = _lone_surrogate(row) if isinstance(row, dict) else "is no JSON object"
        if reason:
            raise UserError(f"{file}, entry {number} (0-based) {reason}; mend or remove it")
    return DATE.search(content) is not None


def _lone_surrogate(row: Any) -> str:
    """What is wrong with a row that holds half of a surrogate pair: it can't be encoded, nor tokenised."""
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds a lone surrogate (\\u{ord(text[error.start]):04x}), which is no character"
    return ""


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
