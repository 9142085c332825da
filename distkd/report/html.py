"""HTML as text: everything that comes from files is escaped, only what these functions made is not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["Safe", "details", "join", "name_cell", "table", "tag"]


class Safe(str):
    """Text that is HTML already."""

    __slots__ = ()


def _text(child: str) -> str:
    return child if isinstance(child, Safe) else escape(child)


def tag(name: str, *children: str, **attributes: str) -> Safe:
    """An element; `class_` stands for class."""
    written = "".join(f' {key.rstrip("_")}="{escape(value)}"' for key, value in attributes.items())
    return Safe(f"<{name}{written}>{''.join(map(_text, children))}</{name}>")


def join(children: Iterable[str], separator: str = "\n") -> Safe:
    return Safe(_text(separator).join(map(_text, children)))


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "", class_: str = "") -> Safe:
    """A table that scrolls sideways on a narrow screen; the first column names the row."""
    head = tag("tr", *(tag("th", cell, scope="col") for cell in header))
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    inner = tag("table", tag("thead", head), tag("tbody", *body), class_=class_)
    # a paragraph, not a caption: it must wrap at the width of the screen, not at that of the table
    title = [tag("p", caption, class_="caption")] if caption else []
    return join([*title, tag("div", inner, class_="scroll")])


def details(summary: str, *children: str) -> Safe:
    """A part that opens on click."""
    return tag("details", tag("summary", summary), *children)


def name_cell(name: str) -> Safe:
    """A name with underscores that may break after each."""
    return Safe(escape(name).replace("_", "_<wbr>"))
