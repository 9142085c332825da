"""Numbers as text: bars, sparklines, tables. In blocks where the terminal has them, otherwise in ASCII."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from rich.cells import cell_len, set_cell_size
from rich.text import Text

__all__ = ["ASCII", "BLOCKS", "Cell", "Marks", "Trends", "change", "milliseconds", "percent", "short", "table"]

Cell = str | tuple[str, str]
"""A text, or one with its style."""

_MIDDLE = 3 / 7
"""Height of what does not change."""

_LEAST, _MOST = 6, 30
"""Width of a sparkline in a table."""


@dataclass(frozen=True, slots=True)
class Marks:
    """The characters that pictures are made of."""

    heights: str
    """Lowest to highest."""
    full: str
    rest: str

    def bar(self, share: float, width: int) -> str:
        """A share from 0 to 1 as a bar; a percent is seen, and so is what is missing to the whole."""
        share = min(1.0, max(0.0, share)) if math.isfinite(share) else 0.0
        n_full = min(width, max(round(share * width), 1 if share >= 0.01 else 0))
        if n_full == width and share < 1:
            n_full = max(0, width - 1)
        return self.full * n_full + self.rest * (width - n_full)

    def spark(self, values: Sequence[float | None], width: int) -> str:
        """The newest values on the right, several in one place as their mean; a gap where there is no number."""
        if width <= 0 or not values:
            return ""
        width = min(width, len(values))
        bounds = [len(values) * i // width for i in range(width + 1)]
        groups = [values[a:b] for a, b in pairwise(bounds)]
        finite = [
            [_bounded(value) for value in group if value is not None and math.isfinite(value)] for group in groups
        ]
        means = [fmean(group) if group else None for group in finite]
        known = [mean for mean in means if mean is not None]
        if not known:
            return " " * width
        low, span, top = min(known), max(known) - min(known), len(self.heights) - 1
        places = [None if mean is None else (mean - low) / span if span else _MIDDLE for mean in means]
        return "".join(" " if place is None else self.heights[round(place * top)] for place in places)


def _bounded(value: float) -> float:
    """So that sums and differences stay finite."""
    return max(-1e300, min(1e300, value))


BLOCKS = Marks("".join(chr(0x2581 + i) for i in range(8)), chr(0x2588), chr(0x2591))
ASCII = Marks("_.-~=+*#", "#", ".")


def short(value: float | None) -> str:
    """Four digits that matter; `-` where nothing is known."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 and abs(value) < 1e7 else f"{value:.4g}"


def milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{1000 * seconds:.0f}" if seconds >= 0.1 else f"{1000 * seconds:.3g}" if seconds >= 1e-5 else "0"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def change(values: Sequence[float | None]) -> str:
    """From the first quarter of the values to the last, in percent."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if len(known) < 4:
        return ""
    part = len(known) // 4
    before, after = fmean(known[:part]), fmean(known[-part:])
    return f"{100 * (after - before) / abs(before):+.0f} %" if before else ""


@dataclass(frozen=True, slots=True)
class Trends:
    """A column of sparklines, as wide as the others leave room."""

    column: int
    values: Sequence[Sequence[float | None]]
    """Of each row."""
    marks: Marks


def table(head: Sequence[str], rows: Sequence[Sequence[Cell]], width: int, trends: Trends | None = None) -> list[Text]:
    """Aligned lines, the head first; columns without content are left out, of the first one what does not fit.

    Args:
        width: cells of a line; columns on the right that do not fit are left out.
    """
    shown = [i for i in range(len(head)) if i == 0 or any(_text(row[i]) for row in rows)]
    widths = {i: max(cell_len(_text(row[i])) for row in [head, *rows]) for i in shown}
    if trends is not None:
        room = min(_MOST, width - sum(widths.values()) - 2 * len(shown))
        if room >= _LEAST:  # names and numbers come first
            rows = [_with(row, trends, i, room) for i, row in enumerate(rows)]
            shown = sorted({*shown, trends.column})
            drawn = [head[trends.column], *(_text(row[trends.column]) for row in rows)]
            widths[trends.column] = max(map(cell_len, drawn))
    widths[0] = max(cell_len(head[0]), min(widths[0], max(8, width - sum(widths[i] + 2 for i in shown[1:]))))
    while len(shown) > 1 and widths[0] + sum(widths[i] + 2 for i in shown[1:]) > width:
        shown.pop()
    lines: list[Text] = []
    for number, row in enumerate([head, *rows]):
        line = Text(no_wrap=True)
        for i in shown:
            text, style = _text(row[i]), _style(row[i])
            space = " " * (widths[i] - cell_len(text))
            is_left = trends is not None and i == trends.column
            cell = _shortened(text, widths[i]) if i == 0 else text + space if is_left else space + text
            line.append("  " if i else "")
            line.append(cell, style=("bold" if i == 0 else "dim") if number == 0 else style)
        line.rstrip()
        lines.append(line)
    return lines


def _shortened(text: str, width: int) -> str:
    """A name of exactly that width; one that is longer loses its middle, as names differ at their ends."""
    if cell_len(text) <= width or width < 6 or not text.isascii():
        return set_cell_size(text, width)
    tail = (width - 2) // 2
    return text[: width - 2 - tail] + ".." + text[-tail:]


def _with(row: Sequence[Cell], trends: Trends, number: int, room: int) -> list[Cell]:
    cells = list(row)
    cells[trends.column] = (trends.marks.spark(trends.values[number], room), "cyan")
    return cells


def _text(cell: Cell) -> str:
    return cell if isinstance(cell, str) else cell[0]


def _style(cell: Cell) -> str:
    return "" if isinstance(cell, str) else cell[1]
