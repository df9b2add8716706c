"""HTML as values: elements that escape what they are given, tables, inline pictures, and the frame of a page.

Text from files is escaped by default; only ``Html`` passes as it is, and only this module makes it. The page needs no
script and no other file: style sheet inline, pictures as data URIs or inline SVG.
"""

import base64
import html
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# Name of a colour: on a light page, on a dark page. The series are close to Okabe and Ito's, safe for the colour-blind.
THEME = {
    "ink": ("#1c2128", "#e4e8ec"),
    "soft": ("#59636e", "#9aa5b1"),
    "line": ("#d9dee4", "#323a44"),
    "ground": ("#ffffff", "#14181d"),
    "panel": ("#f5f7f9", "#1c2229"),
    "link": ("#0060a8", "#6cb6f5"),
    "warn-ground": ("#fff4d6", "#3a2f10"),
    "warn-line": ("#e0b33c", "#8a6d1f"),
    "warn-ink": ("#5a4300", "#f3dfa6"),
    "series-1": ("#0072b2", "#4aa8e0"),
    "series-2": ("#d55e00", "#f08a4b"),
    "series-3": ("#00845f", "#35c29a"),
    "series-4": ("#b0568c", "#e08fc0"),
    "series-5": ("#b58900", "#dcb648"),
    "series-6": ("#4b3b8f", "#9d8fe0"),
    "series-7": ("#3a9bd1", "#86c9f0"),
    "series-8": ("#6b4423", "#b98b66"),
    "neutral": ("#7c8792", "#8b96a2"),
}
VOID_ELEMENTS = frozenset({"br", "col", "hr", "img", "link", "meta"})
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

_NUMBER = re.compile(r"[-+±]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?( ?%)?( (\[.*\]|\(.*\)|± \d[\d.]*))?")
_NO_VALUE = frozenset({"", "n/a", "–"})


class Html(str):
    """Text that is markup already and is not escaped again."""

    __slots__ = ()


class Section(NamedTuple):
    """One part of the page.

    Attributes:
        anchor: its ``id``, for links within the page.
        title: its heading.
        body: its content; None when its files are not there.
        missing: the one line that says so.
    """

    anchor: str
    title: str
    body: Html | None
    missing: str = ""


def element(name: str, /, *children: object, **attributes: object) -> Html:
    """``<name attributes>children</name>``; children other than ``Html`` are escaped, attributes always are.

    An attribute name loses a last underscore (``class_``), other underscores become hyphens; an attribute whose value
    is None or False is left out.
    """
    parts = [name]
    for key, value in attributes.items():
        if value is not None and value is not False:
            parts.append(f'{key.rstrip("_").replace("_", "-")}="{html.escape(str(value), quote=True)}"')
    opening = f"<{' '.join(parts)}>"
    return Html(opening if name in VOID_ELEMENTS else f"{opening}{join(children)}</{name}>")


def join(children: Iterable[object], separator: str = "") -> Html:
    """The children one after another, those that are not ``Html`` escaped; None is left out."""
    texts = [child if isinstance(child, Html) else html.escape(str(child)) for child in children if child is not None]
    return Html(separator.join(texts))


def table(
    header: Sequence[object], rows: Iterable[Sequence[object]], *, caption: object = None, tall: bool = False
) -> Html:
    """A table; columns that hold nothing but numbers are set to the right.

    Args:
        header: one cell per column.
        rows: cells in the order of ``header``.
        caption: what the table shows.
        tall: put into a box that scrolls, for tables of many rows.
    """
    rows = [list(row) for row in rows]
    numeric = [_is_numeric([row[column] for row in rows]) for column in range(len(header))]
    classes = ["number" if is_number else None for is_number in numeric]
    head = element(
        "tr", *(element("th", cell, class_=cls, scope="col") for cell, cls in zip(header, classes, strict=True))
    )
    body = [
        element("tr", *(element("td", cell, class_=cls) for cell, cls in zip(row, classes, strict=True)))
        for row in rows
    ]
    content = element(
        "table", element("caption", caption) if caption else None, element("thead", head), element("tbody", *body)
    )
    return element("div", content, class_="scroll tall" if tall else "scroll")


