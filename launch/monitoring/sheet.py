"""A sheet to draw a dashboard on: places are pixels from the top left, numbers are written with their units."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

__all__ = ["DARK", "DPI", "LIGHT", "Look", "Sheet", "human", "scale_of"]

DPI = 100


@dataclass(frozen=True, slots=True)
class Look:
    """Colours of a picture."""

    page: str
    panel: str
    edge: str
    ink: str
    faint: str
    grid: str
    lines: tuple[str, ...]
    named: dict[str, str]
    """What Grafana's names of colours become."""


DARK = Look(
    page="#111217",
    panel="#1a1c23",
    edge="#2b2e37",
    ink="#dcdee6",
    faint="#8f95a3",
    grid="#2c2f39",
    lines=(
        *("#73bf69", "#f2cc0c", "#5b9bf3", "#ff9830", "#f2495c", "#b877d9", "#5fd4c6", "#e08ab4", "#a8b64c"),
        *("#8ab8ff", "#c4916a", "#9aa4b5"),
    ),
    named={"green": "#73bf69", "yellow": "#f2cc0c", "red": "#f2495c", "blue": "#6ea6ff", "text": "#dcdee6"},
)
LIGHT = Look(
    page="#f1f2f4",
    panel="#ffffff",
    edge="#d9dce2",
    ink="#22252b",
    faint="#6a707c",
    grid="#e6e8ec",
    lines=(
        *("#2e8b3d", "#c79200", "#1f62c4", "#e06c00", "#cf2338", "#8a3fb5", "#0f8f83", "#b8447f", "#6d7a12"),
        *("#4f86d9", "#8d5a33", "#5b6575"),
    ),
    named={"green": "#2e8b3d", "yellow": "#b88600", "red": "#cf2338", "blue": "#1f62c4", "text": "#22252b"},
)


class Sheet:
    """A figure of `width` x `height` pixels."""

    def __init__(self, look: Look, width: int, height: int):
        self.look, self.width, self.height = look, width, height
        self.figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=look.page)
        self._renderer = FigureCanvasAgg(self.figure).get_renderer()
        self._all = self.axes(0, 0, width, height)
        self._all.set_axis_off()
        self._all.set_xlim(0, width)
        self._all.set_ylim(height, 0)

    def axes(self, x: float, y: float, w: float, h: float) -> Axes:
        """Room for a drawing, without a frame."""
        axes = self.figure.add_axes((0, 0, 1, 1))
        self.place(axes, x, y, w, h)
        axes.set_facecolor("none")
        for side in axes.spines.values():
            side.set_visible(False)
        return axes

    def place(self, axes: Axes, x: float, y: float, w: float, h: float) -> None:
        """Move a drawing, and what shares its x axis."""
        axes.set_position((x / self.width, 1 - (y + h) / self.height, w / self.width, h / self.height))

    def box(self, x: float, y: float, w: float, h: float) -> None:
        """The frame of a panel."""
        style = "round,pad=0,rounding_size=4"
        colors = {"facecolor": self.look.panel, "edgecolor": self.look.edge, "linewidth": 0.8}
        self._all.add_patch(FancyBboxPatch((x, y), w, h, boxstyle=style, **colors))

    def line(self, x: tuple[float, float], y: float, color: str, width: float) -> None:
        """A level line."""
        self._all.plot(x, (y, y), color=color, linewidth=width, solid_capstyle="butt")

    def text(self, x: float, y: float, text: str, size: float, color: str | None = None, **more: Any) -> float:
        """Write with the middle at height `y`; gives the width."""
        font = {"fontsize": size * 72 / DPI, "color": color or self.look.ink, "va": "center_baseline"}
        return self._all.text(x, y, text, **font, **more).get_window_extent(self._renderer).width

    def measured(self, text: str, size: float, **more: Any) -> float:
        """How wide a text would be."""
        artist = self._all.text(0, 0, text, fontsize=size * 72 / DPI, **more)
        width = artist.get_window_extent(self._renderer).width
        artist.remove()
        return width

    def fitted(self, text: str, size: float, room: float) -> str:
        """A text, cut to a width."""
        if self.measured(text, size) <= room:
            return text
        while text and self.measured(text + "...", size) > room:
            text = text[:-1]
        return text + "..."


_TIMES = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "us"))
_SI = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_IEC = tuple((1024.0**power, prefix) for power, prefix in ((5, "Pi"), (4, "Ti"), (3, "Gi"), (2, "Mi"), (1, "Ki")))
_SUFFIXES = {"s": "", "bytes": "B", "Bps": "B/s", "flops": "FLOP/s"}


def human(value: float, unit: str = "short", decimals: int | None = None, *, like: float | None = None) -> str:
    """With one of Grafana's units, as `1.5 min`, `37 %`, `2.1 GiB`; with the prefix of `like` where that is given."""
    if not math.isfinite(value):
        return "-"
    if unit == "percentunit":
        return f"{_digits(100 * value, decimals)} %"
    if unit == "sci":
        return f"{value:.1e}" if value else "0"
    scale, prefix = _scale(value if like is None else like, unit)
    return f"{_digits(value / scale, decimals)} {prefix}{_SUFFIXES.get(unit, '')}".rstrip()


def scale_of(value: float, unit: str) -> float:
    """What a number is divided by before it is written."""
    return _scale(value, unit)[0]


def _scale(value: float, unit: str) -> tuple[float, str]:
    scales = {"s": _TIMES, "bytes": _IEC}.get(unit, _SI)
    if unit not in _SUFFIXES and abs(value) < 10_000:
        return 1.0, ""
    found = ((scale, prefix) for scale, prefix in scales if abs(value) >= scale)
    return next(found, (1.0, "s" if unit == "s" else ""))


def _digits(value: float, decimals: int | None) -> str:
    if decimals is not None:
        return f"{value:.{decimals}f}"
    text = f"{value:.3g}"
    return f"{value:.0f}" if "e+" in text else text
