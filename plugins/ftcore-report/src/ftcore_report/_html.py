"""One self-contained page: light and dark, readable without a script, a mouse or a network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

__all__ = ["chart", "facts", "page", "paragraphs", "section", "table"]

# Eight steps of viridis: its dark part on white, its light part on black.
LIGHT = ("#440154", "#21918c", "#3b528b", "#5a8f00", "#7a4fa3", "#1f6f8b", "#8c6d00", "#2c728e")
DARK = ("#fde725", "#35b779", "#90d743", "#7ad0f0", "#d8a9ff", "#21c5b5", "#ffb86b", "#b5de2b")

POLICY = "default-src 'none'; style-src 'unsafe-inline'"

STYLE = """
:root{color-scheme:light dark;--back:#fff;--text:#1b1b1f;--soft:#5b5b66;--line:#d9d9e0;--on:#fff;%s}
@media (prefers-color-scheme:dark){:root{
--back:#15151a;--text:#ececf1;--soft:#a5a5b2;--line:#3a3a45;--on:#111;%s}}
body{background:var(--back);color:var(--text);font:16px/1.5 system-ui,sans-serif}
main{max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2.5rem}h3{font-size:1rem;margin-bottom:.3rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--soft);padding:.3rem 0}
th,td{padding:.25rem .7rem .25rem 0;text-align:right;border-bottom:1px solid var(--line);vertical-align:top}
th:first-child,td:first-child,td.text,th.text{text-align:left}td.text{overflow-wrap:anywhere;white-space:pre-wrap}
th.text{min-width:12rem}
svg{width:100%%;height:auto;max-width:60rem}svg text{font:13px system-ui,sans-serif;fill:var(--text)}
svg text.small{font-size:12px;fill:var(--soft)}svg text.on{fill:var(--on)}
.axis{stroke:var(--soft)}.grid{stroke:var(--line);stroke-width:.6}
.zero{stroke:var(--text);stroke-dasharray:4 3}
.mean{stroke:var(--text);stroke-width:3}.curve{fill:none;stroke-width:2.2}.whisker{stroke-width:2.2}
.cell{fill:var(--k1)}
.mark{fill-opacity:.85}.band{fill-opacity:.16}
summary{cursor:pointer;color:var(--soft)}details{margin:.3rem 0 1rem}
.note{color:var(--soft);margin:.2rem 0}code{overflow-wrap:anywhere}
"""


def page(title: str, body: Sequence[str]) -> str:
    """The whole document."""
    light, dark = ("".join(f"--k{i}:{c};" for i, c in enumerate(colours)) for colours in (LIGHT, DARK))
    classes = "".join(
        f".mark.c{i},.band.c{i}{{fill:var(--k{i})}}.curve.c{i},.whisker.c{i}{{stroke:var(--k{i})}}"
        for i, _ in enumerate(LIGHT)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        # Nothing may be fetched, and nothing may run, whatever stands in the data.
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{escape(title)}</title><style>{STYLE % (light, dark)}{classes}</style></head>"
        f"<body><main><h1>{escape(title)}</h1>{''.join(body)}</main></body></html>\n"
    )


def section(title: str, body: Sequence[str]) -> str:
    """A heading and what is under it; nothing where there is nothing."""
    inner = "".join(body)
    return f"<section><h2>{escape(title)}</h2>{inner}</section>" if inner else ""


def chart(title: str, svg: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A chart with its figures as a table under it."""
    figures = table(columns, rows, "")
    return f"<h3>{escape(title)}</h3>{svg}<details><summary>The figures</summary>{figures}</details>"


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str, text: Sequence[str] = ()
) -> str:
    """A table; columns named in `text` are set as text, as is the first."""
    kinds = [' class="text"' if name in text else "" for name in columns]
    head = "".join(f'<th scope="col"{k}>{escape(n)}</th>' for n, k in zip(columns, kinds, strict=True))
    lines = "".join(
        "<tr>" + "".join(f"<td{k}>{escape(c)}</td>" for c, k in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    name = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table>{name}<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and values, a line each."""
    lines = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="text">{escape(value)}</td></tr>'
        for name, value in pairs
    )
    return f'<div class="scroll"><table><tbody>{lines}</tbody></table></div>'


def paragraphs(lines: Sequence[str]) -> str:
    """Notes, one below the other."""
    return "".join(f'<p class="note">{escape(line)}</p>' for line in lines)
