"""A page from its parts. Parts contain plain text; all escaping happens in this module."""

from __future__ import annotations

import base64
import html
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from .css import CSS

__all__ = ["Cell", "Code", "Details", "Figure", "Notes", "Part", "Section", "Table", "page"]

POINTS_PER_INCH = 100  # of the page, for an inch of a figure: 10 pt letters are as high as the text's
FIGURE_DPI = 130


@dataclass(frozen=True)
class Figure:
    """A PNG with a caption.

    Args:
        path: the file.
        caption: an explanation of the figure.
        alt: the alternative text; the caption if empty.
    """

    path: Path
    caption: str
    alt: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Args:
        text: the content.
        best: whether it is marked and printed in bold.
        aside: a remark in small letters after it.
        rows: the number of rows that it spans.
        code: whether it is set in the font of code.
    """

    text: str
    best: bool = False
    aside: str = ""
    rows: int = 1
    code: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        head: the names of columns.
        rows: the first cell is the row's head; it is ignored if a cell above spans the row.
        caption: the caption.
        words: the number of columns, from the left, that contain words.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    caption: str = ""
    words: int = 1


@dataclass(frozen=True)
class Code:
    """Preformatted lines, such as commands."""

    text: str


@dataclass(frozen=True)
class Notes:
    """A list of notes.

    Args:
        items: pairs of a subject and a text.
        grave: whether the notes cast doubt on the results.
    """

    items: Sequence[tuple[str, str]]
    grave: bool = False


@dataclass(frozen=True)
class Details:
    """Parts in a collapsed block."""

    summary: str
    parts: Sequence[Part]


Part: TypeAlias = "str | Figure | Table | Code | Notes | Details"


@dataclass(frozen=True)
class Section:
    """A heading and the parts below it; a string is a paragraph."""

    title: str
    parts: Sequence[Part] = field(default_factory=list)


def text(value: str) -> str:
    """Escape text, and replace control characters and unpaired surrogates, which are not allowed in HTML."""
    clean = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]", "\N{REPLACEMENT CHARACTER}", value)
    return html.escape(clean.encode("utf-8", "replace").decode("utf-8"))


def _prose(value: str) -> str:
    """Escaped, with short names such as pgd-50-10 kept on one line."""
    return re.sub(
        r"[\w.@]+(?:-[\w.@]+)+",
        lambda name: f'<span class="name">{name[0]}</span>' if len(name[0]) < 25 else name[0],
        text(value),
    )


def page(title: str, lead: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]) -> str:
    """The whole HTML document.

    Args:
        title: the title.
        lead: the first paragraph.
        facts: pairs of a name and a value, for the header.
        sections: the sections in order.
    """
    listed = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in facts)
    links = "".join(f'<li><a href="#s{i}">{text(s.title)}</a></li>' for i, s in enumerate(sections))
    body = "\n".join(
        f'<section id="s{i}" aria-labelledby="h{i}">\n<h2 id="h{i}">{text(s.title)}</h2>\n'
        + "\n".join(_part(part) for part in s.parts)
        + "\n</section>"
        for i, s in enumerate(sections)
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{text(title)}</title>
<style>
{CSS}</style>
</head>
<body>
<header>
<h1>{text(title)}</h1>
<p class="lead">{_prose(lead)}</p>
<dl class="facts">{listed}</dl>
</header>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main>
{body}
</main>
</body>
</html>
"""


def _part(part: Part) -> str:
    if isinstance(part, str):
        return f"<p>{_prose(part)}</p>"
    if isinstance(part, Figure):
        return _figure(part)
    if isinstance(part, Table):
        return _table(part)
    if isinstance(part, Code):
        return f'<pre tabindex="0"><code>{text(part.text)}</code></pre>'
    if isinstance(part, Notes):
        items = "".join(f"<li><b>{text(who)}</b> {_prose(what)}</li>" for who, what in part.items)
        return f'<ul class="notes{" grave" if part.grave else ""}">{items}</ul>'
    inside = "\n".join(_part(p) for p in part.parts)
    return f"<details><summary>{text(part.summary)}</summary>\n{inside}\n</details>"


def _figure(figure: Figure) -> str:
    data = figure.path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])  # of the PNG's header
    shown = round(width * POINTS_PER_INCH / FIGURE_DPI), round(height * POINTS_PER_INCH / FIGURE_DPI)
    source = base64.b64encode(data).decode("ascii")
    return (
        f'<figure><div class="paper" tabindex="0" role="region" aria-label="Figure">'
        f'<img src="data:image/png;base64,{source}" width="{shown[0]}" height="{shown[1]}" '
        f'style="--width: {shown[0]}px" alt="{text(figure.alt or figure.caption)}"></div>'
        f"<figcaption>{_prose(figure.caption)}</figcaption></figure>"
    )


def _table(table: Table) -> str:
    kinds = ["word" if i < table.words else "number" for i in range(len(table.head))]
    head = "".join(
        f'<th scope="col" class="{kind}">{_prose(name)}</th>' for name, kind in zip(table.head, kinds, strict=True)
    )
    rows, covered = [], 0
    for row in table.rows:
        cells = [cell if isinstance(cell, Cell) else Cell(cell) for cell in row]
        first = 0 if covered == 0 else 1  # the row's head stands in a row above
        shown = "".join(
            _cell(cell, kind, head=first + i == 0)
            for i, (cell, kind) in enumerate(zip(cells[first:], kinds[first:], strict=True))
        )
        rows.append(f"<tr{'' if first else ' class=first'}>{shown}</tr>")
        covered = max(0, (covered or cells[0].rows) - 1)
    region = f'class="scroll" tabindex="0" role="region" aria-label="Table: {text(table.head[0])}"'
    caption = f"<figcaption>{_prose(table.caption)}</figcaption>" if table.caption else ""
    return (
        f'<figure class="table"><div {region}>'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{caption}</figure>"
    )


def _cell(cell: Cell, kind: str, head: bool) -> str:
    shown = f"<code>{text(cell.text)}</code>" if cell.code else text(cell.text)
    if cell.best:
        shown = f'<strong><span class="mark" title="highest">▲</span>{shown}</strong>'
    if cell.aside:
        shown += f" <small>{text(cell.aside)}</small>"
    shown = (
        re.sub(r" ± [\d.]+", lambda spread: f'<span class="spread">{spread[0]}</span>', shown) if not head else shown
    )
    span = f' rowspan="{cell.rows}"' if cell.rows > 1 else ""
    return f'<th scope="row" class="{kind}"{span}>{shown}</th>' if head else f'<td class="{kind}">{shown}</td>'
