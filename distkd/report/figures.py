"""Panels of results: every run's value with its interval, paired differences, confusion matrices."""

# Shapes: C classes

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from distkd.report.plots import INK, Panel, Style, wrapped
from distkd.report.roles import Role
from distkd.report.stats import Estimate, estimate, units_of

__all__ = ["confusion_of", "confusion_panel", "difference_panel", "value_panel"]

# not one of the themed colours: white figures must stay readable on it in the dark
_BLUE = "#0b6aa8"


def value_panel(metric: str, level: str, roles: Sequence[tuple[Role, Style]]) -> Panel:
    """One line per role: the runs as dots, mean and interval beside them."""
    shown = [(role, style, role.values(metric, level)) for role, style in roles]
    shown = [(role, style, values) for role, style, values in shown if values]
    names = [wrapped(role.title, 1.6, size=8) for role, _, _ in shown]
    line = max(0.46, 0.1 + 0.15 * max(map(len, names), default=0))

    def draw(axes: Axes) -> None:
        for place, (_, style, values) in enumerate(shown):
            points = [values[unit] for unit in sorted(values)]
            axes.scatter(points, [place + 0.18] * len(points), s=14, color=style.color, alpha=0.45, linewidths=0)
            _interval(axes, estimate(units_of(values)), place - 0.12, style)
        axes.set_yticks(range(len(shown)), ["\n".join(lines) for lines in names])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(metric)

    return Panel(f"{metric}: mean, 95 % interval, every run", draw, width=5.2, height=0.9 + line * len(shown))


def difference_panel(title: str, roles: Sequence[tuple[Style, dict[str, Estimate]]]) -> Panel:
    """One line per metric, on it each role's paired difference with its interval, beside the zero line."""
    metrics = list(dict.fromkeys(metric for _, differences in roles for metric in differences))
    step = 0.7 / len(roles)

    def draw(axes: Axes) -> None:
        axes.axvline(0.0, color=INK, linewidth=0.9)
        for number, (style, differences) in enumerate(roles):
            for metric, difference in differences.items():
                place = metrics.index(metric) + (number - (len(roles) - 1) / 2) * step
                _interval(axes, difference, place, style)
        axes.set_yticks(range(len(metrics)), metrics)
        axes.set_ylim(len(metrics) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("difference (right of the line is better)")

    return Panel(title, draw, width=5.2, height=0.8 + (0.16 + 0.1 * len(roles)) * len(metrics))


def _interval(axes: Axes, value: Estimate | None, place: float, style: Style) -> None:
    if value is None:
        return
    if value.low is not None and value.high is not None:
        axes.plot([value.low, value.high], [place, place], color=style.color, linewidth=2.0, solid_capstyle="butt")
    axes.plot([value.mean], [place], color=style.color, marker=style.marker, linestyle="none", markersize=5.5)


def confusion_of(role: Role) -> np.ndarray | None:
    """Counts summed over the role's counted runs, (C, C), rows are labels."""
    counts = [np.array(run.evaluation.confusion) for run in role.counted if run.evaluation is not None]
    return np.sum(counts, axis=0) if counts else None


def confusion_panel(role: Role, class_names: Sequence[str]) -> Panel | None:
    """Share of each label's items by predicted class, with the counts."""
    count_CC = confusion_of(role)
    if count_CC is None:
        return None
    c = len(class_names)
    share_CC = count_CC / np.maximum(count_CC.sum(axis=1, keepdims=True), 1)
    size = float(np.clip(0.42 * c + 1.1, 2.6, 6.0))

    def draw(axes: Axes) -> None:
        for row in range(c):
            for column in range(c):
                share = share_CC[row, column]
                # opacity instead of a colour map: zero is the page's own background, dark or light
                axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=_BLUE, alpha=share, linewidth=0))
                count = count_CC[row, column]
                # where white and the dark ink of a light page read equally well; in the dark both are light
                axes.text(
                    column, row, _cell(share, count, c) if count else "0", ha="center", va="center",
                    color="white" if share > 0.85 else INK, alpha=1 if count else 0.45, fontsize=8 if c <= 5 else 6,
                )  # fmt: skip
        axes.set_xlim(-0.5, c - 0.5)
        axes.set_ylim(c - 0.5, -0.5)
        axes.set_aspect("equal")
        axes.set_xticks(range(c), class_names, rotation=0 if max(map(len, class_names)) < 6 else 45, ha="center")
        axes.set_yticks(range(c), class_names)
        axes.grid(visible=False)
        axes.set_xlabel("predicted")
        axes.set_ylabel("label")

    return Panel(role.title, draw, width=size, height=size)


def _cell(share: float, count: int, c: int) -> str:
    return f"{100 * share:.0f} %\n{count}" if c <= 5 else f"{count}"
