"""Reads the Grafana dashboard beside this file and asks a Prometheus what its panels show.

Knows of Grafana what distkd.json uses, no more. Standard library only; drawing is left to picture.py.
"""

from __future__ import annotations

import http.client
import itertools
import json
import math
import re
import statistics
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "FILE",
    "DashboardError",
    "Line",
    "Panel",
    "Server",
    "Window",
    "alert_spans",
    "known_runs",
    "legend",
    "lines_of",
    "panels_of",
    "rows_of",
    "run_named",
    "substituted",
    "window_of",
]

FILE = Path(__file__).resolve().parent / "grafana" / "distkd.json"
TIMEOUT_S = 30
_POINTS = 240
_LOOK_BACK = "30d"
_SCRAPE_S = 60.0
"""Servers ask at least so often."""
_AFTER_S = 3600.0
"""A run is scored after its last step; it is still shown then."""


class DashboardError(Exception):
    """The user's mistake, or a server that does not answer as one; ends without a traceback."""


class Server:
    """A Prometheus at `url`, http(s)://[user:password@]host:port[/prefix]."""

    def __init__(self, url: str):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise DashboardError(f"--url {url!r} is no address, expected for example http://127.0.0.1:9090")
        self.url = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl().rstrip("/")
        handlers: list[urllib.request.BaseHandler] = []
        if parts.username is not None:
            passwords = urllib.request.HTTPPasswordMgrWithDefaultRealm()
            user, password = (urllib.parse.unquote(text or "") for text in (parts.username, parts.password))
            passwords.add_password(None, self.url, user, password)
            handlers.append(urllib.request.HTTPBasicAuthHandler(passwords))
        self._opener = urllib.request.build_opener(*handlers)

    def ask(self, path: str, **parameters: str | float) -> Any:
        """The `data` of what /api/v1/PATH answers."""
        query = urllib.parse.urlencode(parameters).encode()
        try:
            with self._opener.open(f"{self.url}/api/v1/{path}", query, timeout=TIMEOUT_S) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            raise DashboardError(f"{self.url} answers {error.code} to {path}: {_reason(error)}") from None
        except (OSError, http.client.HTTPException) as error:  # a URLError and a timeout are OSErrors
            reason = getattr(error, "reason", error)
            raise DashboardError(
                f"no Prometheus answers at {self.url} ({reason}); start one, or name the right one with --url"
            ) from None
        except ValueError:
            raise DashboardError(f"{self.url} answers, but not as a Prometheus does; see --url") from None
        if not isinstance(answer, dict) or answer.get("status") != "success":
            raise DashboardError(f"{self.url} answers {path} with {str(answer)[:200]}, expected status success")
        return answer["data"]

    def instant(self, expr: str, time: float) -> list[dict[str, Any]]:
        """Series at one moment."""
        return self.ask("query", query=expr, time=time)["result"]

    def over(self, expr: str, window: Window) -> list[dict[str, Any]]:
        """Series over a window."""
        where = {"start": window.start, "end": window.end, "step": window.step}
        return self.ask("query_range", query=expr, **where)["result"]


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"])
    except (ValueError, LookupError, TypeError, OSError):
        return str(error.reason)


@dataclass(frozen=True, slots=True)
class Window:
    """What of time is shown, in seconds since 1970."""

    start: float
    end: float
    step: float
    rate: float
    """Length of $__rate_interval; at least four scrapes, as in Grafana."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel of the dashboard, or a row's title."""

    kind: str
    title: str
    x: int
    y: int
    w: int
    h: int
    source: Mapping[str, Any]
    """The panel as it is in the file."""

    @property
    def targets(self) -> list[dict[str, Any]]:
        """Its queries."""
        return self.source.get("targets", [])

    def field(self, name: str, default: Any = None) -> Any:
        """A setting of all its fields."""
        return self.source["fieldConfig"]["defaults"].get(name, default)

    def custom(self, name: str, default: Any = None) -> Any:
        """A setting of its drawing."""
        return self.field("custom", {}).get(name, default)

    def overridden(self, matcher: str, name: str) -> dict[str, Any]:
        """Settings of one field, by `byName` or `byFrameRefID`; regular expressions count as names."""
        found: dict[str, Any] = {}
        for override in self.source["fieldConfig"].get("overrides", []):
            how, wanted = override["matcher"]["id"], override["matcher"]["options"]
            if (how == matcher and wanted == name) or (
                how == "byRegexp" and matcher == "byName" and re.fullmatch(wanted, name)
            ):
                found |= {entry["id"]: entry["value"] for entry in override["properties"]}
        return found


