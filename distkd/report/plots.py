"""How the report draws: one style, one colour per role, each panel as themed SVG for the page and as PNG beside it.

A `Panel` is a title and a function that draws on given axes, so that the same drawing serves a phone (one panel a row)
and a slide (all panels of a family in one PNG).
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.textpath import TextToPath

__all__ = [
    "GRID",
    "INK",
    "ON_DARK",
    "Panel",
    "Style",
    "panels_to_png",
    "png_figure",
    "share_glyphs",
    "style_of",
    "themed",
    "to_svg",
    "wrapped",
]

INK = "#16181d"
"""Text and lines; in the page it is replaced by the colour of the text, light or dark."""
GRID = "#d5d8de"

Dash = Literal["-", "--", "-.", ":"]

# Okabe and Ito's colours, told apart by all forms of colour vision; dashes and markers repeat the difference
_CYCLE: tuple[tuple[str, Dash, str], ...] = (
    ("#d55e00", "-", "s"),
    ("#0072b2", "--", "^"),
    ("#009e73", "-", "D"),
    ("#cc79a7", "-.", "v"),
    ("#e69f00", "--", "P"),
    ("#56b4e9", "-", "X"),
)
_TEACHER: tuple[str, Dash, str] = ("#7b8089", ":", "o")

ON_DARK = {
    "#d55e00": "#ff8b42",
    "#0072b2": "#4fb0ec",
    "#009e73": "#33c79d",
    "#cc79a7": "#e29cc4",
    "#e69f00": "#f5b83d",
    "#56b4e9": "#8fd0f7",
    "#7b8089": "#a5abb6",
}
"""The colours of roles on paper, and what they become on a dark page."""


def themed(color: str) -> str:
    """The style sheet's name of a colour of roles."""
    return f"var(--role-{color[1:]})"


_THEMED = {INK: "var(--ink)", GRID: "var(--grid)"} | {color: themed(color) for color in ON_DARK}

_LETTERS = TextToPath()
_LEGEND_SIZE, _TITLE_SIZE = 8.0, 9.0
_LINE = 1.4 / 72
"""Inches from line to line, by point of the letters."""

_RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlesize": _TITLE_SIZE,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-3, 4),
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": _LEGEND_SIZE,
    "legend.handlelength": 3.0,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.09,
    "figure.constrained_layout.h_pad": 0.06,
    "svg.fonttype": "path",
    "path.simplify_threshold": 0.5,
}


