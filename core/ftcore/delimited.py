"""Delimited text (CSV and its kin): how it is written is found out, and every row is checked.

Knows bytes, fields and lines; nothing of columns' meaning. A file has no types: every field is text,
and an empty one is None. Python's own parser in strict mode both detects and reads, so what was detected
is what is read.

    dialect = detect(Path("reviews.csv"))
    for line, fields in read(Path("reviews.csv"), dialect): ...
"""

import codecs
import csv
import io
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftcore.errors import UserError

__all__ = ["Dialect", "detect", "header", "read"]

DELIMITERS = (",", ";", "\t", "|")
QUOTING: tuple[dict[str, Any], ...] = (  # in the order in which they are tried
    {"quotechar": '"'},
    {"quotechar": '"', "skipinitialspace": True},
    {"quotechar": '"', "doublequote": False, "escapechar": "\\"},
    {"quotechar": "'"},
    {"quoting": csv.QUOTE_NONE},
)
SAMPLE = 1 << 20
"""Characters that the delimiter and the quoting are found out from; the encoding takes the whole file."""

BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
LEGACY = [f"cp125{i}" for i in range(9)] + ["koi8_r", "cp932", "euc_jp", "gb18030", "big5", "cp949"]
"""Encodings of files that are no Unicode, as exports of spreadsheets and databases have them."""


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How a file is written. `quoting` holds parameters of `csv.reader`."""

    encoding: str = "utf-8"
    delimiter: str = ","
    quoting: dict[str, Any] = field(default_factory=lambda: QUOTING[0])

    def __str__(self) -> str:
        shown = "a tab" if self.delimiter == "\t" else f"'{self.delimiter}'"
        quote = self.quoting.get("quotechar")
        escaped = ", escaped by a backslash" if "escapechar" in self.quoting else ""
        quotes = f"{quote} quotes{escaped}" if quote else "no quotes"
        return f"{self.encoding}, {shown} between fields, {quotes}"


def detect(
    file: Path, *, delimiter: str | None = None, quote: str | None = None, encoding: str | None = None
) -> Dialect:
    """How `file` is written; what is given is taken as it is (`quote=""`: there are no quotes).

    The delimiter and the quoting are the first by which every row of the sample parses strictly and has
    as many fields as the header, of which there are most.

    Raises:
        UserError: an encoding that Python does not have, or a file that is nearly UTF-8.
    """
    encoding = encoding or _encoding(file)
    try:
        with file.open(encoding=encoding, errors="replace", newline="") as content:
            text = content.read(SAMPLE + 1)
    except LookupError:
        raise UserError(f"data.csv.encoding: Python has no encoding '{encoding}'") from None
    is_cut = len(text) > SAMPLE
    quotings = [q for q in QUOTING if quote is None or q.get("quotechar", "") == quote]
    first = text.partition("\n")[0]
    if quote is None:  # rare ways to quote are tried only where there are signs of them
        signs = {"escapechar": '\\"' in text, "'": "'" in first}
        quotings = [
            q
            for q in quotings
            if signs.get("escapechar" if "escapechar" in q else q.get("quotechar", ""), True)
        ]
    if quote and not quotings:
        quotings = [{"quotechar": quote}]
    delimiters = (delimiter,) if delimiter else DELIMITERS
    for quoting in quotings:
        found = {d: _fields(text[:SAMPLE], is_cut, d, quoting) for d in delimiters}
        best = max(delimiters, key=lambda d: found[d])  # the first of equals
        if found[best] > 1 or (delimiter and found[best]):
            return Dialect(encoding=encoding, delimiter=best, quoting=quoting)
    # One column, or rows that differ in length: `read` says which.
    return Dialect(encoding=encoding, delimiter=max(delimiters, key=first.count), quoting=quotings[0])


def _fields(text: str, is_cut: bool, delimiter: str, quoting: dict[str, Any]) -> int:
    """Fields of every row; 0 where rows differ or do not parse. The last row of a cut text is left out."""
    csv.field_size_limit(sys.maxsize)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, **quoting)
    counts: list[int] = []
    try:
        counts.extend(len(row) for row in rows if row)
    except csv.Error as error:
        if not (is_cut and "unexpected end" in str(error)):
            return 0
    else:
        if is_cut:
            counts.pop()
    return counts[0] if len(set(counts)) == 1 else 0


def _encoding(file: Path) -> str:
    with file.open("rb") as content:
        start = content.read(4)
        for bom, name in BOMS:
            if start.startswith(bom):
                return name
        if b"\0" in start[:2] and not start.startswith(b"\0\0"):
            return "utf-16-be" if start.startswith(b"\0") else "utf-16-le"
        content.seek(0)
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            while chunk := content.read(SAMPLE):
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return _legacy_encoding(file)
    return "utf-8"


def _legacy_encoding(file: Path) -> str:
    """The encoding of a file that is not UTF-8, told by its lines that are not ASCII."""
    import charset_normalizer

    with file.open("rb") as content:
        numbered = ((n, line) for n, line in enumerate(content, start=1) if not line.isascii())
        lines = list(itertools.islice(numbered, 1000))
    broken = [number for number, line in lines if not _is_utf8(line)]
    if broken and len(broken) < len(lines) / 2:
        raise UserError(
            f"{file} line {broken[0]} is not UTF-8, most others are; mend it, or set data.csv.encoding"
        )
    sample = b"".join(line for _, line in lines)[:SAMPLE]
    found = charset_normalizer.from_bytes(sample, cp_isolation=LEGACY)
    best = found.best()
    # Most such files are cp1252, and a short text reads well in several encodings: the usual one wins a tie.
    usual = [m for m in found if "cp1252" in m.could_be_from_charset]
    if best is None or (usual and usual[0].chaos <= best.chaos):
        return "cp1252"
    return str(best.encoding)


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def header(file: Path, dialect: Dialect) -> list[str]:
    """The names of the columns; one without a name is called by its place (`column 1`).

    Raises:
        UserError: no header, or two columns of one name.
    """
    names = next((fields for _, fields in _rows(file, dialect)), None)
    if names is None:
        raise UserError(f"{file} has no rows")
    names = [name.strip() or f"column {i}" for i, name in enumerate(names, start=1)]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{file}: {names.count(name)} columns are called '{name}'; rename one")
    return names


def read(file: Path, dialect: Dialect) -> Iterator[tuple[int, list[str | None]]]:
    """(line on which a row starts, its fields; an empty one is None), after the header.

    Raises:
        UserError: a row with more or fewer fields than the header, or one that does not parse, with its line.
    """
    rows = _rows(file, dialect)
    width = len(next(rows, (0, []))[1])
    for line, fields in rows:
        if len(fields) != width:
            raise UserError(
                f"{file} line {line}: {len(fields)} fields, the header has {width}"
                f" ({dialect}; data.csv.* sets another)"
            )
        yield line, [value or None for value in fields]


def _rows(file: Path, dialect: Dialect) -> Iterator[tuple[int, Sequence[str]]]:
    """(line, fields) of every row, the header's too; empty lines are no rows."""
    csv.field_size_limit(sys.maxsize)
    line = 1
    try:
        with file.open(encoding=dialect.encoding, newline="") as content:
            rows = csv.reader(content, delimiter=dialect.delimiter, strict=True, **dialect.quoting)
            for fields in rows:
                if fields:
                    yield line, fields
                line = rows.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{file} line {line}: {error} ({dialect}; data.csv.* sets another); mend that row"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not {dialect.encoding} after line {line} ({error.reason})") from error
