"""A page of cards, each with a title and panels: where things stand on paper, and nothing of shard sets.

Places are computed here, in inches; a layout engine takes many seconds for as many axes.
"""

# matplotlib types many arguments partly
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distkd.errors import DataError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FORMATS", "Card", "Curve", "Legend", "Panel", "Picture", "Sheet", "Words", "draw", "title_letters"]

# Shapes: H W pixels, F values of a curve; lengths in inches, from the top left corner

Colour = tuple[float, float, float]

FORMATS = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg"}
"""By the end of the file's name."""
_PER_INCH = 17
"""Characters of the small type in an inch, about."""
_DPI = (125, 190)
"""Dots per inch of large and of small pages; a small one has some 1600 across."""
_PANEL = 1.6
_GAP = 0.05
_BETWEEN = 0.22
_MARGIN = 0.2
_HEAD = 0.5
"""Where the cards begin."""
_LINE = 0.135
_SIDE = 0.17
"""For the names of rows."""
_INK, _SOFT, _PALE = "#16181d", "#5b616e", "#f0f1f4"


@dataclass(frozen=True)
class Picture:
    """Grey (H, W) or coloured (H, W, 3) in 0..1."""

    pixels: np.ndarray
    overlay: np.ndarray | None = None
    """(H, W, 4), on top."""
    pixel_aspect: float = 1.0
    """Height of a pixel by its width."""
    letters: tuple[str, str] = ("", "")
    """At the left and at the top."""


@dataclass(frozen=True)
class Curve:
    """A vector; NaN leaves a gap."""

    values_F: np.ndarray
    limits: tuple[float, float]
    """What lies beyond is drawn at the panel's edge."""


@dataclass(frozen=True)
class Words:
    """Lines in place of a picture."""

    lines: Sequence[str]
    centred: bool = False


@dataclass(frozen=True)
class Panel:
    """One square of a card."""

    content: Picture | Curve | Words
    caption: str = ""


@dataclass(frozen=True)
class Card:
    """One sample: lines of a title, and panels in rows."""

    title: Sequence[str]
    rows: Sequence[Sequence[Panel]]
    row_names: Sequence[str] = ()


@dataclass(frozen=True)
class Legend:
    """Names and colours."""

    entries: Sequence[tuple[str, Colour]]


@dataclass(frozen=True)
class Sheet:
    """All of a page; every card has the same number of rows, which are as high on all of them."""

    title: str
    cards: Sequence[Sequence[Card]]
    """In rows of the page."""
    row_heights: Sequence[float]
    """Of a card, by the width of a panel."""
    legend: Legend
    notes: Sequence[str]


def title_letters(n_columns: int, *, side: bool) -> int:
    """Characters that a line of the title of a card with so many panels side by side has room for."""
    return int((n_columns * (_PANEL + _GAP) - _GAP + _SIDE * side) * _PER_INCH)


