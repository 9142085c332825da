"""The dashboard of one run as a picture, from a Prometheus and without Grafana.

python launch/monitoring/picture.py --url http://127.0.0.1:9090 --run RUN --output dashboard.png
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from dashboard import (
    FILE,
    DashboardError,
    Line,
    Panel,
    Server,
    Window,
    alert_spans,
    lines_of,
    panels_of,
    rows_of,
    run_named,
    substituted,
    window_of,
)
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator
from sheet import DARK, DPI, LIGHT, Look, Sheet, human, scale_of

__all__ = ["main"]

# pixels; a unit is the height of one row of the dashboard's grid
WIDTH, UNIT, GAP, HEADER = 1600, 34, 8, 60
_COLUMNS = 24
_DEVICES = 'count by (device) (last_over_time(distkd_rank_info{run=~"$run"}[$__range]))'
_LEGEND_LINE = 16
_ROUND_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask, draw, write; 2 for what the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:9090", help="of the Prometheus; may hold user:password@")
    parser.add_argument("--run", required=True, help="its name, as the label `run` has it, or its folder")
    parser.add_argument("--minutes", type=float, default=30.0, help="how much of its end is shown, at most (30)")
    parser.add_argument("--output", type=Path, default=Path("dashboard.png"), help="PNG, SVG or PDF")
    parser.add_argument("--light", action="store_true", help="dark letters on white")
    parser.add_argument("--dashboard", type=Path, default=FILE, help="another dashboard of Grafana's form")
    options = parser.parse_args(arguments)
    try:
        if not options.minutes > 0:
            raise DashboardError(f"--minutes {options.minutes:g} is no time; expected more than 0")
        _check_output(options.output)
        dashboard = _read(options.dashboard)
        server = Server(options.url)
        run = run_named(server, options.run, time.time())
        window = window_of(server, run, options.minutes, time.time())
        picture = Picture(LIGHT if options.light else DARK, server, dashboard, run, window)
        _write(picture.draw(), options.output)
    except DashboardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: {_clock(window.start)} to {_clock(window.end)} of run {run}")
    return 0


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DashboardError(f"dashboard {path} cannot be read: {error}") from None


def _check_output(path: Path) -> None:
    """Before a server is asked a hundred questions."""
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise DashboardError(f"--output {path} is of no known kind; expected .png, .svg or .pdf")
    if not path.parent.is_dir():
        raise DashboardError(f"--output {path} cannot be written: {path.parent} is no folder")


def _write(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=DPI, facecolor=figure.get_facecolor())
    except OSError as error:
        raise DashboardError(f"--output {path} cannot be written: {error}") from None


class Picture:
    """Panels of a dashboard in their grid."""

    def __init__(self, look: Look, server: Server, dashboard: dict[str, Any], run: str, window: Window):
        self.look, self.server, self.dashboard, self.run, self.window = look, server, dashboard, run, window
        self.panels = panels_of(dashboard)
        height = max(panel.y + panel.h for panel in self.panels) * UNIT + HEADER + GAP
        self.sheet = Sheet(look, WIDTH, height)
        self.alerts = alert_spans(server, dashboard, run, window)
        devices = server.instant(substituted(_DEVICES, run, window), window.end)
        self.is_cpu = {one["metric"].get("device") for one in devices} == {"cpu"}

    def draw(self) -> Figure:
        """The whole of it."""
        with mpl.rc_context({"font.family": "DejaVu Sans", "text.parse_math": False, "axes.unicode_minus": False}):
            end = GAP + 6 + self.sheet.text(GAP + 6, HEADER / 2, self.dashboard["title"], 24, weight="bold")
            self.sheet.text(end + 16, HEADER / 2 + 2, f"run {self.run}", 18)
            span = f"{_clock(self.window.start)} to {_clock(self.window.end)}"
            if self.alerts:
                span = f"red: an alert fires      {span}"
            self.sheet.text(WIDTH - GAP - 6, HEADER / 2 + 2, span, 16, self.look.faint, ha="right")
            for panel in self.panels:
                self._panel(panel)
        return self.sheet.figure

    def _panel(self, panel: Panel) -> None:
        column = (WIDTH - GAP) / _COLUMNS
        x, y = GAP + panel.x * column, HEADER + panel.y * UNIT
        w, h = panel.w * column - GAP, panel.h * UNIT - GAP
        if panel.kind == "row":
            self.sheet.text(x + 4, y + h / 2, panel.title, 17, weight="bold")
            return
        self.sheet.box(x, y, w, h)
        self.sheet.text(x + 12, y + 16, panel.title, 13.5, weight="bold")
        match panel.kind:
            case "stat":
                self._stat(panel, x, y + 26, w, h - 26)
            case "table":
                self._table(panel, x + 12, y + 32, w - 24, h - 36)
            case "timeseries":
                self._series(panel, x, y + 26, w, h - 26)
            case other:
                raise DashboardError(f"panel {panel.title!r} is a {other}; drawn are stat, table and timeseries")

    def _nothing(self, panel: Panel, x: float, y: float, w: float, h: float) -> None:
        words = panel.field("noValue", "no data")
        if self.is_cpu and all("_gpu_" in target["expr"] for target in panel.targets):
            words += ": it runs on CPUs"
        self.sheet.text(x + w / 2, y + h / 2, self.sheet.fitted(words, 12, w - 20), 12, self.look.faint, ha="center")

    def _stat(self, panel: Panel, x: float, y: float, w: float, h: float) -> None:
        found = [(line, _last(line)) for line in lines_of(self.server, panel, self.run, self.window)]
        shown = [(line, value) for line, value in found if value is not None][:4]
        if not shown:
            self._nothing(panel, x, y, w, h - 14)
            return
        steps = panel.field("thresholds", {"steps": []})["steps"]
        has_names = panel.source["options"].get("textMode") == "value_and_name"
        if panel.source["options"].get("graphMode") == "area" and len(shown) == 1:
            self._spark(shown[0][0], self._shade(shown[0][1], steps), x, y + h * 0.5, w, h * 0.5)
        each = w / len(shown)
        for place, (line, value) in enumerate(shown):
            middle = x + each * (place + 0.5)
            text = human(value, panel.field("unit", "short"), panel.field("decimals"))
            size = 36.0
            while size > 14 and self.sheet.measured(text, size, weight="bold") > each - 20:
                size -= 1
            up = 14 if has_names else 8
            self.sheet.text(middle, y + h / 2 - up, text, size, self._shade(value, steps), ha="center", weight="bold")
            if has_names:
                name = self.sheet.fitted(line.name, 14, each - 12)
                self.sheet.text(middle, y + h - 22, name, 14, self.look.faint, ha="center")

    def _spark(self, line: Line, color: str, x: float, y: float, w: float, h: float) -> None:
        axes = self.sheet.axes(x + 1, y, w - 2, h - 1)
        axes.set_axis_off()
        axes.fill_between(line.times, line.values, color=color, alpha=0.14, linewidth=0)
        axes.plot(line.times, line.values, color=color, linewidth=1, alpha=0.5)
        axes.margins(x=0)
        axes.set_ylim(0, max([value for value in line.values if value == value], default=1) * 1.1 or 1)

    def _shade(self, value: float, steps: Sequence[dict[str, Any]]) -> str:
        """Colour of the threshold that a value has reached."""
        color = "text"
        for step in steps:
            if step["value"] is None or value >= step["value"]:
                color = str(step["color"])
        return self.look.named.get(color, color)

    def _series(self, panel: Panel, x: float, y: float, w: float, h: float) -> None:
        lines = lines_of(self.server, panel, self.run, self.window)
        if not any(value == value for line in lines for value in line.values):
            self._nothing(panel, x, y, w, h - 20)
            return
        colors = {id(line): self.look.lines[place % len(self.look.lines)] for place, line in enumerate(lines)}
        below = self._legend([(line.name, colors[id(line)]) for line in lines if line.name], x + 12, y + h, w - 24)
        right = {
            line.ref
            for line in lines
            if panel.overridden("byFrameRefID", line.ref).get("custom.axisPlacement") == "right"
        }
        axes = self.sheet.axes(x, y, w, h)
        other: Axes | None = None
        self._ticks(axes, panel.field("unit", "short"), panel.field("decimals"))
        if right:
            other = axes.twinx()
            other.set_frame_on(False)
            self._ticks(other, panel.overridden("byFrameRefID", min(right)).get("unit", "short"))
            other.grid(visible=False)
        if panel.custom("stacking", {}).get("mode") == "normal":
            _stack(axes, lines, [colors[id(line)] for line in lines])
        else:
            for line in lines:
                on = other if other is not None and line.ref in right else axes
                marker = "o" if sum(value == value for value in line.values) < 3 else ""
                on.plot(line.times, line.values, color=colors[id(line)], linewidth=1.4, marker=marker, markersize=3.5)
        for drawn in (axes, other) if other is not None else (axes,):
            margin = 0.01 * (self.window.end - self.window.start)  # for half of a dot at either end
            drawn.set_xlim(self.window.start - margin, self.window.end + margin)
            self._limits(drawn, panel)
        self._threshold(axes, panel)
        left, beside = (self._label_width(drawn) for drawn in (axes, other))
        room = w - left - max(beside, 16)
        self.sheet.place(axes, x + left, y + 6, room, h - below - 34)
        self._moments(axes, room, left, max(beside, 16))
        for start, end in self.alerts:
            end = max(end, start + self.window.step)
            axes.axvspan(start, end, color=self.look.named["red"], alpha=0.09, linewidth=0, zorder=0)

    def _ticks(self, axes: Axes, unit: str, decimals: int | None = None) -> None:
        axes.grid(color=self.look.grid, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelsize=12 * 72 / DPI, labelcolor=self.look.faint, pad=5)
        axes.yaxis.set_major_locator(_Round(unit, decimals))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: human(value, unit, like=axes.get_ylim()[1])))

    def _moments(self, axes: Axes, room: float, left: float, right: float) -> None:
        """Times below a drawing: as many as have room, none that reaches out of the panel."""
        form = _form(self.window)
        half = self.sheet.measured(time.strftime(form, time.localtime(self.window.end)), 12) / 2
        low, high = axes.get_xlim()
        pixel = room / (high - low)
        moments = [
            at
            for at in _moments(self.window, max(2, min(5, int(room / (2 * half + 24)))))
            if (at - low) * pixel + left >= half + 4 and (high - at) * pixel + right >= half + 4
        ]
        axes.xaxis.set_major_locator(FixedLocator(moments))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: time.strftime(form, time.localtime(at))))

    def _label_width(self, axes: Axes | None) -> float:
        if axes is None:
            return 0.0
        low, high = axes.get_ylim()
        ticks = [float(tick) for tick in axes.get_yticks() if low <= tick <= high]
        texts = axes.yaxis.get_major_formatter().format_ticks(ticks)
        return 20 + max((self.sheet.measured(text, 12) for text in texts), default=0.0)

    def _limits(self, axes: Axes, panel: Panel) -> None:
        values = [float(y) for line in axes.lines for y in np.asarray(line.get_ydata()) if y == y] or [0.0]
        lowest, highest = min(values), max(values)
        if panel.custom("scaleDistribution", {}).get("type") == "log" and 0 < 20 * lowest < highest:
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_minor_locator(NullLocator())
            return
        margin = 0.05 * (highest - lowest if highest > lowest else abs(highest)) or 1.0
        low = panel.field("min", lowest - margin)
        high = max(highest, low, panel.custom("axisSoftMax", highest))
        axes.set_ylim(low, panel.field("max", high + margin))

    def _threshold(self, axes: Axes, panel: Panel) -> None:
        if panel.custom("thresholdsStyle", {}).get("mode", "off") == "off":
            return
        for step in panel.field("thresholds")["steps"]:
            low, high = axes.get_ylim()
            if step["value"] is None or not low < step["value"] <= max(high, step["value"]):
                continue
            axes.set_ylim(low, max(high, step["value"] * 1.1))
            axes.axhline(step["value"], color=self.look.named["red"], linewidth=1, linestyle=(0, (4, 3)))

    def _legend(self, entries: Sequence[tuple[str, str]], x: float, bottom: float, room: float) -> float:
        """Names below a drawing, two lines of them at most; gives the height that they take."""
        lines: list[list[tuple[float, str, str]]] = [[]]
        at, left = 0.0, len(entries)
        for name, color in entries:
            wide = 18 + self.sheet.measured(name, 12) + 14
            if at and at + wide > room:
                if len(lines) == 2:
                    lines[-1].append((at, f"+{left}", self.look.faint))
                    break
                lines.append([])
                at = 0.0
            lines[-1].append((at, name, color))
            at, left = at + wide, left - 1
        top = bottom - 6 - _LEGEND_LINE * len(lines)
        for row, line in enumerate(lines):
            middle = top + _LEGEND_LINE * (row + 0.5)
            for at, name, color in line:
                self.sheet.line((x + at, x + at + 12), middle, color, 2.2)
                self.sheet.text(x + at + 17, middle, name, 12, self.look.faint)
        return _LEGEND_LINE * len(lines) + 6

    def _table(self, panel: Panel, x: float, y: float, w: float, h: float) -> None:
        rows = rows_of(self.server, panel, self.run, self.window)
        if not rows:
            self._nothing(panel, x, y - 20, w, h)
            return
        columns = list(dict.fromkeys(name for row in rows for name in row))
        settings = {name: panel.overridden("byName", name) for name in columns}
        each = 24
        fits = max(1, int(h // each) - 1)
        texts = [[_written(row.get(name, ""), settings[name]) for name in columns] for row in rows[:fits]]
        longest = (
            max([name, *column], key=len) for name, column in zip(columns, zip(*texts, strict=True), strict=True)
        )
        needed = [self.sheet.measured(text, 14) + 14 for text in longest]
        spare = (w - sum(needed)) / len(needed)
        at = x
        for place, (name, need) in enumerate(zip(columns, needed, strict=True)):
            wide = need + spare if spare > 0 else need * w / sum(needed)
            self.sheet.text(at, y + each / 2, name, 13, self.look.faint)
            for line, row in enumerate(rows[:fits]):
                text = self.sheet.fitted(texts[line][place], 14, wide - 6)
                self.sheet.text(
                    at, y + each * (line + 1.5), text, 14, self._cell_color(row.get(name, ""), settings[name])
                )
            at += wide
        for line in range(1, min(len(rows), fits) + 1):
            self.sheet.line((x, x + w), y + each * line, self.look.grid, 0.8)
        if len(rows) > fits:
            self.sheet.text(x + w, y + each / 2, f"{len(rows) - fits} more", 12, self.look.faint, ha="right")

    def _cell_color(self, value: str | float, settings: dict[str, Any]) -> str:
        if isinstance(value, str):
            mapped = (mapping["options"].get(value, {}).get("color") for mapping in settings.get("mappings", []))
            return self.look.named.get(next(filter(None, mapped), "text"), self.look.ink)
        return self._shade(value, settings["thresholds"]["steps"]) if "thresholds" in settings else self.look.ink


def _written(value: str | float, settings: dict[str, Any]) -> str:
    if isinstance(value, str):
        return value
    return human(value, settings.get("unit", "short"), settings.get("decimals"))


class _Round(MaxNLocator):
    """Ticks at round numbers of the unit that they are written in: 512 MiB and not 477."""

    def __init__(self, unit: str, decimals: int | None):
        super().__init__(5, min_n_ticks=2 if decimals == 0 else 3, integer=decimals == 0)
        self.unit = unit

    def tick_values(self, vmin: float, vmax: float) -> Any:
        scale = scale_of(max(abs(vmin), abs(vmax)), self.unit)
        return [tick * scale for tick in super().tick_values(vmin / scale, vmax / scale)]


def _moments(window: Window, most: int) -> list[float]:
    """Round local times, at most so many and one more."""
    wanted = (window.end - window.start) / most
    step = next((step for step in _ROUND_S if step >= wanted), 86400 * math.ceil(wanted / 86400))
    shift = time.localtime(window.end).tm_gmtoff
    first = math.ceil((window.start + shift) / step) * step - shift
    return [first + step * place for place in range(int((window.end - first) // step) + 1)]


def _stack(axes: Axes, lines: Sequence[Line], colors: Sequence[str]) -> None:
    """Areas on top of each other; what is missing at a time counts as 0."""
    times = sorted({time for line in lines for time in line.times})
    base = [0.0] * len(times)
    for line, color in zip(lines, colors, strict=True):
        value = dict(zip(line.times, line.values, strict=True))
        heights = [value.get(time, 0.0) for time in times]
        top = [low + (high if high == high else 0.0) for low, high in zip(base, heights, strict=True)]
        axes.fill_between(times, base, top, color=color, alpha=0.75, linewidth=0)
        axes.plot(times, top, color=color, linewidth=0.8)
        base = top


def _last(line: Line) -> float | None:
    return next((value for value in reversed(line.values) if not math.isnan(value)), None)


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds))


def _form(window: Window) -> str:
    """Of local times: days where they differ, seconds where minutes do not tell."""
    seconds = window.end - window.start
    return "%H:%M:%S" if seconds < 240 else "%H:%M" if seconds < 86400 else "%d. %H:%M"


if __name__ == "__main__":
    sys.exit(main())
