"""Files as `datasets`: JSON, delimited text and Parquet, loaded or streamed, with errors that say where.

Loaded data are an Arrow file mapped into memory, whose name is gone at once: nothing stale is ever found, and
data larger than memory can be loaded. Delimited text and Parquet are read in batches by this module:
`datasets` turns `007` into 7, and keeps a whole Parquet file in memory [datasets 5.2, streaming too].
"""

import contextlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ftcore import delimited
from ftcore.config import FilesData
from ftcore.errors import UserError, root_cause

__all__ = ["SUFFIXES", "cache_root", "dialect", "head", "read", "scratch_directory"]

SUFFIXES = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
CHUNK = 1000  # rows of an Arrow batch


def read(files: Sequence[Path], data: FilesData) -> Any:
    """The rows of files of one kind, in order.

    Raises:
        UserError: a file that is broken (with its line) or has no rows, or columns that differ.
    """
    kind = SUFFIXES[files[0].suffix.lower()]
    try:
        if kind == "json":
            return _read_json(files, data.streaming)
        schema, batches = (_csv if kind == "csv" else _parquet)(files, data)
        if next(batches(), None) is None:
            raise UserError(f"{files[0]} has no rows")
        return _stream(schema, batches) if data.streaming else _load(schema, batches)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"can't read {files[0]}: {root_cause(error)}") from error


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

    for file in files:
        _check_json(file)
    with scratch_directory() as scratch:
        dataset = datasets.load_dataset(
            "json",
            data_files=[str(f) for f in files],
            split="train",
            streaming=streaming,
            cache_dir=str(scratch),
        )
    if not streaming and len(dataset) == 0:
        raise UserError(f"{files[0]} has no rows")
    return dataset


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
