"""What this rank knows about its run, kept by the thread that trains and read by others at any time.

The trainer pays for a dictionary access; whoever reads takes a copy and never holds it up. Nothing here waits for the
device, and nothing imports torch.
"""

from __future__ import annotations

import bisect
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from distkd.metrics.table import BUCKETS_S, Metric, by_name

__all__ = ["MAX_SERIES", "Distribution", "Labels", "Ledger", "Series", "Snapshot"]

log = logging.getLogger(__name__)

MAX_SERIES = 64
"""Label values of one metric; whatever comes later is left out, so that no config can flood a server."""

Labels = tuple[str, ...]
"""Values of a metric's labels, in the order of the table."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """A histogram at one moment."""

    counts: tuple[int, ...]
    """Observations in each bucket of `BUCKETS_S`, not cumulated, and above the last."""
    total: float
    """Sum of all observations."""


Series = dict[Labels, float | Distribution]
"""What one metric stands at."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A ledger at one moment; nobody changes it any more."""

    series: tuple[tuple[Metric, Series], ...] = ()
    """Each metric that has a value, in the order of the table."""

    def counters(self) -> dict[str, Any]:
        """What a later attempt goes on counting from, JSON-ready; see `Ledger.restore`."""
        return {
            metric.name: [
                [list(labels), [list(value.counts), value.total] if isinstance(value, Distribution) else value]
                for labels, value in series.items()
            ]
            for metric, series in self.series
            if metric.kind != "gauge"
        }

    def with_counters_of(self, other: Snapshot) -> Snapshot:
        """These gauges, with counters and histograms of another moment."""
        chosen = {metric: series for metric, series in self.series if metric.kind == "gauge"}
        chosen |= {metric: series for metric, series in other.series if metric.kind != "gauge"}
        return Snapshot(tuple((metric, chosen[metric]) for metric in by_name().values() if metric in chosen))


class _Histogram:
    """Counts of the buckets, and behind them the sum, in one list: a copy of it is of one moment."""

    __slots__ = ("values",)

    def __init__(self, found: Distribution | None = None) -> None:
        self.values: list[float] = [0] * (len(BUCKETS_S) + 1) + [0.0] if found is None else [*found.counts, found.total]

    def read(self) -> Distribution:
        *counts, total = tuple(self.values)  # a tuple of a list is made in one go, whatever the trainer does
        return Distribution(tuple(cast(list[int], counts)), total)


