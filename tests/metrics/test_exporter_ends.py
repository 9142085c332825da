"""How an exporter ends, and one that cannot start: seen once more, never in the way, and nothing is left of it."""

from __future__ import annotations

import socket
import threading
import urllib.error
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from distkd.base import World
from distkd.metrics import exporter as exporting
from distkd.metrics import keeper as keeping
from distkd.metrics import targets
from distkd.metrics.exporter import MetricsConfig, start_exporter
from distkd.metrics.keeper import Keeper
from tests.metrics.exporters import LABELS, STEP, exporter_of, free_port, nothing_is_announced, small_ledger
from tests.metrics.scraping import left_for_good, left_over, scrape


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert left_for_good() == []


def _nothing_is_left(folder: Path, port: int) -> None:
    assert nothing_is_announced(folder)
    assert left_for_good() == []
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=60)


def test_who_has_scraped_a_run_sees_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(keeping, "_INTERVAL_S", 3600.0)
    ledger = small_ledger()
    with exporter_of(tmp_path, ledger=ledger) as exporter:
        last = scrape(exporter.address)
        ledger.set("distkd_run_finished", 1)
        closing = threading.Thread(target=exporter.close, kwargs={"linger_s": 3600})
        closing.start()
        while last == STEP:  # a scrape may have been faster than the last snapshot; then there is another
            last = scrape(exporter.address)
        closing.join(120)
        assert not closing.is_alive()
    assert last == {**STEP, "gauge distkd_run_finished": 1}
    assert nothing_is_announced(tmp_path)


@pytest.mark.parametrize("linger_s, scraped, withdrawn", [(3600, False, False), (0, True, False), (3600, True, True)])
def test_an_end_that_nobody_watches_does_not_wait(tmp_path: Path, linger_s: float, scraped: bool, withdrawn: bool):
    with exporter_of(tmp_path) as exporter:
        if scraped:
            assert scrape(exporter.address) == STEP
        if withdrawn:
            exporter.withdraw()
        exporter.close(linger_s=linger_s)
        assert nothing_is_announced(tmp_path)
        assert left_for_good() == []
        exporter.close(linger_s=3600)  # a second time does no harm


def test_a_rank_that_is_withdrawn_still_answers(tmp_path: Path):
    with exporter_of(tmp_path) as exporter:
        for _ in range(2):
            exporter.withdraw()
            assert nothing_is_announced(tmp_path)
            assert scrape(exporter.address) == STEP


@pytest.mark.parametrize("signal_is", ["noticed", "raised"])
def test_a_wait_for_the_last_scrape_that_is_broken_off_leaves_nothing(tmp_path: Path, signal_is: str):
    asked: list[str] = []

    def until() -> bool:
        asked.extend(left_over())  # who is there still while it waits
        if signal_is == "raised":
            raise KeyboardInterrupt
        return asked.count("metrics-server") == 3

    with exporter_of(tmp_path) as exporter:
        assert scrape(exporter.address) == STEP
        with pytest.raises(KeyboardInterrupt) if signal_is == "raised" else nullcontext():
            exporter.close(linger_s=3600, until=until)
        assert asked.count("metrics-server") == (1 if signal_is == "raised" else 3)
        assert left_for_good() == []
    assert nothing_is_announced(tmp_path)


def test_a_disk_that_hangs_does_not_keep_a_run_from_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    answers, ledger = threading.Event(), small_ledger()
    monkeypatch.setattr(keeping, "_INTERVAL_S", 3600.0)
    monkeypatch.setattr(exporting, "_WITHDRAW_S", 0.01)
    monkeypatch.setattr(keeping, "_LAST_PATIENCE_S", 0.01)
    with exporter_of(tmp_path, ledger=ledger) as exporter, monkeypatch.context() as patch:
        patch.setattr(keeping, "write_text", lambda *_: answers.wait(240))
        patch.setattr(targets, "remove_own", lambda *_: answers.wait(240))
        ledger.add("distkd_steps_total", 1)
        exporter.close()
        assert sorted(left_over()) == ["metrics-disk", "metrics-withdraw"]
        with pytest.raises(urllib.error.URLError):
            scrape(exporter.address)
        answers.set()
        for thread in threading.enumerate():
            if thread.name.startswith("metrics"):
                thread.join(60)  # they end by themselves when the disk answers


@pytest.mark.parametrize("name", ["metrics-disk", "metrics", "metrics-server", ""])
def test_a_thread_that_cannot_be_started_costs_the_metrics_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
):
    start = threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        if name in (thread.name, ""):
            raise RuntimeError("can't start new thread")
        start(thread)

    (tmp_path / "textfile").mkdir()
    config = MetricsConfig(export="local", port=free_port(), textfile=tmp_path / "textfile")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", limited)
        assert start_exporter(config, tmp_path / "run", World(), ledger=small_ledger(), labels=LABELS, info={}) is None
    assert [record.getMessage() for record in caplog.records] == [
        "rank 0 trains on without metrics.export=local: can't start new thread"
    ]
    _nothing_is_left(tmp_path, config.port)


def test_a_start_that_is_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    config = MetricsConfig(export="local", port=free_port(), textfile=tmp_path)
    for place, what in ((exporting, "Textfile"), (exporting, "Keeper"), (Keeper, "refresh"), (targets, "write_json")):
        with monkeypatch.context() as patch:
            patch.setattr(place, what, interrupted)
            with pytest.raises(KeyboardInterrupt):
                start_exporter(config, tmp_path / "run", World(), ledger=small_ledger(), labels=LABELS, info={})
        _nothing_is_left(tmp_path, config.port)
