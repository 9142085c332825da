"""What the tests of the exporter share: a scrape as Prometheus would see it, and a ledger with everything in it."""

from __future__ import annotations

import ssl
import threading
import time
import urllib.request
from collections.abc import Mapping
from itertools import product
from pathlib import Path

from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from distkd.files import read_json
from distkd.metrics.ledger import Ledger
from distkd.metrics.table import BUCKETS_S, METRICS, PHASES

OPENMETRICS = "application/openmetrics-text;version=1.0.0"
"""What Prometheus asks for first."""


def target(run: Path, rank: int = 0) -> tuple[str, dict[str, str]]:
    """Address and labels that a rank has announced."""
    [group] = read_json(run / "prometheus" / f"rank-{rank:05d}.json")
    [address] = group["targets"]
    return address, group["labels"]


def get(
    address: str, headers: Mapping[str, str] | None = None, *, tls: ssl.SSLContext | None = None, query: str = ""
) -> tuple[bytes, Mapping[str, str]]:
    """Body and headers of one answer."""
    url = f"{'http' if tls is None else 'https'}://{address}/metrics{query}"
    request = urllib.request.Request(url, headers=dict(headers or {}))
    with urllib.request.urlopen(request, timeout=60, context=tls) as answer:
        return answer.read(), answer.headers


def values(text: str, *, openmetrics: bool = False) -> dict[str, float]:
    """By kind, name and label values, as in `counter distkd_steps_total`; only ours, without `distkd_rank_info`."""
    families = (parse_openmetrics if openmetrics else parse_text)(text)
    return {
        " ".join([family.type, sample.name, *sample.labels.values()]): sample.value
        for family in families
        for sample in family.samples
        if sample.name.startswith("distkd_") and sample.name != "distkd_rank_info"
    }


def scrape(address: str) -> dict[str, float]:
    return values(get(address)[0].decode())


def left_over() -> list[str]:
    """Threads of exporters that run now."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("metrics")]


def left_for_good(patience_s: float = 60.0) -> list[str]:
    """Threads of exporters that do not end; one that has answered its scrape may take a moment to be gone."""
    end = time.monotonic() + patience_s
    while (left := left_over()) and time.monotonic() < end:
        time.sleep(0.01)  # polling other threads, not waiting for luck
    return left


def full_ledger() -> Ledger:
    """Every metric of the table, six losses, three label values where the table does not say which."""
    ledger = Ledger()
    for metric in METRICS:
        known = {"phase": PHASES, "part": ("total", "ce", "kl", "nce", "crd", "dscd")}
        for labels in product(*(known.get(label, ("a", "b", "c")) for label in metric.labels)):
            if metric.kind == "histogram":
                for bound in BUCKETS_S:
                    ledger.observe(metric.name, bound, *labels)
            elif metric.kind == "counter":
                ledger.add(metric.name, 1234.5, *labels)
            else:
                ledger.set(metric.name, 0.123456789, *labels)
    return ledger
