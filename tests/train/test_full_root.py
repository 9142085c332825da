"""A run root that is full takes neither checkpoints nor counters: whoever watches hears of it all the same."""

from __future__ import annotations

import errno
import types
from pathlib import Path

import pytest

from distkd.base import World
from distkd.metrics import keeper as keeping
from distkd.metrics.keeper import Keeper, counters_file
from distkd.train.job import assemble
from distkd.train.observe import Observer
from tests.metrics.scraping import values
from tests.small import Small

FAILED = "counter distkd_checkpoints_total failed"
SINCE = "gauge distkd_checkpoint_failures"


def test_a_checkpoint_that_fails_is_told_while_counters_stand_still(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    observer = Observer(assemble(small.settings("alone"), World()), tmp_path)
    observer.start(0, 1)
    saver = types.SimpleNamespace(begun=0.0, newest_s=None, n_written=0, n_failed=0)
    observer.watch_saver(saver)  # pyright: ignore[reportArgumentType]
    keeper = Keeper(observer.ledger, counters_file(tmp_path, 0), World(), info={})

    def seen(written: int, failed: int) -> tuple[float | None, float | None]:
        saver.n_written, saver.n_failed = written, failed
        observer.end(None) if failed == 4 else observer._count_failures()
        keeper.refresh()
        shown = values(keeper.page.body().decode())
        return shown[FAILED], shown.get(SINCE)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    try:
        assert seen(1, 0) == (0, 0)
        with monkeypatch.context() as patch:
            patch.setattr(keeping, "write_text", full)
            assert seen(1, 1) == (0, 1)
            assert seen(1, 2) == (0, 2)
        assert seen(2, 2) == (2, 0)
        assert seen(2, 3) == (3, 1)
        assert seen(2, 4) == (4, None)  # the run has ended
    finally:
        keeper.close()
