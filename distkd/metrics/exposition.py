"""Snapshots as text: the two formats of Prometheus, written line by line, and the client library's families.

The library makes an object of each sample and looks at each character of its labels, at each scrape. Nearly all of a
line stays what it was in the last snapshot, so here it is kept: some ten times less work, tested to be equal.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString as number_text

from distkd.metrics.ledger import Distribution, Labels, Series, Snapshot
from distkd.metrics.table import BUCKETS_S, Metric

__all__ = ["Families", "Page", "Renderer", "process_registry"]

Family = GaugeMetricFamily | CounterMetricFamily | HistogramMetricFamily

_AS_THEY_ARE = 1_000_000
"""Whole numbers below are written as Python does it, which is quicker; most lines are counts in buckets."""
_BOUNDS = (*(number_text(bound) for bound in BUCKETS_S), "+Inf")


class Page:
    """What every scrape between two snapshots is answered with, made when it is first asked for.

    Two threads may make it at once, which does no harm.
    """

    def __init__(self, snapshot: Snapshot, renderer: Renderer, process: CollectorRegistry | None = None):
        self.snapshot = snapshot
        self._renderer = renderer
        self._process = process
        self._made: dict[tuple[bool, bool], bytes] = {}

    def body(self, *, openmetrics: bool = False, compressed: bool = False) -> bytes:
        """In one of the two formats, plain or as gzip."""
        key = openmetrics, compressed
        if key not in self._made:
            if compressed:
                # the least effort leaves a tenth; the library's most leaves a twentieth, in ten times the time
                self._made[key] = gzip.compress(self.body(openmetrics=openmetrics), compresslevel=1, mtime=0)
            else:
                self._made[key] = self._text(openmetrics)
        return self._made[key]

    def _text(self, openmetrics: bool) -> bytes:
        text = self._renderer.text(self.snapshot, openmetrics=openmetrics).encode("utf-8", "replace")
        if self._process is not None:
            return text + (generate_openmetrics if openmetrics else generate_latest)(self._process)
        return text + b"# EOF\n" if openmetrics else text


class Renderer:
    """Writes snapshots; keeps what does not change from one to the next.

    Args:
        labels: that every series gets, beside its own.
    """

    def __init__(self, labels: Mapping[str, str] | None = None):
        self._labels = dict(labels or {})
        self._kept: dict[tuple[str, Labels], tuple[str, ...]] = {}

    def text(self, snapshot: Snapshot, *, openmetrics: bool = False) -> str:
        """All lines, without the end mark of OpenMetrics; the two formats differ in the names of counters only."""
        kept: dict[tuple[str, Labels], tuple[str, ...]] = {}
        lines: list[str] = []
        for metric, series in snapshot.series:
            name = metric.name.removesuffix("_total") if openmetrics and metric.kind == "counter" else metric.name
            lines += (f"# HELP {name} {metric.help}", f"# TYPE {name} {metric.kind}")
            for labels, value in series.items():
                key = metric.name, labels
                starts = kept[key] = self._kept.get(key) or self._starts(metric, labels)
                if isinstance(value, Distribution):
                    counts = tuple(accumulate(value.counts))
                    counts += counts[-1:]
                    if counts[-1] < _AS_THEY_ARE:
                        lines += [f"{start}{count}.0" for start, count in zip(starts, counts, strict=False)]
                    else:
                        lines += [start + number_text(count) for start, count in zip(starts, counts, strict=False)]
                    lines.append(starts[-1] + number_text(value.total))
                else:
                    lines.append(starts[0] + number_text(value))
        self._kept = kept  # labels that are gone are forgotten
        return "\n".join((*lines, ""))

    def _starts(self, metric: Metric, labels: Labels) -> tuple[str, ...]:
        """All of a series' lines up to the number."""
        named = {**dict(zip(metric.labels, labels, strict=True)), **self._labels}
        if metric.kind != "histogram":
            return (f"{metric.name}{_braces(named)} ",)
        buckets = [f"{metric.name}_bucket{_braces({**named, 'le': bound})} " for bound in _BOUNDS]
        return (*buckets, *(f"{metric.name}_{what}{_braces(named)} " for what in ("count", "sum")))


class Families(Collector):
    """The same for the library, which picks single names and is the reference of the tests."""

    def __init__(self, snapshot: Snapshot):
        self._snapshot = snapshot

    def collect(self) -> Iterator[Family]:
        for metric, series in self._snapshot.series:
            yield _family(metric, series)


def process_registry() -> CollectorRegistry:
    """The client library's `process_*`: memory, processor seconds, open files. Its counter is this process's own."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


def _family(metric: Metric, series: Series) -> Family:
    names = list(metric.labels)
    if metric.kind == "histogram":
        histogram = HistogramMetricFamily(metric.name, metric.help, labels=names)
        for labels, value in series.items():
            assert isinstance(value, Distribution), f"{metric.name} is a histogram, not {value}"
            buckets = list(zip(_BOUNDS, accumulate(value.counts), strict=True))
            histogram.add_metric(labels, buckets, value.total)
        return histogram
    kind = GaugeMetricFamily if metric.kind == "gauge" else CounterMetricFamily
    family = kind(metric.name, metric.help, labels=names)
    for labels, value in series.items():
        assert not isinstance(value, Distribution), f"{metric.name} is a {metric.kind}, not {value}"
        family.add_metric(labels, value)
    return family


def _braces(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in sorted(labels.items())) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
