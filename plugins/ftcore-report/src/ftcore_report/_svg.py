"""Charts as SVG text: numbers in, markup out. No script, no font, no network; colours come from the page.

Each chart has a `<title>` and a `<desc>` for those who can't see it, and tooltips where there is a mouse. All
text is escaped. Colour is never the only difference: lines have dashes, marks have shapes and labels.
"""

from __future__ import annotations

import hashlib
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Band", "Point", "bars", "curves", "forest", "matrix", "scatter", "strips"]

WIDTH = 720
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 14, 44
COLOURS = 8
DASHES = ("", "7 3", "2 3", "10 3 2 3")
SHAPES = ("circle", "square", "diamond", "triangle")
NAME_WIDTH, NAME_LINES = 28, 2  # of an arm's name beside a chart; the tooltip has all of it


@dataclass(frozen=True)
class Band:
    """A line with what lies around it: `y`, `low` and `high` at each `x`."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True)
class Point:
    """A mark with a vertical error bar (of length 0 where there is none)."""

    label: str
    x: float
    y: float
    error: float


def _svg(height: float, title: str, desc: str, body: Sequence[str]) -> str:
    key = "c" + hashlib.sha256((title + desc).encode()).hexdigest()[:8]
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-labelledby="{key}t {key}d">'
        f'<title id="{key}t">{escape(title)}</title><desc id="{key}d">{escape(desc)}</desc>'
        + "".join(body)
        + "</svg>"
    )


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def _name(x: float, y: float, name: str, kind: str = "", anchor: str = "start", lines: int = 1) -> str:
    """A name around the height `y`, in at most so many lines; what is cut stands in a tooltip."""
    folded = textwrap.wrap(name, NAME_WIDTH, max_lines=lines, placeholder="…", break_on_hyphens=False)
    start = y + 4 - 7 * (len(folded) - 1)
    spans = " ".join(
        f'<tspan x="{x:.1f}" y="{start + 14 * i:.1f}">{escape(line)}</tspan>' for i, line in enumerate(folded)
    )
    whole = f"<title>{escape(name)}</title>" if folded and folded[-1].endswith("…") else ""
    return f'<text class="{kind}" text-anchor="{anchor}">{spans}{whole}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _mark(x: float, y: float, index: int, tip: str, size: float = 4.5) -> str:
    """A mark whose shape and colour say which arm it is of."""
    kind, s = f'class="mark c{index % COLOURS}"', size
    shape = SHAPES[index % len(SHAPES)]
    if shape == "circle":
        body = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{s}" {kind}>'
    else:
        corners = {
            "square": ((-s, -s), (s, -s), (s, s), (-s, s)),
            "diamond": ((0, -s * 1.3), (s * 1.3, 0), (0, s * 1.3), (-s * 1.3, 0)),
            "triangle": ((0, -s * 1.2), (s * 1.2, s), (-s * 1.2, s)),
        }[shape]
        points = " ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners)
        shape = "polygon"
        body = f'<polygon points="{points}" {kind}>'
    return f"{body}<title>{escape(tip)}</title></{shape}>"


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    raw = (high - low) / max(1, count)
    if raw <= 0 or not math.isfinite(raw):
        return [low]
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * (1 - 1e-9))
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The values' own range with a little air, never empty."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    air = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return low - air, high + air


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _x_axis(low: float, high: float, left: float, bottom: float, label: str, top: float = TOP) -> list[str]:
    x = _scale(low, high, left, WIDTH - RIGHT)
    parts = [_line(left, bottom, WIDTH - RIGHT, bottom, "axis")]
    for tick in ticks(low, high):
        parts += [_line(x(tick), top, x(tick), bottom, "grid")]
        parts += [_text(x(tick), bottom + 16, f"{tick:,.6g}", "small", "middle")]
    return [*parts, _text((left + WIDTH - RIGHT) / 2, bottom + 35, label, "small", "middle")]


def _y_axis(low: float, high: float, bottom: float, label: str) -> list[str]:
    y = _scale(low, high, bottom, TOP)
    parts = [_line(LEFT, TOP, LEFT, bottom, "axis"), _text(4, 10, label, "small")]
    for tick in ticks(low, high, 5):
        parts += [_line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid")]
        parts += [_text(LEFT - 6, y(tick) + 4, f"{tick:,.6g}", "small", "end")]
    return parts


def _legend(labels: Sequence[str], top: float, *, dashed: bool) -> tuple[list[str], float]:
    """Names of lines or marks in columns below a chart, and its height."""
    parts, columns, step = [], 3, 18 if all(len(label) <= NAME_WIDTH for label in labels) else 32
    for i, label in enumerate(labels):
        x, y = LEFT + (i % columns) * 215, top + (i // columns) * step
        if dashed:
            parts.append(
                f'<line x1="{x}" y1="{y}" x2="{x + 22}" y2="{y}" class="curve c{i % COLOURS}"'
                f' stroke-dasharray="{DASHES[i % len(DASHES)]}"/>'
            )
        else:
            parts.append(_mark(x + 11, y, i, label))
        parts.append(_name(x + 28, y, label, "small", lines=NAME_LINES))
    return parts, step * math.ceil(len(labels) / columns) + 8


def strips(title: str, desc: str, groups: Sequence[tuple[str, Sequence[float]]], axis: str) -> str:
    """One row an arm: a mark for each run, and a bar at the mean."""
    left, step = 220, 34
    low, high = _range([v for _, values in groups for v in values])
    x, bottom = _scale(low, high, left, WIDTH - RIGHT), TOP + step * len(groups)
    body = _x_axis(low, high, left, bottom, axis)
    for i, (label, values) in enumerate(groups):
        y = TOP + step * (i + 0.5)
        body.append(_name(left - 10, y, label, "", "end", NAME_LINES))
        for j, value in enumerate(values):
            shift = ((j * 7) % 5 - 2) * 3.0  # apart, where values are equal
            body.append(_mark(x(value), y + shift, i, f"{label}: {value:.6g}", 4))
        if values:
            mean = sum(values) / len(values)
            body.append(_line(x(mean), y - 13, x(mean), y + 13, "mean"))
    return _svg(bottom + BOTTOM, title, desc, body)


def forest(
    title: str, desc: str, rows: Sequence[tuple[str, float, float | None, float | None]], axis: str
) -> str:
    """Differences with their intervals, against a line at 0: (label, value, low, high)."""
    left, step = 220, 34
    low, high = _range([0.0, *(v for _, *values in rows for v in values if v is not None)])
    x, bottom = _scale(low, high, left, WIDTH - RIGHT), TOP + step * len(rows)
    body = [*_x_axis(low, high, left, bottom, axis), _line(x(0), TOP, x(0), bottom, "zero")]
    for i, (label, value, start, end) in enumerate(rows):
        y = TOP + step * (i + 0.5)
        body.append(_name(left - 10, y, label, "", "end", NAME_LINES))
        if start is not None and end is not None:
            body.append(_line(x(start), y, x(end), y, f"whisker c{(i + 1) % COLOURS}"))
        body.append(_mark(x(value), y, i + 1, f"{label}: {value:+.6g}"))
    return _svg(bottom + BOTTOM, title, desc, body)


def curves(title: str, desc: str, bands: Sequence[Band], x_label: str, y_label: str) -> str:
    """Lines with bands, over a common x."""
    bottom = 260
    x_low, x_high = _range([v for b in bands for v in b.x])
    y_low, y_high = _range([v for b in bands for part in (b.y, b.low, b.high) for v in part])
    x, y = _scale(x_low, x_high, LEFT, WIDTH - RIGHT), _scale(y_low, y_high, bottom, TOP)
    body = [*_y_axis(y_low, y_high, bottom, y_label), *_x_axis(x_low, x_high, LEFT, bottom, x_label)]
    for i, band in enumerate(bands):
        around = [*zip(band.x, band.high, strict=True), *reversed([*zip(band.x, band.low, strict=True)])]
        if any(a != b for a, b in zip(band.low, band.high, strict=True)):
            points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in around)
            body.append(f'<polygon points="{points}" class="band c{i % COLOURS}"/>')
        line = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(band.x, band.y, strict=True))
        dash = f'stroke-dasharray="{DASHES[i % len(DASHES)]}"'
        body.append(
            f'<polyline points="{line}" class="curve c{i % COLOURS}" {dash}>'
            f"<title>{escape(band.label)}</title></polyline>"
        )
        if len(band.x) == 1:
            body.append(_mark(x(band.x[0]), y(band.y[0]), i, band.label, 3))
    several = [b.label for b in bands] if len(bands) > 1 else []
    legend, height = _legend(several, bottom + BOTTOM + 8, dashed=True)
    return _svg(bottom + BOTTOM + height, title, desc, [*body, *legend])


def scatter(title: str, desc: str, points: Sequence[Point], x_label: str, y_label: str) -> str:
    """Marks with error bars: what is paid (x) against what is got (y)."""
    bottom = 260
    x_low, x_high = _range([0.0, *(p.x for p in points)])
    y_low, y_high = _range([v for p in points for v in (p.y - p.error, p.y + p.error)])
    x, y = _scale(x_low, x_high, LEFT, WIDTH - RIGHT), _scale(y_low, y_high, bottom, TOP)
    body = [*_y_axis(y_low, y_high, bottom, y_label), *_x_axis(x_low, x_high, LEFT, bottom, x_label)]
    for i, p in enumerate(points):
        body.append(_line(x(p.x), y(p.y - p.error), x(p.x), y(p.y + p.error), f"whisker c{i % COLOURS}"))
        body.append(_mark(x(p.x), y(p.y), i, f"{p.label}: {p.y:.6g} at {p.x:.6g}", 6))
    legend, height = _legend([p.label for p in points], bottom + BOTTOM + 8, dashed=False)
    return _svg(bottom + BOTTOM + height, title, desc, [*body, *legend])


def bars(title: str, desc: str, rows: Sequence[tuple[str, float]], axis: str) -> str:
    """Horizontal bars from 0."""
    left, step = 220, 24
    low, high = _range([0.0, *(v for _, v in rows)])
    low = min(low, 0.0) if min((v for _, v in rows), default=0) < 0 else 0.0
    x, bottom = _scale(low, high, left, WIDTH - RIGHT), TOP + step * len(rows)
    body = _x_axis(low, high, left, bottom, axis)
    for i, (label, value) in enumerate(rows):
        y, start = TOP + step * i, min(x(0), x(value))
        body.append(
            f'<rect x="{start:.1f}" y="{y + 4:.1f}" width="{abs(x(value) - x(0)):.1f}" height="{step - 8}"'
            f' class="mark c2"><title>{escape(label)}: {value:.6g}</title></rect>'
        )
        body.append(_name(left - 10, y + step / 2, label, "", "end"))
    return _svg(bottom + BOTTOM, title, desc, body)


def matrix(title: str, desc: str, labels: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """A confusion matrix: rows are what is true, columns what was said, shaded by the share of the row."""
    left, top = 200, 96
    cell = min(56.0, (WIDTH - left - RIGHT) / max(1, len(labels)))
    body = []
    for i, row in enumerate(counts):
        y = top + i * cell
        body.append(_name(left - 8, y + cell / 2, labels[i], "small", "end"))
        body.append(
            f'<g transform="translate({left + (i + 0.6) * cell:.1f} {top - 6}) rotate(-40)">'
            f"{_name(0, -4, labels[i], 'small')}</g>"
        )
        for j, count in enumerate(row):
            share = count / max(1, sum(row))
            tip = escape(f"{labels[i]} said to be {labels[j]}: {count}")
            body.append(
                f'<rect x="{left + j * cell:.1f}" y="{y:.1f}" width="{cell - 1:.1f}" height="{cell - 1:.1f}"'
                f' class="cell" style="fill-opacity:{0.04 + 0.9 * share:.2f}"><title>{tip}</title></rect>'
            )
            kind = "small on" if share > 0.55 else "small"
            body.append(_text(left + (j + 0.5) * cell, y + cell / 2 + 4, str(count), kind, "middle"))
    return _svg(top + cell * len(labels) + 10, title, desc, body)
