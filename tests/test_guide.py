"""The guide's pages: every `sh` block is run as it stands, on small data."""

import csv
import re
import shlex
from pathlib import Path

import pytest

from .cli import make_plugin, make_rows, run_each, write_rows

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "guide"
PAGES = ("student", "engineer", "inventor", "team")


def blocks(page: str, language: str) -> dict[str, str]:
    """The fenced blocks of a language: title (or number) to content."""
    text = (GUIDE / f"{page}.md").read_text(encoding="utf-8")
    found = re.findall(rf'^```{language}(?: title="([^"]+)")?\n(.*?)^```$', text, re.M | re.S)
    return {title or str(i): content for i, (title, content) in enumerate(found)}


def command_lines(page: str) -> list[list[str]]:
    """The arguments of each `ftcore` line of the page; patterns are left for later."""
    lines = []
    for block in blocks(page, "sh").values():
        for line in block.replace("\\\n", " ").splitlines():
            program, *arguments = shlex.split(line)
            assert program == "ftcore", f"{page}: only ftcore's own lines can be run: {line}"
            lines.append(arguments)
    return lines


def make_files(page: str, folder: Path) -> None:
    """What the page's reader has: data, and the files whose content the page shows."""
    if page == "student":
        rows = make_rows("classify", 40)
        with (folder / "sentences.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "label"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        (folder / "new.csv").write_text("text\nthe box was empty\n")
    elif page == "engineer":
        write_rows(folder / "answers.jsonl", make_rows("seq2seq", 32))
        write_rows(folder / "answers-dev.jsonl", make_rows("seq2seq", 8, seed=1))
    elif page == "inventor":
        (source,) = blocks(page, "python").values()
        make_plugin(folder / "site", "anchor", f"{source}\nPlugin = Anchor\n", "alpha: 0.01")
    else:
        write_rows(folder / "train.jsonl", make_rows("classify", 40))
        write_rows(folder / "dev.jsonl", make_rows("classify", 12, seed=1))
        for title, content in blocks(page, "yaml").items():
            (folder / title).parent.mkdir(parents=True)
            (folder / title).write_text(content)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_the_page_ends_well(page: str, tmp_path: Path) -> None:
    """In the page's order; a pattern is what the commands before it have left."""
    make_files(page, tmp_path)
    lines = command_lines(page)
    assert len(lines) >= 4
    first = [line for line in lines if not any("*" in argument for argument in line)]
    last = [line for line in lines if line not in first]
    env = {"PYTHONPATH": str(tmp_path / "site")}
    ended = run_each(first, tmp_path, env)
    if last:
        ended += run_each([expand(line, tmp_path) for line in last], tmp_path, env)
    for one in ended:
        assert one.returncode == 0, f"{one.args}\n{one.stdout}\n{one.stderr}"


def expand(line: list[str], folder: Path) -> list[str]:
    """Patterns as a shell expands them."""
    return [str(p) for a in line for p in (sorted(folder.glob(a)) if "*" in a else [a])]


def test_every_page_is_run() -> None:
    """A new page has to be named here."""
    assert sorted(f.stem for f in GUIDE.glob("*.md")) == sorted(PAGES)