def picture(png: bytes, *, alt: str, width: int | None = None) -> Html:
    """A PNG inside the page.

    Raises:
        ValueError: the bytes are not those of a PNG.
    """
    if not png.startswith(PNG_SIGNATURE):
        raise ValueError(f"picture {alt!r}: found {png[:8]!r} at its start; expected a PNG file")
    source = f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
    return element("img", src=source, alt=alt, width=width)


def drawing(svg: str, *, alt: str, scale: float = 1.0) -> Html:
    """A figure drawn by matplotlib, inline, in the colours of ``THEME`` and the typeface of the page.

    Args:
        svg: an SVG document whose text is text (``svg.fonttype: none``).
        alt: what it shows, for those who cannot see it.
        scale: 1 for the size on paper.
    """
    drawn = svg[svg.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    size = re.search(r'viewBox="0 0 ([\d.]+) ', drawn)
    assert size is not None, "matplotlib gives every SVG a viewBox"
    # The viewBox is in points; at 4/3 pixels per point a 10-point label is as large as on paper.
    opening = element(
        "svg", viewBox=drawn.split('viewBox="', 1)[1].split('"', 1)[0], role="img", aria_label=alt,
        style=f"width: {float(size[1]) * scale * 4 / 3:.0f}px",
    ).removesuffix("</svg>")  # fmt: skip
    drawn = opening + drawn[drawn.index(">") + 1 :].rstrip()
    for name, (light, _) in THEME.items():
        drawn = re.sub(light, f"var(--{name})", drawn, flags=re.IGNORECASE)
    # matplotlib names its groups; nothing refers to them, and a page may hold many figures.
    return Html(re.sub(r'<g id="[^"]*"', "<g", drawn))


def figure(content: Html, caption: object, *, class_: str = "") -> Html:
    """A picture or drawing with its caption."""
    return element("figure", content, element("figcaption", caption), class_=class_ or None)


def tiles(pairs: Iterable[tuple[object, object]]) -> Html:
    """A row of large numbers, each above the words that say what it counts."""
    return element(
        "dl",
        *(element("div", element("dt", label), element("dd", value)) for value, label in pairs),
        class_="tiles",
    )


def details(summary: object, *content: object) -> Html:
    """Content that opens on a click."""
    return element("details", element("summary", summary), *content)


def page(title: str, header: Html, sections: Sequence[Section]) -> str:
    """The whole document."""
    links = [element("a", section.title, href=f"#{section.anchor}") for section in sections if section.body is not None]
    body = element(
        "body",
        header,
        element("nav", *links, aria_label="Sections"),
        element("main", *(_section(section) for section in sections)),
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        Html(f"<style>{_theme()}{STYLE}</style>"),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _section(section: Section) -> Html:
    if section.body is None:
        return element(
            "section", element("h2", section.title), element("p", section.missing), id=section.anchor, class_="missing"
        )
    return element("section", element("h2", section.title), section.body, id=section.anchor)


def _theme() -> str:
    light, dark = ("".join(f"--{name}: {pair[mode]}; " for name, pair in THEME.items()) for mode in (0, 1))
    return f"\n:root {{ {light}}}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}"


def _is_numeric(cells: Sequence[object]) -> bool:
    texts = [text for cell in cells if (text := re.sub(r"<[^>]*>", "", str(cell)).strip()) not in _NO_VALUE]
    return bool(texts) and all(_NUMBER.fullmatch(text.replace("−", "-")) for text in texts)


STYLE = """
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 3.5rem; }
body {
  margin: 0; color: var(--ink); background: var(--ground); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
body > header, main { max-width: 1100px; margin: 0 auto; padding: 0 1.5rem; }
body > header { padding-top: 2.5rem; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 .25rem; }
h2 { font-size: 1.35rem; letter-spacing: -.01em; margin: 0 0 .6rem; }
h3 { font-size: 1.02rem; margin: 2rem 0 .5rem; }
p { margin: 0 0 .9rem; max-width: 72ch; }
a { color: var(--link); text-decoration-thickness: 1px; text-underline-offset: 2px; }
code, pre { font: .86em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
pre {
  background: var(--panel); border-radius: 8px; padding: .9rem 1.1rem; white-space: pre-wrap; overflow-wrap: anywhere;
  margin: 0 0 1rem; }
.lead { color: var(--soft); }
.banner {
  background: var(--warn-ground); color: var(--warn-ink); border: 1px solid var(--warn-line); border-radius: 8px;
  padding: .7rem 1.1rem; margin: 1.2rem 0; max-width: none;
}
nav {
  margin: 0 auto; position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap;
  gap: .2rem 1.4rem; padding: .7rem 0;
  width: calc(100% - 3rem); max-width: calc(1100px - 3rem);
  background: var(--ground); border-bottom: 1px solid var(--line); font-size: .92rem;
}
nav a { text-decoration: none; color: var(--soft); }
nav a:hover { color: var(--link); }
section { padding: 2.2rem 0; border-bottom: 1px solid var(--line); }
section:last-child { border-bottom: 0; }
section.missing { padding: 1.1rem 0; color: var(--soft); }
section.missing h2 { font-size: 1.02rem; margin: 0; }
section.missing p { margin: 0; }
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: .8rem; margin: 1.2rem 0 1.6rem;
}
.tiles div {
  display: flex; flex-direction: column-reverse; justify-content: flex-end; padding: .8rem 1rem;
  background: var(--panel); border-radius: 8px;
}
.tiles dd { margin: 0; font-size: 1.5rem; font-weight: 600; line-height: 1.25; letter-spacing: -.01em;
  font-variant-numeric: tabular-nums; }
.tiles dt { color: var(--soft); font-size: .86rem; line-height: 1.35; }
.scroll { overflow-x: auto; margin: 0 0 1.2rem; }
.tall { max-height: 26rem; overflow-y: auto; border-bottom: 1px solid var(--line); }
.tall thead th { position: sticky; top: 0; background: var(--ground); }
table { border-collapse: collapse; font-size: .91rem; font-variant-numeric: tabular-nums; min-width: 24rem; }
caption { text-align: left; color: var(--soft); padding-bottom: .4rem; font-size: .92rem; }
th, td { text-align: left; padding: .36rem 1.4rem .36rem 0; vertical-align: top; }
th { font-weight: 600; border-bottom: 1.5px solid var(--ink); white-space: nowrap; }
td { border-bottom: 1px solid var(--line); overflow-wrap: break-word; }
tbody tr:last-child td { border-bottom: 0; }
td a, td span, td code { white-space: nowrap; }
.number { text-align: right; white-space: nowrap; }
figure { margin: 1.2rem 0 1.6rem; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .55rem; max-width: 80ch; }
figure svg, figure img { display: block; max-width: 100%; height: auto; }
figure img { border-radius: 6px; }
.print svg { max-width: none; }
.halves { display: flex; flex-wrap: wrap; gap: 0 4rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 1.2rem; }
.gallery figure { margin: 0; }
.gallery img { width: 100%; }
.gallery.wide { grid-template-columns: 1fr; }
.gallery.wide img { width: auto; }
figure svg text { font-family: inherit !important; }
.maps { display: grid; gap: .5rem .6rem; align-items: center; margin: 1.2rem 0 .4rem; min-width: 46rem; }
.maps img { display: block; width: 100%; height: auto; border-radius: 6px; }
.maps .column { text-align: center; color: var(--soft); line-height: 1.3; align-self: end; }
.maps .row { font-weight: 600; line-height: 1.3; overflow-wrap: anywhere; }
.maps .row small { display: block; font-weight: 400; color: var(--soft); }
.sources { color: var(--soft); font-size: .86rem; max-width: none; }
details { margin: 0 0 1rem; }
summary { cursor: pointer; color: var(--link); margin-bottom: .6rem; }
@media print { nav { display: none; } section { break-inside: avoid-page; } .tall { max-height: none; } }
"""
