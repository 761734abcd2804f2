"""The pages: parsed whatever stands in the data, and looked at in a headless browser where there is one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ftcore_report import compare, find_runs
from ftcore_report._pages import comparison_page
from ftcore_report._run_page import run_page
from ftcore_report._svg import ticks

RNG = np.random.default_rng(2)
EVIL = "<script>alert(1)</script>\"'&\u202e\x00"
BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")
VOID = {"meta", "br", "line", "circle", "rect", "polygon", "polyline"}


class Page(HTMLParser):
    """Tags, whether they close as they opened, and the text of each kind."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def count(self, tag: str) -> int:
        return sum(t == tag for t, _ in self.tags)


@pytest.fixture
def pages(tmp_path: Path, make_run: Callable[..., Path]) -> dict[str, str]:
    """A comparison of three arms with four seeds, and one of its runs; labels and texts are hostile."""
    rows = [{"text": f"{EVIL} {i}", "label": ("late delivery", "praise", "refund")[i % 3]} for i in range(80)]
    test = tmp_path / "test.jsonl"
    test.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for seed in range(4):
        for share, plugins in ((0.5, {}), (0.6, {"mixout": {"p": 0.7}}), (0.9, {EVIL: {}})):
            config = {"data.test": str(test)}
            answers = RNG.random(80) < share
            make_run(f"{seed}-{share}", seed=seed, answers=answers, plugins=plugins, config=config)
    runs, problems = find_runs([tmp_path / "runs"])
    assert not problems
    found = compare(runs)
    return {"compare": comparison_page(found, [f"left out: {EVIL}"]), "run": run_page(runs[1])}


def test_pages_are_well_formed_and_fetch_nothing(pages: dict[str, str]) -> None:
    """Every tag closes; there is no script, link, image or address, whatever stands in the data."""
    for text in pages.values():
        page = Page(text)
        assert {"script", "link", "img", "iframe", "object"}.isdisjoint(t for t, _ in page.tags)
        assert not any(name in ("src", "href") or name.startswith("on") for _, a in page.tags for name in a)
        assert "http:" not in text
        assert "https:" not in text
        assert "url(" not in text
    assert "<script" in "".join(Page(pages["compare"]).texts["td"])


def test_every_chart_has_a_name_a_description_and_its_figures(pages: dict[str, str]) -> None:
    """For those who can't see it: title and desc of each picture, and a table beside it."""
    page = Page(pages["compare"])
    pictures = [a for t, a in page.tags if t == "svg"]
    assert len(pictures) == 4
    ids = {a["id"] for t, a in page.tags if t in ("title", "desc") and "id" in a}
    for attributes in pictures:
        assert attributes["role"] == "img"
        assert set(str(attributes["aria-labelledby"]).split()) <= ids
    assert page.count("details") == 4
    assert page.count("desc") == 4


def test_a_page_says_where_arms_disagree(pages: dict[str, str]) -> None:
    """The rows with their texts, how many runs were right, and what the others said."""
    cells = Page(pages["compare"]).texts["td"]
    assert any(cell.startswith(EVIL[:20]) for cell in cells)
    assert any(cell.startswith(("0/4 (", "1/4 (")) for cell in cells)


