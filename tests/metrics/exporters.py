"""What the tests of the exporter share: one that is started and closed, and what it must not leave behind."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distkd.base import World
from distkd.metrics.exporter import Exporter, MetricsConfig, start_exporter
from distkd.metrics.ledger import Ledger

LABELS = {"run": "r", "stage": "s"}
LOCAL = MetricsConfig(export="local")
STEP = {"gauge distkd_train_step": 7}
"""What a scrape of the ledger below sees."""


def small_ledger() -> Ledger:
    ledger = Ledger()
    ledger.set("distkd_train_step", 7)
    return ledger


@contextmanager
def exporter_of(run: Path, config: MetricsConfig = LOCAL, **options: Any) -> Iterator[Exporter]:
    given = {"labels": LABELS, "info": {"engine": "ddp"}, "ledger": small_ledger(), **options}
    exporter = start_exporter(config, run, given.pop("world", World()), **given)
    assert exporter is not None
    try:
        yield exporter
    finally:
        exporter.close()


def nothing_is_announced(folder: Path) -> bool:
    return not [*folder.rglob("rank-*.json"), *folder.rglob("*.rank-*.json")]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]
