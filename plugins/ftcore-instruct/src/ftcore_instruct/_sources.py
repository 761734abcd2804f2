"""Where examples come from: JSON lines read in place, or any data set of core's, as sequences of rows.

Nothing here holds the rows in memory: a file's line offsets (8 bytes a row) stand for them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
import numpy.typing as npt

from ftcore import UserError, data
from ftcore.config import Config, FilesData, HubData
from ftcore.errors import nearest
from ftcore.readers import SUFFIXES

__all__ = [
    "JsonLines",
    "Reader",
    "Settings",
    "Source",
    "Table",
    "open_source",
    "open_split",
    "settings",
    "spool",
]

Ints = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a source takes part in the mixture; the plugin's own options are the defaults of all sources."""

    path: str = ""  # a file, a directory of files, or a hub id
    name: str | None = None  # a hub repository's configuration
    split: str = "train"  # and its split
    format: str = "auto"
    weight: float = 1.0
    cap: int | None = None
    dry: str = "repeat"
    few_shot: float = 0.0
    shots: int = 0
    options: float = 1.0
    cot: float = 0.0
    invert: float = 0.0

    def __post_init__(self) -> None:
        for key in ("few_shot", "options", "cot", "invert"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key} must be a share, 0 to 1, got {getattr(self, key)}")
        if self.weight < 0 or (self.cap or 1) < 1 or self.shots < 0:
            raise ValueError("weight and shots must be at least 0, cap at least 1")
        if self.dry not in ("repeat", "drop", "error"):
            raise ValueError(f"dry must be repeat, drop or error, got '{self.dry}'")


def settings(given: Mapping[str, Any], defaults: Mapping[str, Any], name: str) -> Settings:
    """A source's settings over the plugin's.

    Raises:
        UserError: an unknown key, or a value out of range.
    """
    known = [f.name for f in dataclasses.fields(Settings)]
    for key in given:
        if key not in known:
            raise UserError(f"plugin.instruct.sources.{name} has no '{key}'; {nearest(key, known)}")
    try:
        return Settings(**{**defaults, **given})
    except (ValueError, TypeError) as error:
        raise UserError(f"plugin.instruct.sources.{name}: {error}") from error


class Reader(Protocol):
    """A sequence of raw rows that is identified by its content."""

    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


class JsonLines:
    """The rows of a JSON lines file, each read where it stands.

    Raises:
        UserError: an empty file; when a row is read, one that is no JSON object.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        digest, ends, size = hashlib.sha256(), [np.zeros(1, np.int64)], 0
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
                ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + size + 1)
                size += len(block)
        starts = np.concatenate(ends)
        self._starts = starts[starts < size]
        self._stops = np.append(self._starts[1:], size)
        keep = self._stops - self._starts > 1  # an empty line is no row
        self._starts, self._stops = self._starts[keep], self._stops[keep]
        self.fingerprint = digest.hexdigest()
        if not len(self._starts):
            raise UserError(f"{path} has no rows")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if self._file is None:
            self._file = self.path.open("rb")
        self._file.seek(int(self._starts[index]))
        line = self._file.read(int(self._stops[index] - self._starts[index]))
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{self.path} row {index} (0-based) is broken JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{self.path} row {index} (0-based) is no JSON object")
        return row

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; reading opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


class Table:
    """A `datasets.Dataset` as a reader."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self.fingerprint = str(dataset._fingerprint)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        row: Mapping[str, Any] = self._dataset[int(index)]
        return row


@dataclasses.dataclass(kw_only=True)
class Source:
    """A named source: its rows, which of them are used, and how it takes part."""

    name: str
    rows: Reader
    kept: Ints
    settings: Settings
    form: str = ""  # its format
    has_rationale: bool = False  # its first row has one

    def close(self) -> None:
        if isinstance(self.rows, JsonLines):
            self.rows.close()


def open_path(path: Path, split: str, cfg: Config) -> dict[str, Reader]:
    """The readers of a file, or of each file in a directory, by name."""
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix.lower() in SUFFIXES)
        if not files:
            raise UserError(f"data.{split}: no {', '.join(SUFFIXES)} file in {path}")
        if len(named := {f.stem: f for f in files}) < len(files):
            twice = next(f for f in files if named[f.stem] != f)
            raise UserError(f"data.{split}: {twice} and {named[twice.stem]} would be one source; rename one")
        return {f.stem: _open_file(f, cfg) for f in files}
    return {path.stem: _open_file(path, cfg)}


def _open_file(path: Path, cfg: Config) -> Reader:
    if path.suffix == ".jsonl" and path.is_file():
        return JsonLines(path)
    whole = FilesData(train=str(path), max_length=cfg.data.max_length)
    return Table(data.load(dataclasses.replace(cfg, data=whole))["train"])


def open_source(one: Settings, name: str, cfg: Config) -> dict[str, Reader]:
    """The readers of a source in the config: one, or one a file where its path is a directory."""
    if not one.path:
        raise UserError(f"plugin.instruct.sources.{name} has no path")
    path = Path(one.path).expanduser()
    if path.exists():
        found = open_path(path, f"sources.{name}", cfg)
        return (
            {name: next(iter(found.values()))}
            if not path.is_dir()
            else {f"{name}/{k}": v for k, v in found.items()}
        )
    if one.path.startswith(("/", ".", "~")) or one.path.count("/") > 1 or path.suffix in SUFFIXES:
        raise UserError(f"plugin.instruct.sources.{name}.path: no such file: {one.path}")
    hub = HubData(path=one.path, name=one.name)
    hub.splits.train, hub.splits.validation, hub.splits.test = one.split, None, None
    return {name: Table(data.load(dataclasses.replace(cfg, data=hub))["train"])}


def open_split(split: Literal["train", "validation", "test"], cfg: Config) -> dict[str, Reader]:
    """The readers of a local split of `data=files`, by name; none where it is not set."""
    path = getattr(cfg.data, split)
    return open_path(data.local(path), split, cfg) if path else {}


def spool(dataset: Any, directory: Path, name: str) -> JsonLines:
    """A stream written to disk as JSON lines, so that it can be read in any order like a file.

    What is there is read: `directory` is named after what identifies the stream.
    """
    path = directory / f"{name}.jsonl"
    if not path.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        scratch = directory / f"{name}.{os.getpid()}.part"  # other processes may write theirs
        with scratch.open("w", encoding="utf-8") as file:
            for row in dataset:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        scratch.replace(path)
    return JsonLines(path)
