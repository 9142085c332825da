"""A scrape of as many series as 64 ranks have, against the client library's way, on the same values.

Target: 50 ms of processor time. One process answers for all ranks here; in a run each rank answers for itself, so a
64th is what its steps see. `snapshot` is what each rank does every two seconds whether anybody scrapes or not; `first`
is the first scrape after it, over loopback with the client's side in it, `next` another before the next snapshot.
`library` makes the same page as a collector of prometheus_client would, at each scrape.
"""

from __future__ import annotations

import argparse
import gzip
import urllib.request
from itertools import product

from prometheus_client import CollectorRegistry, MetricsHandler
from prometheus_client.openmetrics.exposition import generate_latest

from benchmarks.common import compare, report
from distkd.metrics.exposition import Families, Page, Renderer
from distkd.metrics.ledger import Ledger, Series, Snapshot
from distkd.metrics.server import ScrapeServer
from distkd.metrics.table import BUCKETS_S, METRICS, PHASES, Metric

__all__ = ["full_ledger", "main", "measure", "merged"]

_LOSSES = ("total", "ce", "kl", "nce", "crd", "dscd")
_VALUES = {"phase": PHASES, "part": _LOSSES, "loss": _LOSSES, "other": ("ce",)}


def full_ledger() -> Ledger:
    """All metrics of a run with six losses; three label values where the table does not say which."""
    ledger = Ledger()
    for metric in METRICS:
        for labels in product(*(_VALUES.get(label, ("a", "b", "c")) for label in metric.labels)):
            if metric.kind == "histogram":
                for number, bound in enumerate(BUCKETS_S, start=1):
                    for _ in range(number):
                        ledger.observe(metric.name, bound, *labels)
            elif metric.kind == "counter":
                ledger.add(metric.name, 123456.0, *labels)
            else:
                ledger.set(metric.name, 0.123456789, *labels)
    return ledger


def merged(snapshots: list[Snapshot]) -> Snapshot:
    """One page for all, with the rank as a label."""
    found: dict[str, tuple[Metric, Series]] = {}
    for rank, snapshot in enumerate(snapshots):
        for metric, series in snapshot.series:
            if metric.name not in found:
                labels = (*metric.labels, "rank")
                found[metric.name] = Metric(metric.name, metric.kind, metric.of, metric.help, labels), {}
            found[metric.name][1].update({(*labels, str(rank)): value for labels, value in series.items()})
    return Snapshot(tuple(found.values()))


def measure(n_ranks: int = 64, repeats: int = 15) -> dict[str, dict[str, float]]:
    """Seconds of each side, and the page's `lines` and `bytes`, beside the sides under `page`."""
    ledgers = [full_ledger() for _ in range(n_ranks)]
    snapshot = merged([ledger.snapshot() for ledger in ledgers])
    renderer = Renderer()
    pages = [Page(snapshot, renderer)]
    registry = CollectorRegistry()
    registry.register(Families(snapshot))
    ours = ScrapeServer(("127.0.0.1", 0))
    ours.serve(lambda: pages[-1])
    theirs = ScrapeServer(("127.0.0.1", 0))
    theirs.RequestHandlerClass = MetricsHandler.factory(registry)
    theirs.serve(lambda: pages[-1])

    def scrape(server: ScrapeServer) -> bytes:
        headers = {"Accept": "application/openmetrics-text;version=1.0.0", "Accept-Encoding": "gzip"}
        url = f"http://127.0.0.1:{server.server_address[1]}/metrics"
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
            return answer.read()

    def first() -> None:
        pages.append(Page(snapshot, renderer))
        scrape(ours)

    try:
        body = gzip.decompress(scrape(ours))
        assert body == gzip.decompress(scrape(theirs)) == generate_latest(registry)
        sides = compare(
            {
                "snapshot": lambda: [ledger.snapshot().counters() for ledger in ledgers],
                "first": first,
                "next": lambda: scrape(ours),
                "library": lambda: scrape(theirs),
            },
            repeats=repeats,
        )
    finally:
        ours.close()
        theirs.close()
    return {**sides, "page": {"lines": body.count(b"\n"), "bytes": len(body)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    sides = measure(arguments.ranks, arguments.repeats)
    page = sides.pop("page")
    least = {name: figures["least_processor_s"] for name, figures in sides.items()}
    report(
        "metrics_scrape",
        sides,
        {
            "first / 50 ms": least["first"] / 0.05,
            "first / library": least["first"] / least["library"],
            "next / library": least["next"] / least["library"],
            "snapshot + first of one rank / 1 ms": (least["snapshot"] + least["first"]) / arguments.ranks / 0.001,
        },
        ranks=arguments.ranks,
        **{name: int(number) for name, number in page.items()},
    )


if __name__ == "__main__":
    main()
