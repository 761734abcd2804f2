"""Delimited text: how it is written is found out, what does not fit is an error with its line."""

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftcore import UserError
from ftcore.delimited import detect, header, read

FRENCH = "C’est une très bonne idée;oui\nça ne va pas où;non"  # noqa: RUF001


def parse(path: Path, content: str | bytes) -> tuple[str, str, list[list[str | None]]]:
    """(encoding, delimiter, rows with the header)."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    found = detect(path)
    return found.encoding, found.delimiter, [header(path, found), *(row for _, row in read(path, found))]


@pytest.mark.parametrize(
    ("text", "encoding", "delimiter"),
    [
        ("text,label\nnäher,ja", "utf-8", ","),
        ("text,label\nnäher,ja", "utf-8-sig", ","),
        ("text\tlabel\nnäher\tja", "utf-16", "\t"),
        ("text\tlabel\nnäher\tja", "utf-16-le", "\t"),
        (f"texte;classe\n{FRENCH}", "cp1252", ";"),
        ("text|label\nzażółć gęślą jaźń|a", "cp1250", "|"),
        ("text;label\nПривет как дела сегодня;a", "cp1251", ";"),  # noqa: RUF001
        ("text,label\n今日はとても良い天気です,a", "cp932", ","),
        ("text;label\na, b, c;x\nd, e;y", "utf-8", ";"),
        ("text;label\n'tis late, he said;x\nit's;y", "utf-8", ";"),
        ("text,label\nI don't, really;x", "utf-8", ","),
    ],
)
def test_encoding_and_delimiter_are_found_out(
    tmp_path: Path, text: str, encoding: str, delimiter: str
) -> None:
    """Exports of spreadsheets in several languages; commas and apostrophes in texts mislead nobody."""
    rows = [line.split(delimiter) for line in text.split("\n")]
    assert parse(tmp_path / "a.csv", text.encode(encoding)) == (encoding, delimiter, rows)


@pytest.mark.parametrize(
    ("content", "row"),
    [
        ('text,label\n"a, ""b""\nc",x\n', ['a, "b"\nc', "x"]),
        ('text, label\nx, "a, b"\n', ["x", "a, b"]),
        ('text,label\n"a, \\"b\\"",x\n', ['a, "b"', "x"]),
        ("'text','label'\n'a, b','x'\n", ["a, b", "x"]),
        ('text\tlabel\n"Hi" he said\tx\n', ['"Hi" he said', "x"]),
        ('text\tlabel\n"unfinished\tx\n', ['"unfinished', "x"]),
        ("text\nonly one column\n", ["only one column"]),
        ("text,label\r\n\r\na,\r\n", ["a", None]),
        (",text\n0,a\n", ["0", "a"]),
    ],
)
def test_quoting_is_found_out(tmp_path: Path, content: str, row: list[str | None]) -> None:
    """Doubled, after a space, escaped, single or none; an empty field is None, an empty line no row."""
    assert parse(tmp_path / "a.csv", content)[2][1:] == [row]


FIELD = st.text(st.sampled_from("ab é,;\t|\"'\n."), max_size=8)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(FIELD, FIELD), min_size=1, max_size=6),
    delimiter=st.sampled_from(",;\t|"),
)
def test_what_pythons_writer_writes_is_read_back(
    tmp_path_factory: Any, rows: list[tuple[str, str]], delimiter: str
) -> None:
    """Quoted where needed, whatever the fields hold."""
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows([("text", "label"), *rows])
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    _, found, read_back = parse(path, file.getvalue())
    assert found == delimiter
    assert read_back[1:] == [[field or None for field in row] for row in rows]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\na,b\nc\n", r"line 3: 1 fields, the header has 2"),
        ('text,label\n"a\nb",c\nd,e,f\n', r"line 4: 3 fields, the header has 2"),
        (b"text,label\n" + "é,a\n".encode() * 9 + b"\xe9,a\n", r"line 11 is not UTF-8, most others are"),
        ("", r"has no rows"),
    ],
)
def test_what_does_not_fit_is_named_with_its_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    """The line on which the row starts, fields in quotes counted as they span lines."""
    with pytest.raises(UserError, match=message):
        parse(tmp_path / "a.csv", content)


def test_quote_that_never_ends_far_into_a_file_is_an_error(tmp_path: Path) -> None:
    """Beyond the sample, a row that does not parse is found when it is read: no row is swallowed."""
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + '"some words",a\n' * 80_000 + '"never ends,a\n' + "more,b\n" * 10)
    with pytest.raises(UserError, match=r"line 80002: unexpected end of data"):
        list(read(path, detect(path)))
