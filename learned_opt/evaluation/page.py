"""One HTML page with nothing outside itself: its style, its pictures, tables that fit a phone, and print."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from learned_opt.evaluation.style import to_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light; --ink: #222; --faint: #6b6b6b; --line: #dcdcdc; --learned: #fdf1e9; --width: 72rem; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem 1rem 4rem; max-width: var(--width); color: var(--ink); background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 1rem 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .5rem; padding-top: .6rem; border-top: 2px solid var(--ink); }
h3 { font-size: 1.02rem; margin: 1.6rem 0 .3rem; overflow-wrap: anywhere; }
p, ul { max-width: 44rem; margin: .5rem 0; }
p.faint, figcaption, .note { color: var(--faint); font-size: .86rem; }
.note { border-left: 3px solid #e69f00; padding-left: .6rem; max-width: 44rem; }
p.headline { font-size: 1.1rem; }
nav { font-size: .9rem; margin: .8rem 0; }
nav a { margin-right: 1rem; color: #0072b2; display: inline-block; max-width: 100%; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .26rem .45rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--faint); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
tr.learned td { background: var(--learned); font-weight: 600; }
td small { color: var(--faint); font-weight: 400; }
figure { margin: .4rem 0; break-inside: avoid; }
figure img { width: 100%; height: auto; display: block; }
figcaption { margin-bottom: .2rem; }
.pictures { display: grid; gap: .6rem 1.4rem; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); }
.wide { display: grid; gap: .6rem 1.6rem; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); }
.family { break-inside: avoid; border-bottom: 1px solid var(--line); padding-bottom: 1rem; }
.family .both { display: grid; gap: .4rem 1.4rem; align-items: center;
  grid-template-columns: minmax(0, 26rem) minmax(0, 1fr); }
ul.key { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; max-width: none; }
ul.key li { font-size: .86rem; max-width: 100%; }
ul.key svg { vertical-align: middle; margin-right: .35rem; }
pre { font-size: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .6rem; }
@media (max-width: 52rem) { .family .both { grid-template-columns: minmax(0, 1fr); } body { padding: .6rem .8rem 3rem; }
  th, td { padding: .3rem .4rem; } h1 { font-size: 1.4rem; } th:first-child, td:first-child { max-width: 7.5rem;
  white-space: normal; overflow-wrap: break-word; } }
@media screen and (min-width: 52rem) { td wbr { display: none; } }
@media print { @page { size: A4; margin: 14mm; } body { font-size: 10pt; padding: 0; max-width: none; }
  nav { display: none; } .scroll { overflow: visible; } h2 { break-after: avoid; } h3 { break-after: avoid; }
  table { font-size: 6.6pt; break-inside: avoid; } th, td { padding: .12rem .22rem; white-space: normal; }
  .pictures { grid-template-columns: repeat(3, 1fr); } .wide { grid-template-columns: repeat(2, 1fr); }
  .family .both { grid-template-columns: 6.2cm minmax(0, 1fr); }
  td, tr.learned td { -webkit-print-color-adjust: exact; print-color-adjust: exact; } }
"""


def text(value: object) -> str:
    """Any value as text that HTML shows as it is."""
    return html.escape(str(value))


def name(value: object) -> str:
    """A label as text that may break after an underscore."""
    return text(value).replace("_", "_<wbr>")


def paragraph(words: str, kind: str = "") -> str:
    """A paragraph of plain words."""
    return f"<p{_class(kind)}>{text(words)}</p>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], marked: Iterable[bool] = ()) -> str:
    """A table that scrolls sideways where it does not fit, its first column staying.

    Args:
        header: of the columns.
        rows: cells, as HTML; see `text` and `cell`.
        marked: whether each row is a learned optimizer's.
    """
    marks = list(marked)
    head = "".join(f"<th>{name(title)}</th>" for title in header)
    body = "".join(
        f"<tr{_class('learned' if k < len(marks) and marks[k] else '')}>"
        + "".join(one if one.startswith("<td") else f"<td>{one}</td>" for one in row)
        + "</tr>"
        for k, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def cell(words: str) -> str:
    """A cell's text, with an interval in brackets set smaller and on a line of its own if it must be."""
    value, bracket, interval = words.partition(" [")
    return f"{text(value)} <small>[{text(interval)}</small>" if bracket else name(words)


def coloured(words: str, colour: str) -> str:
    """A cell on a colour of its own."""
    return f'<td style="background:{colour}">{text(words)}</td>'


def picture(figure: Figure, caption: str, *, alternative: str = "") -> str:
    """A figure with a caption above it, its SVG within the page."""
    data = base64.b64encode(to_svg(figure).encode()).decode()
    words = text(alternative or caption)
    head = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return f'<figure>{head}<img alt="{words}" src="data:image/svg+xml;base64,{data}"></figure>'


def block(kind: str, parts: Iterable[str]) -> str:
    """Parts within one box."""
    return f"<div{_class(kind)}>{''.join(parts)}</div>"


def section(identity: str, title: str, parts: Iterable[str]) -> str:
    """A part of the page with a heading that can be linked to."""
    return f'<section><h2 id="{text(identity)}">{text(title)}</h2>{"".join(parts)}</section>'


def page(title: str, parts: Iterable[str]) -> str:
    """The whole document."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _class(kind: str) -> str:
    return f' class="{text(kind)}"' if kind else ""
