"""Panels over training steps: losses, validation metrics, learning rate, gradient norm, agreement of gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from distkd.metrics.classification import METRICS
from distkd.report.plots import Panel, Style, style_of
from distkd.report.roles import Role
from distkd.report.runs import Run

__all__ = ["agreement_panels", "loss_panels", "optimisation_panels", "series", "validation_panels"]

Styled = tuple[Role, Style]
Getter = Callable[[dict[str, Any]], Any]

_MAX_POINTS = 400


def series(runs: Sequence[Run], get: Getter) -> tuple[np.ndarray, np.ndarray]:
    """Steps (S,) of all runs together and the runs' values at them (runs, S), interpolated, NaN outside of a run."""
    curves: list[tuple[list[float], list[float]]] = []
    for run in runs:
        points = [(record["step"], get(record)) for record in run.records if "step" in record]
        kept = [(float(step), float(value)) for step, value in points if isinstance(value, (int, float))]
        if kept:
            steps, values = zip(*sorted(kept), strict=True)
            curves.append((list(steps), list(values)))
    if not curves:
        return np.zeros(0), np.zeros((0, 0))
    grid = np.unique(np.concatenate([steps for steps, _ in curves]))
    grid = grid[np.unique(np.linspace(0, len(grid) - 1, min(len(grid), _MAX_POINTS)).round().astype(int))]
    rows = [np.interp(grid, steps, values, left=np.nan, right=np.nan) for steps, values in curves]
    return grid, np.array(rows)


def _band(axes: Axes, runs: Sequence[Run], get: Getter, style: Style, label: str = "") -> None:
    """Mean over runs as a line, their range as a band."""
    steps, value_RS = series(runs, get)
    if not len(steps):
        return
    known_RS = np.ma.masked_invalid(value_RS)
    mean = known_RS.mean(axis=0).filled(np.nan)
    few = {"marker": style.marker, "markersize": 3.5} if len(steps) <= 25 else {}
    axes.plot(steps, mean, color=style.color, linestyle=style.dash, label=label, **few)
    if len(value_RS) > 1:
        low, high = known_RS.min(axis=0).filled(np.nan), known_RS.max(axis=0).filled(np.nan)
        axes.fill_between(steps, low, high, color=style.color, alpha=0.18, linewidth=0)


def _panel(title: str, roles: Sequence[Styled], get: Getter, *, log: bool = False) -> Panel | None:
    drawn = [(role, style) for role, style in roles if len(series(role.curve_runs, get)[0])]
    if not drawn:
        return None

    def draw(axes: Axes) -> None:
        for role, style in drawn:
            _band(axes, role.curve_runs, get, style)
        axes.set_xlabel("step")
        if log:
            axes.set_yscale("log")

    return Panel(title, draw)


def _kept(panels: Sequence[Panel | None]) -> list[Panel]:
    return [panel for panel in panels if panel is not None]


def _names(roles: Sequence[Styled], section: str) -> list[str]:
    """Names within a section of the records, in order of first appearance."""
    found: dict[str, None] = {}
    for role, _ in roles:
        for run in role.curve_runs:
            for record in run.records:
                found |= dict.fromkeys(record.get(section) or {})
    return list(found)


def _at(section: str, name: str) -> Getter:
    return lambda record: (record.get(section) or {}).get(name)


def loss_panels(roles: Sequence[Styled]) -> list[Panel]:
    """The total loss and each part of it."""
    parts = [_panel(f"part: {name}", roles, _at("parts", name)) for name in _names(roles, "parts")]
    return _kept([_panel("training loss", roles, lambda record: record.get("loss")), *parts])


def validation_panels(roles: Sequence[Styled]) -> list[Panel]:
    names = _names(roles, "val")
    ordered = [name for name in METRICS if name in names] + sorted(set(names) - set(METRICS))
    return _kept([_panel(f"validation {name}", roles, _at("val", name)) for name in ordered])


def optimisation_panels(roles: Sequence[Styled]) -> list[Panel]:
    return _kept(
        [
            _panel("learning rate", roles, lambda record: record.get("lr")),
            _panel("gradient norm", roles, lambda record: record.get("grad_norm")),
        ]
    )


def agreement_panels(roles: Sequence[Styled]) -> list[Panel]:
    """Per role that has them: the weight of each loss, and the cosine of each pair of losses' gradients."""
    panels: list[Panel] = []
    for role, style in roles:
        gauges = _names([(role, style)], "gauges")
        weights = [name for name in gauges if name.startswith("weight/")]
        cosines = [name for name in gauges if name.startswith("cosine/")]
        if weights:
            panels.append(_gauge_panel(f"{role.title}: weight of each loss", role, weights, "weight"))
        if cosines:
            panels.append(_gauge_panel(f"{role.title}: cosine of gradients", role, cosines, "cosine"))
    return panels


def _gauge_panel(title: str, role: Role, names: Sequence[str], quantity: str) -> Panel:
    def draw(axes: Axes) -> None:
        for number, name in enumerate(names):
            label = name.split("/", 1)[1].replace("|", " | ")
            _band(axes, role.curve_runs, _at("gauges", name), style_of(number), label)
        if quantity == "cosine":
            axes.axhline(0.0, color=style_of(0, is_teacher=True).color, linewidth=0.8)
        axes.set_xlabel("step")
        axes.set_ylabel(quantity)
        axes.legend(loc="upper left", bbox_to_anchor=(0.0, -0.22), ncols=2, borderaxespad=0.0)

    return Panel(title, draw, width=4.6, height=2.7 + 0.18 * ((len(names) + 1) // 2))