@dataclass(frozen=True, slots=True)
class Line:
    """One series of a panel."""

    name: str
    ref: str
    """Letter of the query it comes from."""
    times: list[float]
    values: list[float]


def panels_of(dashboard: Mapping[str, Any]) -> list[Panel]:
    """Panels and rows in the order of the file."""
    return [
        Panel(panel["type"], panel["title"], source=panel, **{key: panel["gridPos"][key] for key in "xywh"})
        for panel in dashboard["panels"]
    ]


def substituted(expr: str, run: str, window: Window) -> str:
    """A query with Grafana's variables filled in: one run, all its stages and ranks."""
    values = {
        "run": re.sub(r"([\\^$.*+?()|\[\]{}])", r"\\\1", run).replace("\\", "\\\\").replace('"', '\\"'),
        "stage": ".*",
        "rank": ".*",
        "__rate_interval": f"{math.ceil(window.rate)}s",
        "__range": f"{math.ceil(window.end - window.start)}s",
    }

    def value(found: re.Match[str]) -> str:
        if found[1] not in values:
            raise DashboardError(f"{expr} asks for ${found[1]}, known are {', '.join('$' + name for name in values)}")
        return values[found[1]]

    return re.sub(r"\$\{?(\w+)\}?", value, expr)


def known_runs(server: Server, end: float) -> list[str]:
    """Runs of which the server has kept something."""
    found = server.instant(f"count by (run) (last_over_time(distkd_train_step[{_LOOK_BACK}]))", end)
    return sorted(series["metric"].get("run", "") for series in found)


def run_named(server: Server, text: str, now: float) -> str:
    """The run that a user means: its name, or a path that ends in it."""
    name = text.rstrip("/").rpartition("/")[2]
    return name if name != text and name in known_runs(server, now) else text


def window_of(server: Server, run: str, minutes: float, now: float) -> Window:
    """The last minutes of a run, up to now or to its last step; shorter if the run is.

    Raises:
        DashboardError: the server knows no such run; names those that it knows.
    """
    last = server.instant(
        f"max(last_over_time(distkd_last_step_timestamp_seconds{{run={_quoted(run)}}}[{_LOOK_BACK}]))", now
    )
    if not last:
        runs = known_runs(server, now)
        known = ", ".join(runs) if runs else "none; does it scrape any? see Status > Targets on its page"
        raise DashboardError(f"{server.url} knows no run {run!r}; runs it knows: {known}")
    # the last scrape comes after the last step, and a moment later a finished run has no series to ask for
    end = min(now, _number(last[0]["value"][1]) + _AFTER_S)
    seconds = math.ceil(minutes * 60 + _AFTER_S)
    found = server.instant(f"distkd_train_steps_planned{{run={_quoted(run)}}}[{seconds}s]", end)
    times = sorted({float(time) for one in found for time, _ in one["values"]})
    times = [time for time in times if time > times[-1] - minutes * 60]
    if not times:
        raise DashboardError(f"{server.url} has no numbers of run {run!r} at its last step; was its rank 0 scraped?")
    end = times[-1]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    # of a run that was killed soon and begun again, most of the few gaps are pauses
    scrape = max(0.1, min(_SCRAPE_S, statistics.median(gaps))) if gaps else 15.0
    start = min(times[0], end - 4 * scrape)
    # in whole milliseconds and backwards from the end, so that what came last is among what a range query looks at
    step_ms = math.ceil(1000 * max(scrape, (end - start) / _POINTS))
    start = round(end - int(1000 * (end - start) / step_ms + 1e-6) * step_ms / 1000, 3)
    step = step_ms / 1000
    return Window(start, end, step, max(4 * scrape, step + scrape))