@dataclass(frozen=True, slots=True)
class Style:
    color: str
    dash: Dash
    marker: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One drawing; its size is that of its place in the page."""

    title: str
    draw: Callable[[Axes], None]
    width: float = 3.5
    """Inches."""
    height: float = 2.3


def wrapped(text: str, width: float, *, size: float, bold: bool = False) -> list[str]:
    """Lines of at most `width` inches: broken between words, else after a dot and the like, last between letters.

    A bracket, as of a role's variant, begins a line where not all fits into one.
    """
    if _inches(text, size, bold) <= width:
        return [text]
    head, bracket, tail = text.partition(" (")
    if bracket and head:
        return wrapped(head, width, size=size, bold=bold) + wrapped(f"({tail}", width, size=size, bold=bold)
    lines = [""]
    for word in re.findall(r"\S+\s*", text):
        fits = _inches(word.rstrip(), size, bold) <= width
        for part in [word] if fits else re.findall(r"[^-._=/|+]*[-._=/|+\s]*", word):
            for piece in [part] if _inches(part.rstrip(), size, bold) <= width else part:
                if lines[-1] and _inches((lines[-1] + piece).rstrip(), size, bold) > width:
                    lines.append("")
                lines[-1] += piece
    return [line.rstrip() for line in lines]


def _inches(text: str, size: float, bold: bool) -> float:
    font = FontProperties(family="DejaVu Sans", size=size, weight="bold" if bold else "normal")
    return _LETTERS.get_text_width_height_descent(text, font, ismath=False)[0] / 72


def style_of(number: int, *, is_teacher: bool = False) -> Style:
    """Style `number` of the cycle; teachers are grey and dotted, as they are not in the competition."""
    color, dash, marker = _TEACHER if is_teacher else _CYCLE[number % len(_CYCLE)]
    return Style(color, ":" if number >= len(_CYCLE) else dash, marker)


@contextmanager
def _figure(width: float, height: float, salt: str) -> Iterator[Figure]:
    # a Figure without pyplot: no window, no global state, the same bytes for the same data
    with mpl.rc_context({**_RC, "svg.hashsalt": salt}):
        yield Figure(figsize=(width, height))


def to_svg(panel: Panel) -> str:
    """The panel as inline SVG without background, in the colours of the page."""
    salt = hashlib.sha256(panel.title.encode()).hexdigest()[:8]
    with _figure(panel.width, panel.height, salt) as figure:
        axes = figure.add_subplot()
        panel.draw(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    for color, themed in _THEMED.items():
        svg = svg.replace(color, themed)
    # fixed ids of figure, axes and ticks would occur once per panel in the page; only hashed ids are referred to
    svg = re.sub(r'<g id="[a-zA-Z]+\w*?_\d+">', "<g>", svg)
    label = panel.title.replace("&", "and").replace('"', "'").replace("<", "(").replace(">", ")")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def share_glyphs(page: str) -> str:
    """The page with the shapes of letters, which every drawing brings along, moved into one invisible drawing."""
    shapes = dict(re.findall(r'<path id="(DejaVuSans[^"]*)"([^>]*)/>', page))
    if not shapes:
        return page
    rest = re.sub(r'<path id="DejaVuSans[^"]*"[^>]*/>\s*', "", page)
    paths = "".join(f'<path id="{name}"{shape}/>' for name, shape in sorted(shapes.items()))
    # no size instead of display:none, inside of which some browsers ignore shapes
    store = f'<svg width="0" height="0" style="position:absolute" aria-hidden="true"><defs>{paths}</defs></svg>'
    return rest.replace("<main>", f"{store}\n<main>", 1)


def panels_to_png(panels: Sequence[Panel], legend: Sequence[tuple[str, Style]], columns: int = 3) -> bytes:
    """All panels of a family in one picture with a legend of the roles, on white, 150 dpi."""
    with png_figure(panels, legend, columns) as figure:
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
    return file.getvalue()


@contextmanager
def png_figure(panels: Sequence[Panel], legend: Sequence[tuple[str, Style]], columns: int = 3) -> Iterator[Figure]:
    """What `panels_to_png` saves; titles and legend take as many lines as they need."""
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    width, height = max(panel.width for panel in panels), max(panel.height for panel in panels)
    with _figure(columns * width, rows * height, "png") as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, panel in zip(grid.ravel(), panels, strict=False):
            panel.draw(axes)
            axes.set_title("title")
        for axes in grid.ravel()[len(panels) :]:
            axes.set_axis_off()
        extra = _add_legend(figure, legend, columns * width) if legend else 0.0
        figure.set_figheight(rows * height + extra)
        figure.draw_without_rendering()  # how wide the axes are follows from what stands beside them
        for number in range(rows):
            of_row = list(zip(grid[number], panels[number * columns :], strict=False))
            titles = [wrapped(panel.title, _width(axes), size=_TITLE_SIZE, bold=True) for axes, panel in of_row]
            for (axes, _), lines in zip(of_row, titles, strict=True):
                axes.set_title("\n".join(lines))
            extra += (max(map(len, titles)) - 1) * _TITLE_SIZE * _LINE
        figure.set_figheight(rows * height + extra)
        yield figure


def _width(axes: Axes) -> float:
    assert isinstance(axes.figure, Figure)
    return axes.get_window_extent().width / axes.figure.dpi


def _add_legend(figure: Figure, legend: Sequence[tuple[str, Style]], width: float) -> float:
    """Above everything, in as many columns as fit, up to four; its height."""
    size = _LEGEND_SIZE
    handle, gap, edge = 3.8 * size / 72, 2.0 * size / 72, 0.3  # line sample, between two columns, at both ends
    titles = [wrapped(title, width - edge - handle, size=size) for title, _ in legend]
    room = max(_inches(line, size, False) for lines in titles for line in lines) + handle
    columns = max(1, min(4, len(legend), int((width - edge + gap) / (room + gap))))
    handles = [
        Line2D([], [], color=style.color, linestyle=style.dash, marker=style.marker, label="\n".join(lines))
        for lines, (_, style) in zip(titles, legend, strict=True)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=columns)
    rows = math.ceil(len(legend) / columns)
    return (rows * max(map(len, titles)) + 1) * size * _LINE
