"""Where examples come from: JSON lines read in place, or any data set of core's, as sequences of rows.

Nothing here holds the rows in memory: a file's line offsets (8 bytes a row) stand for them.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
import numpy.typing as npt

from ftcore import UserError, data
from ftcore.config import Config, Csv, FilesData, HubData
from ftcore.errors import nearest
from ftcore.readers import SUFFIXES
from ftcore_instruct import _formats
from ftcore_instruct._formats import FORMATS, Chat, Task

__all__ = [
    "JsonLines",
    "Reader",
    "Settings",
    "Source",
    "Table",
    "open_path",
    "open_source",
    "open_split",
    "settings",
    "split_files",
    "spool",
]

Ints = npt.NDArray[np.integer[Any]]


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
            self._rule(key, "a share, 0 to 1", lambda v: _is_number(v) and v <= 1)
        self._rule("weight", "a number, at least 0", _is_number)
        self._rule("cap", "a whole number, at least 1, or null", lambda v: v is None or _is_whole(v, 1))
        self._rule("shots", "a whole number, at least 0", lambda v: _is_whole(v, 0))
        for key, known in (("dry", ("repeat", "drop", "error")), ("format", ("auto", *FORMATS))):
            self._rule(key, f"one of {', '.join(known)}", known.__contains__)
        for key in ("path", "split"):
            self._rule(key, "a text", lambda v: isinstance(v, str))
        self._rule("name", "a text or null", lambda v: isinstance(v, str | None))

    def _rule(self, key: str, must: str, holds: Callable[[Any], bool]) -> None:
        if not holds(getattr(self, key)):
            raise ValueError(f"{key} must be {must}, got {getattr(self, key)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def settings(given: Any, defaults: Mapping[str, Any], name: str) -> Settings:
    """A source's settings over the plugin's.

    Raises:
        UserError: no mapping, an unknown key, or a value out of range.
    """
    if not isinstance(given, Mapping):
        raise UserError(
            f"plugin.instruct.sources.{name} must be {{path: ...}}, got {given!r}; write"
            f" plugin.instruct.sources.{name}.path={given}"
        )
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
        starts = starts[starts < size]
        # Of the rows, and the end; blank lines, which are no rows, go with the row before.
        self._bounds = np.append(starts[~_blank(path, starts)], size)
        self.fingerprint = digest.hexdigest()
        if not len(self):
            raise UserError(f"{path} has no rows")

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if self._file is None:
            self._file = self.path.open("rb")
        start, end = self._bounds[index : index + 2].tolist()
        self._file.seek(start)
        line = self._file.read(end - start).strip()
        where = f"{self.path} row {index} (0-based)"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where} is broken JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{where} is no JSON object")
        if b"\\ud" in line.lower():  # what an escaped surrogate starts with
            _check_surrogates(row, where)
        return row

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; reading opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _blank(path: Path, starts: Ints) -> npt.NDArray[np.bool_]:
    """Which of a file's lines are white space alone."""
    blank = np.zeros(len(starts), np.bool_)
    if len(blank):
        content = np.memmap(path, np.uint8, mode="r")
        for i in np.flatnonzero(np.isin(content[starts], [9, 10, 13, 32])).tolist():
            end = starts[i + 1] if i + 1 < len(starts) else len(content)
            blank[i] = not content[starts[i] : end].tobytes().strip()
    return blank


def _check_surrogates(row: Mapping[str, Any], where: str) -> None:
    """Refuse half of a surrogate pair: it can't be encoded, nor tokenised."""
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise UserError(
            f"{where} holds a lone surrogate (\\u{code:04x}), which is no character; mend or remove it"
        ) from None


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
    columns: tuple[str, str] = ("text", "target")  # `data.columns.text` and `data.columns.target`
    form: str = ""  # its format
    has_rationale: bool = False  # its first row has one
    is_asked: bool = False  # its rows may lack their answers, which are not read

    def read(self, index: int) -> Chat | Task:
        """A row in one of the two shapes.

        Raises:
            BadRow: the reason why nothing can be trained on it.
            UserError: it lacks a column that its format needs.
        """
        row = self.rows[index]
        if self.is_asked:
            row = _formats.asked(row, self.form, *self.columns)
        return _formats.read(row, self.form, *self.columns, self.name)

    def task(self, index: int) -> str:
        """The task of a row, as far as it says; else the source's name."""
        return str(self.rows[index].get("task") or self.name)

    def close(self) -> None:
        if isinstance(self.rows, JsonLines):
            self.rows.close()


def _files(path: Path, key: str) -> dict[str, Path]:
    """A file, or each file in a directory, by name; `key` of the config says so."""
    if not path.is_dir():
        return {path.stem: path}
    files = sorted(f for f in path.iterdir() if f.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"{key}: no {', '.join(SUFFIXES)} file in {path}")
    if len(named := {f.stem: f for f in files}) < len(files):
        twice = next(f for f in files if named[f.stem] != f)
        raise UserError(f"{key}: {twice} and {named[twice.stem]} would be one source; rename one")
    return named


def open_path(path: Path, key: str, cfg: Config) -> dict[str, Reader]:
    """The readers of a file, or of each file in a directory, by name; `key` of the config says so."""
    return {name: _open_file(file, key, cfg) for name, file in _files(path, key).items()}


def _open_file(path: Path, key: str, cfg: Config) -> Reader:
    if not path.is_file():
        close = difflib.get_close_matches(path.name, [f.name for f in path.parent.glob("*")])
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise UserError(f"{key}: no such file: {path}{hint}")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{key}: can't read '{path.suffix}' files ({path}); known: {', '.join(SUFFIXES)}")
    if path.suffix == ".jsonl":
        return JsonLines(path)
    csv = getattr(cfg.data, "csv", None) or Csv()
    whole = FilesData(train=str(path), max_length=cfg.data.max_length, csv=csv)
    return Table(data.load(dataclasses.replace(cfg, data=whole))["train"])


def open_source(one: Settings, name: str, cfg: Config) -> dict[str, Reader]:
    """The readers of a source in the config: one, or one a file where its path is a directory."""
    if not one.path:
        raise UserError(f"plugin.instruct.sources.{name} has no path")
    path = Path(one.path).expanduser()
    if path.exists():
        for key, value, usual in (("split", one.split, "train"), ("name", one.name, None)):
            if value != usual:
                raise UserError(
                    f"plugin.instruct.sources.{name}.{key} is for a hub id; {one.path} is here, take it away"
                )
        found = open_path(path, f"plugin.instruct.sources.{name}.path", cfg)
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
    return {name: _open_file(file, f"data.{split}", cfg) for name, file in split_files(split, cfg).items()}


def split_files(split: Literal["train", "validation", "test"], cfg: Config) -> dict[str, Path]:
    """The local files of a split of `data=files`, by name; none where it is not set."""
    path = getattr(cfg.data, split)
    return _files(data.local(path), f"data.{split}") if path else {}


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