def draw(sheet: Sheet, out: Path) -> None:
    """Write the page as a picture of the kind that the file's name says, of `FORMATS`.

    Raises:
        DataError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not pyplot: no window, no global state
    from matplotlib.figure import Figure

    places = _Places(sheet)
    figure = Figure(figsize=(places.width, places.height), facecolor="white")
    FigureCanvasAgg(figure)
    pen = _Pen(figure, places.width, places.height)
    pen.text(_MARGIN, _MARGIN, sheet.title, size=9, weight="bold")
    for (x, y), card in places.cards():
        _draw_card(pen, places, x, y, card)
    y = places.foot
    for entries in places.legend:
        for x, name, colour in entries:
            pen.box(_Box(x, y, 0.12, 0.1), colour)
            pen.text(x + 0.17, y - 0.01, name, size=7)
        y += _LINE * 1.5
    for line in places.notes:
        pen.text(_MARGIN, y, line, size=6.5, color=_SOFT)
        y += _LINE
    image = io.BytesIO()
    figure.savefig(image, format=FORMATS[out.suffix.lower()], dpi=min(max(1600 / places.width, _DPI[0]), _DPI[1]))
    try:
        out.write_bytes(image.getvalue())
    except OSError as error:
        raise DataError(
            f"cannot write the picture {str(out)!r}: {error.strerror or error}; choose another place with --output"
        ) from error


class _Places:
    """Where the cards of a page stand."""

    def __init__(self, sheet: Sheet):
        self.sheet = sheet
        every = [card for row in sheet.cards for card in row]
        self.side = _SIDE if any(card.row_names for card in every) else 0.0
        self.n_title_lines = max(len(card.title) for card in every)
        self.captioned = [
            any(panel.caption for card in every if row < len(card.rows) for panel in card.rows[row])
            for row in range(len(sheet.row_heights))
        ]
        n_columns = max(len(row) for card in every for row in card.rows)
        self.card_width = self.side + n_columns * (_PANEL + _GAP) - _GAP
        rows = zip(sheet.row_heights, self.captioned, strict=True)
        panels = sum(height * _PANEL + _GAP + _LINE * captioned for height, captioned in rows)
        self.card_height = self.n_title_lines * _LINE + 0.04 + panels
        per_row = max(len(row) for row in sheet.cards)
        cards_width = per_row * (self.card_width + _BETWEEN) - _BETWEEN
        inside = max(cards_width, 4.0, len(sheet.title) / 12.5)
        self.width = 2 * _MARGIN + inside
        self.legend = _legend_lines(sheet.legend, inside)
        self.foot = _HEAD + len(sheet.cards) * (self.card_height + _BETWEEN)
        n_letters = int(inside * _PER_INCH)
        self.notes = [line for note in sheet.notes for line in textwrap.wrap(note, n_letters)]
        self.height = self.foot + (1.5 * len(self.legend) + len(self.notes)) * _LINE + _MARGIN / 2

    def cards(self) -> list[tuple[tuple[float, float], Card]]:
        return [
            (
                (
                    _MARGIN + column * (self.card_width + _BETWEEN),
                    _HEAD + row * (self.card_height + _BETWEEN),
                ),
                card,
            )
            for row, cards in enumerate(self.sheet.cards)
            for column, card in enumerate(cards)
        ]


class _Pen:
    """A page in inches from its top left corner; one axes for all, as each more costs some 20 ms."""

    def __init__(self, figure: Figure, width: float, height: float):
        self._axes = figure.add_axes((0, 0, 1, 1))
        self._axes.set_axis_off()
        self._axes.set_autoscale_on(False)
        self._axes.set_xlim(0, width)
        self._axes.set_ylim(height, 0)

    def text(self, x: float, y: float, words: str, *, size: float, color: str = _INK, **options: object) -> None:
        # parse_math: a name may hold a dollar sign
        options = {"ha": "left", "va": "top", "parse_math": False, **options}
        self._axes.text(x, y, words, fontsize=size, color=color, **options)  # pyright: ignore[reportArgumentType]

    def box(self, box: _Box, color: str | Colour) -> None:
        from matplotlib.patches import Rectangle

        self._axes.add_patch(Rectangle((box.x, box.y), box.width, box.height, facecolor=color))

    def image(self, box: _Box, pixels: np.ndarray) -> None:
        extent = (box.x, box.x + box.width, box.y + box.height, box.y)
        # colours stay colours
        self._axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, extent=extent, aspect="auto")

    def curve(self, x: np.ndarray, y: np.ndarray, *, dots: bool) -> None:
        self._axes.plot(x, y, linewidth=0.7, marker="." if dots else "", markersize=2, color="#0b6aa8")


@dataclass(frozen=True)
class _Box:
    x: float
    y: float
    width: float
    height: float

    def fit(self, aspect: float) -> _Box:
        """The largest box of that height by width inside, in the middle."""
        width = min(self.width, self.height / aspect)
        height = width * aspect
        return _Box(self.x + (self.width - width) / 2, self.y + (self.height - height) / 2, width, height)


def _draw_card(pen: _Pen, places: _Places, x: float, y: float, card: Card) -> None:
    for number, line in enumerate(card.title):
        pen.text(x, y + number * _LINE, line, size=7, weight="bold" if number == 0 else "normal")
    turned = {"rotation": 90, "ha": "center", "va": "center"}
    y += places.n_title_lines * _LINE + 0.04
    for number, row in enumerate(card.rows):
        height = places.sheet.row_heights[number] * _PANEL
        if places.captioned[number]:
            for column, panel in enumerate(row):
                pen.text(x + places.side + column * (_PANEL + _GAP), y, panel.caption, size=6, color=_SOFT)
            y += _LINE
        if card.row_names:
            pen.text(x + places.side / 2, y + height / 2, card.row_names[number], size=6, color=_SOFT, **turned)
        for column, panel in enumerate(row):
            _draw_panel(pen, _Box(x + places.side + column * (_PANEL + _GAP), y, _PANEL, height), panel.content)
        y += height + _GAP


def _draw_panel(pen: _Pen, box: _Box, content: Picture | Curve | Words) -> None:
    if isinstance(content, Picture):
        _draw_picture(pen, box, content)
        return
    pen.box(box, _PALE)
    if isinstance(content, Curve):
        _draw_curve(pen, box, content)
        return
    words = "\n".join(content.lines)
    if content.centred:
        middle = (box.x + box.width / 2, box.y + box.height / 2)
        pen.text(*middle, words, size=6.5, color=_SOFT, ha="center", va="center")
    else:
        pen.text(box.x + 0.06, box.y + 0.06, words, size=6.5)


def _draw_picture(pen: _Pen, box: _Box, picture: Picture) -> None:
    from matplotlib.patheffects import withStroke

    n_rows, n_columns = picture.pixels.shape[:2]
    box = box.fit(picture.pixel_aspect * n_rows / n_columns)
    pen.image(box, picture.pixels)
    if picture.overlay is not None:
        pen.image(box, picture.overlay)
    left, top = picture.letters
    rim: dict[str, Any] = {
        "color": "white",
        "size": 6.0,
        "path_effects": [withStroke(linewidth=1.5, foreground="black")],
    }
    if left:
        pen.text(box.x + 0.03, box.y + box.height / 2, left, va="center", **rim)
    if top:
        pen.text(box.x + box.width / 2, box.y + 0.03, top, ha="center", **rim)


def _draw_curve(pen: _Pen, box: _Box, curve: Curve) -> None:
    low, high = curve.limits
    n_values = len(curve.values_F)
    x_F = box.x + box.width * (np.arange(n_values) + 0.5) / n_values
    share_F = (curve.values_F.astype(np.float64) - low) / (high - low or 1.0)
    pen.curve(x_F, box.y + box.height * (0.9 - 0.8 * np.clip(share_F, -0.1, 1.1)), dots=n_values <= 64)
    pen.text(box.x + 0.03, box.y + 0.02, f"{high:.4g}", size=5, color=_SOFT)
    pen.text(box.x + 0.03, box.y + box.height - 0.02, f"{low:.4g}", size=5, color=_SOFT, va="bottom")


def _legend_lines(legend: Legend, width: float) -> list[list[tuple[float, str, Colour]]]:
    """Places from the left, names and colours, in as many lines as it takes."""
    lines: list[list[tuple[float, str, Colour]]] = []
    x = width
    for name, colour in legend.entries:
        wide = 0.4 + len(name) / _PER_INCH
        if not lines or x + wide > _MARGIN + width:
            lines.append([])
            x = _MARGIN
        lines[-1].append((x, name, colour))
        x += wide
    return lines
