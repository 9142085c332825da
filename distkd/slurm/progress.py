"""How far a run is, from the files of its folder alone: the ends of its logs are read, never a whole one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from distkd.metrics.jsonl import number, objects
from distkd.metrics.targets import is_gone

__all__ = ["Position", "Rate", "read_position", "tail"]

TAIL = 2**16
"""Bytes of a log that are read from its end; some hundred lines of metrics."""

_FAR_TAIL = 2**20
"""Bytes to look through for the last validation, which may be thousands of steps back."""

_WINDOW_S = 300.0
"""The rate is that of the last five minutes: it follows a change, and a validation in between does not upset it."""

_ENDINGS = ("done", "failed", "interrupted")


@dataclass(frozen=True, slots=True)
class Rate:
    """How fast the present attempt goes, with the validations and checkpoints in between."""

    steps_per_s: float
    samples_per_s: float | None
    gap_s: float
    """The longest time between two lines of these minutes."""


@dataclass(frozen=True, slots=True)
class Position:
    """What the folder says. Times are seconds of the epoch; None where nothing is known."""

    outcome: dict[str, Any]
    """`outcome.json`; empty while an attempt goes on, and where the main rank was killed."""
    ended: float | None
    started: float | None
    """When the latest attempt began; None where no attempt has."""
    job: str | None
    """The job of the latest attempt; None outside of SLURM."""
    is_gone: bool
    """Whether the main rank of the latest attempt was a process of this machine, and has ended."""
    step: int | None
    total: int | None
    rate: Rate | None
    news: float | None
    """Time of the newest line of metrics or event."""
    metric: str | None
    """The metric that selects, `eval.metric`."""
    value: float | None
    """Its value at the last validation."""

    @property
    def ending(self) -> str | None:
        """How the latest attempt ended, in one word; None where it has not said so."""
        state = self.outcome.get("state")
        return state if state in _ENDINGS else None


def read_position(folder: Path) -> Position:
    """Where a run stands; a file that is missing or damaged says nothing."""
    # in this order, and once more where the two look like a run that was killed: it may have ended or been started
    # again in between
    about = _mapping(folder / "environment.json")
    gone = _is_gone(about)
    outcome = _mapping(folder / "outcome.json")
    if gone and not outcome:
        about = _mapping(folder / "environment.json")
        gone = _is_gone(about)
    events = tail(folder / "events" / "rank-00000.jsonl")
    log = folder / "metrics.jsonl"
    lines = tail(log)
    starts = [event for event in events if event.get("event") == "start"]
    started = number(about.get("started")) or _last(starts, "time") or _modified(folder / "environment.json")
    since = started or 0.0
    present = [line for line in lines if "time" not in line or (number(line["time"]) or 0.0) >= since]
    resumed_at = _last(starts, "step")
    # lines that an older version wrote have no time, their file has
    news = [_last(lines, "time") or _modified(log), _last(events, "time"), started]
    steps = [_last(present, "step"), resumed_at, _last(lines, "step")]
    total = number(about.get("n_steps"))
    step = number(outcome.get("step")) if outcome else next((step for step in steps if step is not None), None)
    metric = _metric_of(folder / "config.yaml")
    return Position(
        outcome=outcome,
        ended=_ended(events, folder / "outcome.json") if outcome else None,
        started=started,
        job=None if about.get("job") is None else str(about["job"]),
        is_gone=gone,
        step=None if step is None else int(step),
        total=None if total is None else int(total),
        rate=_rate(present, [event for event in events if (number(event.get("time")) or 0.0) >= since]),
        news=max((time for time in news if time is not None), default=None),
        metric=metric,
        value=None if metric is None else _last_value(log, lines, metric),
    )


def _is_gone(about: dict[str, Any]) -> bool:
    return is_gone(str(about.get("process") or ""))  # older folders have none


def tail(path: Path, size: int = TAIL) -> list[dict[str, Any]]:
    """The whole objects among the last `size` bytes of a JSONL file, oldest first; none where there is no file."""
    return list(objects(_last_lines(path, size)))


def _last_lines(path: Path, size: int) -> list[bytes]:
    try:
        with path.open("rb") as file:
            end = file.seek(0, 2)
            start = file.seek(max(0, end - size))
            lines = file.read(size).split(b"\n")
    except OSError:
        return []
    return lines[1:] if start else lines  # the first one is cut


def _rate(lines: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]]) -> Rate | None:
    """From lines of metrics; from the start and the checkpoints where fewer than two lines tell their time."""
    points = _recent(_points(lines))
    if len({step for _, step in points}) < 2:
        points = _recent(_points([event for event in events if event.get("event") in ("start", "checkpoint")]))
        points = sorted({*points, *_points(lines)})
    if len(points) < 2:
        return None
    (first_s, first), (last_s, last) = points[0], points[-1]
    if last_s <= first_s or last <= first:
        return None
    steps_per_s = (last - first) / (last_s - first_s)
    samples = next(((line["samples"], line["step"]) for line in reversed(lines) if number(line.get("samples"))), None)
    return Rate(
        steps_per_s=steps_per_s,
        samples_per_s=None if samples is None else steps_per_s * samples[0] / samples[1],
        gap_s=max(after - before for (before, _), (after, _) in pairwise(points)),
    )


def _points(lines: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """Time and step of each line that has both."""
    pairs = [(number(line.get("time")), number(line.get("step"))) for line in lines]
    return [(time, step) for time, step in pairs if time is not None and step is not None]


def _recent(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of the window before the last one; where steps are longer than that, back to the step before."""
    if not points:
        return []
    last_s, last = points[-1]
    start = max((i for i, (time, step) in enumerate(points) if last_s - time >= _WINDOW_S and step < last), default=0)
    return points[start:]


def _last_value(log: Path, lines: Sequence[dict[str, Any]], metric: str) -> float | None:
    validated = [line["val"] for line in lines if isinstance(line.get("val"), dict)]
    if not validated:
        far = [line for line in _last_lines(log, _FAR_TAIL) if b'"val":' in line]
        validated = [line["val"] for line in objects(far) if isinstance(line.get("val"), dict)]
    return number(validated[-1].get(metric)) if validated else None


def _ended(events: Sequence[dict[str, Any]], outcome: Path) -> float | None:
    return _last([event for event in events if event.get("event") in _ENDINGS], "time") or _modified(outcome)


def _metric_of(config: Path) -> str | None:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, which a study of 75 runs notices
    try:
        read = yaml.load(config.read_bytes(), loader)
    except (OSError, yaml.YAMLError):
        return None
    section = read.get("eval") if isinstance(read, dict) else None
    metric = section.get("metric") if isinstance(section, dict) else None
    return metric if isinstance(metric, str) else None


def _mapping(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _last(lines: Sequence[dict[str, Any]], name: str) -> float | None:
    return number(lines[-1].get(name)) if lines else None


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None
