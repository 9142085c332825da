"""What the tests of the exporter share: one that is started and closed, and what it must not leave behind."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from distkd.base import World
from distkd.metrics import exporter as exporting
from distkd.metrics import keeper as keeping
from distkd.metrics.exporter import Exporter, MetricsConfig, start_exporter
from distkd.metrics.keeper import Keeper
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


def be_patient(patch: pytest.MonkeyPatch) -> None:
    """A disk that takes seconds for a file is no fault: exporters wait for it as long as it takes."""
    patch.setattr(Keeper.refresh, "__defaults__", (60.0,))
    patch.setattr(keeping, "_LAST_PATIENCE_S", 60.0)
    patch.setattr(exporting, "_WITHDRAW_S", 60.0)


def free_port() -> int:
    """One below those that the system gives to whoever asks for any, so that nobody is given it in the meantime."""
    while True:
        port = 10_000 + secrets.randbelow(20_000)
        try:
            with socket.create_server(("127.0.0.1", port - 1)), socket.create_server(("127.0.0.1", port)):
                return port
        except OSError:  # somebody has it
            continue