def lines_of(server: Server, panel: Panel, run: str, window: Window) -> list[Line]:
    """What a panel of time series or numbers shows; a line's value is NaN where there is a hole."""
    lines: list[Line] = []
    for target in panel.targets:
        expr = substituted(target["expr"], run, window)
        if target.get("instant"):
            found = [{**one, "values": [one["value"]]} for one in server.instant(expr, window.end)]
        else:
            found = server.over(expr, window)
        for one in found:
            name = legend(target.get("legendFormat", ""), one["metric"] | {"run": ""})
            times, values = _with_holes(one["values"], window.step)
            lines.append(Line(name, target["refId"], times, values))
    return sorted(lines, key=lambda line: (line.ref, _natural(line.name)))


def rows_of(server: Server, panel: Panel, run: str, window: Window) -> list[dict[str, str | float]]:
    """Rows of a table, keyed by column, both in the panel's order."""
    frames: list[list[dict[str, str | float]]] = []
    for target in panel.targets:
        found = server.instant(substituted(target["expr"], run, window), window.end)
        name = f"Value #{target['refId']}" if len(panel.targets) > 1 else "Value"
        frames.append([{**one["metric"], name: _number(one["value"][1])} for one in found])
    rows = _merged(frames)
    for step in panel.source.get("transformations", []):
        if step["id"] == "organize":
            rows = [_organized(row, step["options"]) for row in rows]
    for sort in reversed(panel.source["options"].get("sortBy", [])):
        column, falling = sort["displayName"], sort.get("desc", False)
        rows.sort(key=lambda row, column=column: _natural(row.get(column, "")), reverse=falling)
    return rows


def alert_spans(server: Server, dashboard: Mapping[str, Any], run: str, window: Window) -> list[tuple[float, float]]:
    """From when to when any alert of the run fired."""
    times: set[float] = set()
    for annotation in dashboard["annotations"]["list"]:
        for one in server.over(substituted(annotation["expr"], run, window), window):
            times |= {float(time) for time, _ in one["values"]}
    spans: list[tuple[float, float]] = []
    for time in sorted(times):
        if spans and time - spans[-1][1] < 1.5 * window.step:
            spans[-1] = (spans[-1][0], time)
        else:
            spans.append((time, time))
    return spans


def legend(form: str, labels: Mapping[str, str]) -> str:
    """A legend of Grafana's form `{{label}}`."""
    text = re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda found: labels.get(found[1], ""), form)
    return " ".join(text.split())


def _merged(frames: Iterable[list[dict[str, str | float]]]) -> list[dict[str, str | float]]:
    """One row for all that has the same labels, as Grafana's `merge`."""
    rows: dict[tuple[tuple[str, str], ...], dict[str, str | float]] = {}
    for row in (row for frame in frames for row in frame):
        labels = tuple(sorted((key, value) for key, value in row.items() if isinstance(value, str)))
        rows.setdefault(labels, {}).update(row)
    return list(rows.values())


def _organized(row: Mapping[str, str | float], options: Mapping[str, Any]) -> dict[str, str | float]:
    order, names = options.get("indexByName", {}), options.get("renameByName", {})
    hidden = {name for name, is_hidden in options.get("excludeByName", {}).items() if is_hidden}
    kept = sorted((name for name in row if name not in hidden), key=lambda name: order.get(name, len(order)))
    return {names.get(name) or name: row[name] for name in kept}


def _with_holes(samples: Iterable[tuple[float, str]], step: float) -> tuple[list[float], list[float]]:
    times: list[float] = []
    values: list[float] = []
    for time, text in samples:
        if times and time - times[-1] > 1.5 * step:
            times.append((time + times[-1]) / 2)
            values.append(math.nan)
        times.append(float(time))
        values.append(_number(text))
    return times, values


def _number(text: str) -> float:
    value = float(text)  # also "NaN" and "+Inf"
    return value if math.isfinite(value) else math.nan


def _natural(value: str | float) -> list[tuple[int, float, str]]:
    """A sort key by which rank 10 comes after rank 9."""
    if not isinstance(value, str):
        return [(0, -math.inf if math.isnan(value) else value, "")]
    parts = re.split(r"(\d+)", value)
    return [(0, float(part), "") if part.isdigit() else (1, 0.0, part) for part in parts if part]


def _quoted(value: str) -> str:
    return json.dumps(value)
