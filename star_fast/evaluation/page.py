"""One self-contained HTML page: sections of text, tables and pictures. Inline CSS, pictures as base64, no script,
nothing loaded from elsewhere.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape as escape_html

from star_fast.errors import printable

# What no page should hold: control characters, marks that turn the reading direction, halves of characters (bytes of a
# file name that are no text).
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

_CSS = """
:root { color-scheme: light dark; --ink: #1d2127; --soft: #5b6470; --rule: #e2e6ec; --ground: #fbfbfa; --card: #fff;
  --accent: #2563eb; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ec; --soft: #9aa4b2; --rule: #2c333d; --ground: #14171c; --card: #1b1f26; --accent: #7aa8ff; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
h1, h2, h3, nav, figcaption, caption, .names thead th, .values td { overflow-wrap: anywhere; }
h1 { font-size: clamp(1.6rem, 5vw, 2.3rem); line-height: 1.2; letter-spacing: -.02em; margin: 0 0 .4rem; }
h2 { font-size: 1.3rem; letter-spacing: -.01em; margin: 3.2rem 0 .6rem; padding-top: 1.1rem;
  border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { margin: .4rem 0 .9rem; max-width: 46rem; overflow-wrap: anywhere; }
.lead { color: var(--soft); font-size: 1.05rem; }
nav { margin: 1.2rem 0 0; font-size: .9rem; display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem; margin: 1.6rem 0 0;
  padding: 0; }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: .7rem; padding: .8rem .95rem; }
.tile { display: flex; flex-direction: column-reverse; justify-content: flex-end; }
.tile dt { color: var(--soft); font-size: .82rem; line-height: 1.35; }
.tile dd { margin: 0; font-size: 1.5rem; font-weight: 650; letter-spacing: -.02em; font-variant-numeric: tabular-nums; }
figure { margin: 0; min-width: 0; }
figure img { display: block; max-width: 100%; height: auto; }
figure img.pixels { image-rendering: pixelated; width: 100%; }
figure img.wide { width: 100%; }
figcaption { color: var(--soft); font-size: .86rem; line-height: 1.45; margin-top: .35rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); gap: 1.4rem;
  margin: 1rem 0; }
.plots img { width: 100%; }
.pairs { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: .6rem 1.6rem;
  margin-bottom: .6rem; }
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: .9rem;
  margin: .8rem 0 1.2rem; }
.maps img { width: 100%; border-radius: .3rem; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); font-size: .86rem; padding-bottom: .3rem; }
th, td { text-align: left; padding: .32rem 1.2rem .32rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--soft); font-weight: 500; vertical-align: bottom; }
tbody th { font-weight: 500; }
.note { background: var(--card); border: 1px solid var(--rule); border-left: 3px solid var(--accent);
  border-radius: .4rem; padding: .6rem .9rem; }
details { margin: .8rem 0; }
summary { cursor: pointer; color: var(--accent); }
footer { margin-top: 4rem; color: var(--soft); font-size: .84rem; overflow-wrap: anywhere; }
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #444; --rule: #ccc; --ground: #fff; --card: #fff; }
  body { font-size: 10.5pt; } main { max-width: none; padding: 0; } nav { display: none; }
  h2, h3, summary { break-after: avoid; } figure, tr, .tile, .note { break-inside: avoid; }
  .scroll { overflow: visible; } .maps { grid-template-columns: repeat(5, 1fr);
    } .pairs, .plots { grid-template-columns: 1fr 1fr; }
}
@media (max-width: 34rem) { th, td { padding-right: .75rem; } }
"""


@dataclass
class Section:
    """A titled part of the page; `body` collects finished HTML."""

    anchor: str  # what a link to it ends in
    title: str
    body: list[str] = field(default_factory=list)

    def add(self, *html: str) -> None:
        """Append finished HTML."""
        self.body += html


def escape(content: str) -> str:
    """Text for the page, in an element or an attribute: nothing in it is taken for markup, and what cannot be seen is
    written as a backslash escape.
    """
    return escape_html(_CONTROLS.sub(lambda found: printable(found[0]), content), quote=True)


def to_bytes(html: str) -> bytes:
    """The page as it is stored."""
    return html.encode(errors="backslashreplace")


def text(content: str, css_class: str = "") -> str:
    """A paragraph of plain text."""
    return f"<p{_class(css_class)}>{escape(content)}</p>"


def heading(content: str) -> str:
    """A heading within a section."""
    return f"<h3>{escape(content)}</h3>"


def figure(png: bytes, alt: str, caption: str = "", *, dark: bytes | None = None, css_class: str = "") -> str:
    """A picture with its description for those who cannot see it and a caption that says how it was made; `dark` is
    shown on dark pages.
    """
    if not alt:
        raise ValueError("figure: every picture needs an alt text")
    image = f'<img{_class(css_class)} src="{_data_url(png)}" alt="{escape(alt)}">'
    if dark is not None:
        image = f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_data_url(dark)}">{image}</picture>'
    return f"<figure>{image}{f'<figcaption>{escape(caption)}</figcaption>' if caption else ''}</figure>"


def group(css_class: str, parts: Sequence[str]) -> str:
    """Parts laid out together: css_class "plots", "pairs" or "maps"."""
    return f'<div class="{css_class}">{"".join(parts)}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "", css_class: str = "") -> str:
    """A table; the first cell of a row is its heading. css_class "names": heads of columns may be long and break
    anywhere; "values": so may cells.

    One that is too wide for a narrow screen all the same scrolls sideways.
    """
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    top = (
        f"<thead><tr>{''.join(f'<th scope=col>{escape(name)}</th>' for name in head)}</tr></thead>" if any(head) else ""
    )
    lines = "".join(
        "<tr><th "
        f"scope=row>{escape(str(row[0]))}</th>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row[1:])}</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table{_class(css_class)}>{title}{top}<tbody>{lines}</tbody></table></div>'


def folded(summary: str, *html: str) -> str:
    """Content behind a line that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>{''.join(html)}</details>"


def render(title: str, lead: str, tiles: Mapping[str, str], sections: Sequence[Section], footer: str) -> str:
    """The whole page: headline figures {what: value} first, then the sections."""
    links = "".join(f'<a href="#{section.anchor}">{escape(section.title)}</a>' for section in sections)
    cards = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>' for name, value in tiles.items()
    )
    parts = "".join(
        f'<section id="{section.anchor}"><h2>{escape(section.title)}</h2>{"".join(section.body)}</section>'
        for section in sections
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head><body><main><header>"
        f"<h1>{escape(title)}</h1>{text(lead, 'lead')}"
        f'<dl class="tiles">{cards}</dl><nav '
        f'aria-label="Sections">{links}</nav></header>{parts}<footer>{escape(footer)}</footer></main></body></html>\n'
    )


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