class Ledger:
    """Values of the table's metrics, of one rank.

    One thread writes. A reader may see a step half written, a counter never goes back.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, dict[Labels, float]] = {}
        self._histograms: dict[str, dict[Labels, _Histogram]] = {}
        self._live: dict[str, Callable[[], float | None]] = {}
        self._since_start: dict[tuple[str, Labels], float] = {}
        self._metrics = by_name()
        self._full: set[str] = set()
        self._failed: set[str] = set()

    def set(self, name: str, value: float | None, *labels: str) -> None:
        """A gauge stands at `value`; None takes it away."""
        series = self._numbers.setdefault(name, {})
        if value is None:
            series.pop(labels, None)
        elif labels in series or self._has_room(name, series, labels):
            series[labels] = value

    def replace(self, name: str, values: Mapping[str, float] | Mapping[Labels, float]) -> None:
        """A gauge's values by label, in place of all it had; a text stands for the only label."""
        series = {(labels,) if isinstance(labels, str) else labels: value for labels, value in values.items()}
        for labels in series:
            self._check(name, labels)
        if len(series) > MAX_SERIES:
            self._say_full(name)
            series = dict(list(series.items())[:MAX_SERIES])
        self._numbers[name] = series

    def add(self, name: str, amount: float, *labels: str) -> None:
        """A counter rises by `amount` >= 0."""
        try:
            self._numbers[name][labels] += amount
        except KeyError:
            series = self._numbers.setdefault(name, {})
            if self._has_room(name, series, labels):
                series[labels] = 0.0 + amount

    def set_counter(self, name: str, since_start: float, *labels: str) -> None:
        """A counter stands at `since_start`, on top of what earlier attempts have counted."""
        self.add(name, since_start - self._since_start.get((name, labels), 0.0), *labels)
        self._since_start[name, labels] = since_start

    def observe(self, name: str, value: float, *labels: str) -> None:
        """A histogram takes in one value."""
        try:
            histogram = self._histograms[name][labels]
        except KeyError:
            series = self._histograms.setdefault(name, {})
            if not self._has_room(name, series, labels):
                return
            histogram = series[labels] = _Histogram()
        values = histogram.values
        values[bisect.bisect_left(BUCKETS_S, value)] += 1
        values[-1] += value

    def live(self, name: str, read: Callable[[], float | None]) -> None:
        """A gauge without labels that is asked for when somebody reads, from any thread; None is left out."""
        self._live[name] = read

    def series(self) -> Iterator[tuple[Metric, Series]]:
        """Each metric that has a value, in the order of the table, with a copy of what it stands at."""
        for name, metric in self._metrics.items():
            found: Series = {}
            if metric.kind == "histogram":
                for labels, histogram in list(self._histograms.get(name, {}).items()):
                    found[labels] = histogram.read()
            elif name in self._live:
                value = self._read(name)
                if value is not None:
                    found[()] = value
            else:
                found.update(self._numbers.get(name, {}).copy())
            if found:
                yield metric, found

    def snapshot(self) -> Snapshot:
        """Everything at this moment; live gauges are asked for here."""
        return Snapshot(tuple(self.series()))

    def counters(self) -> dict[str, Any]:
        """As of a snapshot made now."""
        return self.snapshot().counters()

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Count on from what `counters` gave, so that no counter ever falls; what the table no longer has is dropped.

        Raises:
            ValueError, TypeError, LookupError, AttributeError: it is something else; nothing is counted then.
        """
        numbers: list[tuple[str, Labels, float]] = []
        histograms: list[tuple[str, Labels, Distribution]] = []
        for name, series in kept.items():
            metric = self._metrics.get(name)
            if metric is None or metric.kind == "gauge":
                continue
            for given, value in series:
                labels = tuple(str(label) for label in given)
                if len(labels) != len(metric.labels):
                    raise ValueError(f"{name} has labels {list(labels)}, expected one for each of {metric.labels}")
                if metric.kind == "counter":
                    numbers.append((name, labels, _count(value)))
                else:
                    histograms.append((name, labels, _distribution(name, value)))
        for name, labels, number in numbers:
            self.add(name, number, *labels)
        for name, labels, found in histograms:
            histogram = self._histograms.setdefault(name, {}).setdefault(labels, _Histogram())
            more = _Histogram(found).values
            histogram.values = [old + new for old, new in zip(histogram.values, more, strict=True)]

    def _read(self, name: str) -> float | None:
        try:
            return self._live[name]()
        except Exception as error:  # noqa: BLE001 - the trainer's code on a thread of ours: one gauge less, not all
            if name not in self._failed:
                self._failed.add(name)
                log.warning("%s cannot be read and is left out: %s: %s", name, type(error).__name__, error)
            return None

    def _has_room(self, name: str, series: Mapping[Labels, Any], labels: Labels) -> bool:
        """Whether a series that is new may come to a metric."""
        self._check(name, labels)
        if len(series) < MAX_SERIES:
            return True
        self._say_full(name)
        return False

    def _check(self, name: str, labels: Labels) -> None:
        assert name in self._metrics, f"metric {name!r} is not in the table"
        expected = self._metrics[name].labels
        assert len(labels) == len(expected), f"metric {name!r} has labels {expected}, not {labels}"

    def _say_full(self, name: str) -> None:
        if name not in self._full:
            self._full.add(name)
            log.warning("%s has more than %d label values; the others are not exported", name, MAX_SERIES)


def _count(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{number} is no count")
    return number


def _distribution(name: str, value: Any) -> Distribution:
    counts, total = value
    if len(counts) != len(BUCKETS_S) + 1:
        raise ValueError(f"{name} has {len(counts)} buckets, expected {len(BUCKETS_S) + 1}")
    return Distribution(tuple(int(_count(count)) for count in counts), _count(total))