def test_texts_are_shown_only_where_they_belong(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    """A data file that has changed since: rows by number alone, no wrong text."""
    test = tmp_path / "test.jsonl"
    test.write_text('{"text": "not this", "label": "other"}\n' * 30)
    for plugins in ({}, {"mixout": {}}):
        answers = np.arange(30) % (2 + len(plugins)) > 0
        make_run(f"{len(plugins)}", plugins=plugins, answers=answers, config={"data.test": str(test)})
    text = comparison_page(compare(find_runs([tmp_path / "runs"])[0]), [])
    assert "rows that differ most" in text
    assert "not this" not in text


def test_a_run_page_has_terms_matrix_audit_and_plugins(pages: dict[str, str]) -> None:
    """Each part of a run's page, with its figures."""
    page = Page(pages["run"])
    headings = ["The run", "Metrics", "Training", "Who was mistaken for whom", "Data", "Plugins"]
    assert page.texts["h2"] == headings
    assert "1.25" in page.texts["td"]  # milliseconds in the plugin's hooks
    assert {"loss", "grad_norm", "lr", "eval/accuracy"} <= set(page.texts["h3"])
    assert "truncated" in page.texts["td"]


def test_a_run_with_terms_and_groups(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    """Loss terms share a chart; a null term is a gap; groups are bars; unfinished runs have a page too."""
    metrics = {"test/accuracy": 0.5, "test/group/a/accuracy": 0.4, "test/group/b/accuracy": 0.6}
    path = make_run("a", metrics=metrics)
    records = [{"step": 1, "loss": 1.0, "loss/task": 0.9, "loss/scl": None}]
    records += [{"step": 2, "loss": 0.9, "loss/task": 0.8, "loss/scl": 0.1}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    result = json.loads((path / "result.json").read_text())
    result["metric"]["name"] = "test/accuracy"
    (path / "result.json").write_text(json.dumps(result))
    page = Page(run_page(find_runs([path])[0][0]))
    assert "Loss, by term (unweighted)" in page.texts["h3"]
    assert "accuracy by group (test)" in page.texts["h3"]
    half = make_run("b", finished=False)
    (half / "metrics.jsonl").unlink()
    assert Page(run_page(find_runs([half])[0][0])).texts["h2"] == ["The run", "Data"]


def test_hostile_labels_in_a_matrix(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    """Class names are text from the data, in the picture as in the table."""
    path = make_run("a")
    columns = {"row": [0, 1], "label": [EVIL, "b"], "prediction": ["b", "b"], "scores": [{"b": 0.5}] * 2}
    pq.write_table(pa.table(columns), path / "predictions/test.parquet")
    text = run_page(find_runs([path])[0][0])
    Page(text)
    assert "<script" not in text


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.81, 0.83), (-3, 1e6), (1e-5, 3e-5), (2, 2)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    """Between two and nine ticks within the range; one where it is empty."""
    found = ticks(low, high)
    assert all(low - 1e-9 * abs(high) <= t <= high * (1 + 1e-9) for t in found)
    assert len(found) == 1 if low == high else 2 <= len(found) <= 9


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium by playwright; a machine without one skips these tests, unless CI says it has one."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None and not os.environ.get("FTCORE_BROWSER"):
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as engine:
        opened = engine.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


CONTRAST = """() => {
  const luminance = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b };
  const back = luminance(getComputedStyle(document.body).backgroundColor);
  const ratio = c => { const l = luminance(c);
    return (Math.max(l, back) + 0.05) / (Math.min(l, back) + 0.05) };
  const worst = (s, p) => Math.min(...[...document.querySelectorAll(s)]
    .map(e => ratio(getComputedStyle(e)[p])));
  return { text: worst('h1,h2,h3,p,td,th,caption,summary', 'color'),
    labels: worst('svg text:not(.on)', 'fill'), marks: worst('.mark', 'fill'),
    lines: worst('.curve,.whisker,.mean', 'stroke') } }"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_the_page(browser: Any, pages: dict[str, str], tmp_path: Path, scheme: str) -> None:
    """From disk, in light and dark: no request but the page, no error, no overflow, and enough contrast."""
    for name, text in pages.items():
        path = tmp_path / f"{name}.html"
        path.write_text(text, encoding="utf-8")
        view = browser.new_page(color_scheme=scheme, viewport={"width": 900, "height": 700})
        asked: list[str] = []
        said: list[str] = []
        view.on("request", lambda r, asked=asked: asked.append(r.url))
        view.on("console", lambda m, said=said: said.append(m.text))
        view.on("pageerror", lambda e, said=said: said.append(str(e)))
        view.goto(path.as_uri())
        assert asked == [path.as_uri()]
        assert said == []
        width = view.evaluate("document.documentElement.scrollWidth")
        assert width <= 900, f"{name} is {width} pixels wide"
        assert view.evaluate("document.scripts.length") == 0
        found = view.evaluate(CONTRAST)
        # WCAG 2.2: 4.5 for text, 3 for what a chart is read by.
        assert found["text"] >= 4.5, found
        assert found["labels"] >= 4.5, found
        assert found["lines"] >= 3, found
        if found["marks"] is not None:
            assert found["marks"] >= 3, found
        outside = view.evaluate(
            """() => [...document.querySelectorAll('svg')].flatMap(s => { const b = s.getBoundingClientRect();
            return [...s.querySelectorAll('text')].filter(t => { const r = t.getBoundingClientRect();
            return r.left < b.left - 1 || r.right > b.right + 1 || r.bottom > b.bottom + 1 })
            .map(t => t.textContent) })"""
        )
        assert outside == [], f"{name}: text outside of its chart"
        view.close()
