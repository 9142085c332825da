"""No counter that was seen is above what a restart begins with, whatever the disk does; a file for short jobs."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distkd.base import World
from distkd.files import read_json
from distkd.metrics import keeper as keeping
from distkd.metrics.keeper import Keeper, Textfile, counters_file
from distkd.metrics.ledger import Ledger
from tests.launch.processes import REPOSITORY, environment
from tests.metrics.scraping import full_ledger, left_for_good, scrape, values

SAMPLES = "counter distkd_samples_total"


@pytest.fixture(autouse=True)
def _only_when_asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is refreshed but by the test, and no thread is left behind."""
    monkeypatch.setattr(keeping, "_INTERVAL_S", 3600.0)
    yield
    assert left_for_good() == []


@contextmanager
def _keeper(path: Path, ledger: Ledger, **options: Any) -> Iterator[Keeper]:
    keeper = Keeper(ledger, path, World(), info={"engine": "ddp"}, **options)
    try:
        yield keeper
    finally:
        keeper.close()


def _seen(keeper: Keeper) -> dict[str, float]:
    return values(keeper.page.body().decode())


def _kept(path: Path) -> dict[str, Any]:
    """Counters of a file."""
    kept = read_json(path)
    del kept["begun"]
    return kept


def _kill(keeper: Keeper) -> None:
    """As SIGKILL would: nothing more is saved."""
    keeper._stop.set()
    keeper._thread.join()
    keeper._disk.close()


def test_what_is_served_is_what_lies_on_disk(tmp_path: Path):
    path, ledger = counters_file(tmp_path, 3), full_ledger()
    assert path == tmp_path / "prometheus" / "rank-00003.counters"
    with _keeper(path, ledger) as keeper:
        for _ in range(3):
            ledger.add("distkd_samples_total", 8)
            ledger.observe("distkd_step_seconds", 0.5, "data")
            keeper.refresh()
            assert _kept(path) == keeper.page.snapshot.counters()
            assert _seen(keeper)[SAMPLES] == ledger.counters()["distkd_samples_total"][0][1]
        ledger.add("distkd_samples_total", 8)
    assert _kept(path) == ledger.counters()  # closed: the last word
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_counters_go_on_over_restarts_and_gauges_do_not(tmp_path: Path):
    path = counters_file(tmp_path, 0)
    for attempt in range(1, 4):
        ledger = Ledger()
        ledger.set("distkd_train_step", 0)
        with _keeper(path, ledger) as keeper:
            assert _seen(keeper).get(SAMPLES, 0) == 8 * (attempt - 1)
            assert "gauge distkd_lr" not in _seen(keeper)
            ledger.add("distkd_samples_total", 8)
            ledger.observe("distkd_step_wall_seconds", 0.5)
            ledger.set("distkd_lr", attempt)
            keeper.refresh()
            assert _seen(keeper)["histogram distkd_step_wall_seconds_count"] == attempt
            _kill(keeper)


_EVENTS = st.lists(st.sampled_from(["work", "refresh", "disk fails", "disk works", "killed", "closed"]), max_size=25)


@given(events=_EVENTS)
def test_no_counter_falls_however_attempts_end(events: list[str]):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path, work_done, highest = counters_file(Path(folder), 0), 0, 0.0
        save, fails = keeping.write_text, False

        def written(*arguments: Any) -> None:
            if fails:
                raise OSError(errno.ENOSPC, "No space left on device")
            save(*arguments)

        patch.setattr(keeping, "write_text", written)
        patch.setattr(os, "fsync", lambda _: None)  # some hundred files, and no power is lost here
        ledger = Ledger()
        keeper = Keeper(ledger, path, World(), info={})
        for event in [*events, "closed"]:
            if event == "work":
                ledger.add("distkd_samples_total", 1)
                ledger.observe("distkd_step_wall_seconds", 1.0)
                work_done += 1
            elif event == "refresh":
                keeper.refresh()
            elif event.startswith("disk"):
                fails = event == "disk fails"
            else:
                keeper.close() if event == "closed" else _kill(keeper)
                seen = _seen(keeper)
                highest = max(highest, seen.get(SAMPLES, 0.0))
                ledger = Ledger()
                keeper = Keeper(ledger, path, World(), info={})
            seen = _seen(keeper)
            assert highest <= seen.get(SAMPLES, 0.0) <= work_done
            assert seen.get("histogram distkd_step_wall_seconds_count", 0.0) == seen.get(SAMPLES, 0.0)
            highest = seen.get(SAMPLES, 0.0)
        keeper.close()


def test_a_rank_killed_between_snapshot_and_save_has_shown_nothing_of_it(tmp_path: Path):
    program = f"""
import sys
from pathlib import Path
from distkd.base import World
from distkd.metrics import keeper
from distkd.metrics.exporter import Exporter, MetricsConfig
from distkd.metrics.ledger import Ledger
keeper._INTERVAL_S = 3600.0
ledger = Ledger()
ledger.set("distkd_train_step", 1)
exporter = Exporter(
    MetricsConfig(export="local"), Path({str(tmp_path)!r}), World(), ledger=ledger, labels={{"run": "r"}}, info={{}}
)
ledger.add("distkd_samples_total", 8)
exporter._keeper.refresh(240.0)
keeper.write_text = lambda *_: sys.stdin.read()  # a disk that never answers
ledger.add("distkd_samples_total", 8)
ledger.set("distkd_train_step", 2)
exporter._keeper.refresh()
print(exporter.address, flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", program]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment(), **pipes) as process:
        assert process.stdout is not None
        seen = scrape(process.stdout.readline().strip())
        process.send_signal(signal.SIGKILL)
    assert seen == {SAMPLES: 8, "gauge distkd_train_step": 2}  # gauges go on, counters wait for the disk
    ledger = Ledger()
    with _keeper(counters_file(tmp_path, 0), ledger) as keeper:
        assert _seen(keeper)[SAMPLES] == 8
        for total in (16, 24):  # the second eight are done again
            ledger.add("distkd_samples_total", 8)
            keeper.refresh()
            assert _seen(keeper)[SAMPLES] == total


def test_a_full_disk_is_said_once_and_counters_catch_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    path, ledger = counters_file(tmp_path, 0), Ledger()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with _keeper(path, ledger) as keeper:
        with monkeypatch.context() as patch:
            patch.setattr(keeping, "write_text", full)
            for step in range(1, 4):
                ledger.add("distkd_samples_total", 8)
                ledger.set("distkd_train_step", step)
                keeper.refresh()
                assert _seen(keeper) == {"gauge distkd_train_step": step}
        keeper.refresh()
        assert _seen(keeper) == {"gauge distkd_train_step": 3, SAMPLES: 24}
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} cannot be written, counters stand still until it can: No space left on device"
    ]


def test_a_disk_that_hangs_keeps_gauges_going_and_does_not_keep_a_run_from_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(keeping, "_LAST_PATIENCE_S", 0.01)
    answers, ledger = threading.Event(), Ledger()
    save = keeping.write_text

    def hangs(*arguments: Any) -> None:
        assert answers.wait(60)
        save(*arguments)

    with _keeper(counters_file(tmp_path, 0), ledger) as keeper:
        monkeypatch.setattr(keeping, "write_text", hangs)
        for step in range(1, 4):
            ledger.add("distkd_samples_total", 8)
            ledger.set("distkd_train_step", step)
            keeper.refresh(0.01)
            assert _seen(keeper) == {"gauge distkd_train_step": step}
        keeper.close()
        answers.set()
        keeper._disk._thread.join(60)  # it ends by itself when the disk answers
    assert _kept(counters_file(tmp_path, 0)) == {"distkd_samples_total": [[[], 8.0]]}


def test_an_attempt_that_was_overtaken_saves_nothing_more(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path, folder, ledgers = counters_file(tmp_path, 0), tmp_path / "textfile", [Ledger(), Ledger()]
    folder.mkdir()
    ledgers[0].add("distkd_samples_total", 100)
    textfiles = [Textfile(folder, World(), {"run": "r"}) for _ in ledgers]
    with (
        _keeper(path, ledgers[0], textfile=textfiles[0]) as overtaken,
        _keeper(path, ledgers[1], textfile=textfiles[1]) as current,
    ):
        for work, saved in ((0, 100), (500, 600)):
            ledgers[1].add("distkd_samples_total", work)
            current.refresh()
            texts = [file.read_text() for file in folder.iterdir()]
            for step in range(2):
                ledgers[0].add("distkd_samples_total", 1)
                ledgers[0].set("distkd_train_step", step)
                overtaken.refresh()
                assert _seen(overtaken) == {SAMPLES: 100, "gauge distkd_train_step": step}
            assert _kept(path) == {"distkd_samples_total": [[[], saved]]}
            assert [file.read_text() for file in folder.iterdir()] == texts
        _kill(current)
    with _keeper(path, Ledger()) as restarted:  # the overtaken one has closed, too
        assert _seen(restarted) == {SAMPLES: 600}
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} belongs to a later attempt of the run; this one's counters stand still"
    ]


def test_what_an_earlier_attempt_still_had_under_way_does_not_stop_a_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, ledger = counters_file(tmp_path, 0), Ledger()
    monkeypatch.setattr(keeping.time, "time_ns", lambda: 7)  # on a machine whose clock is behind
    with _keeper(path, Ledger()):
        late = path.read_text()
    with _keeper(path, ledger) as keeper:
        path.write_text(late)
        ledger.add("distkd_samples_total", 8)
        keeper.refresh()
        assert _seen(keeper) == {SAMPLES: 8}
        assert _kept(path) == {"distkd_samples_total": [[[], 8.0]]}


def test_a_mistake_in_saving_is_said_once_and_counters_catch_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def mistaken(*_: object) -> None:
        raise ZeroDivisionError("a mistake of ours")

    ledger = Ledger()
    with _keeper(counters_file(tmp_path, 0), ledger) as keeper:
        with monkeypatch.context() as patch:
            patch.setattr(keeping, "write_text", mistaken)
            for step in range(1, 4):
                ledger.add("distkd_samples_total", 8)
                ledger.set("distkd_train_step", step)
                keeper.refresh()
                assert _seen(keeper) == {"gauge distkd_train_step": step}
        keeper.refresh()
        assert _seen(keeper) == {"gauge distkd_train_step": 3, SAMPLES: 24}
    assert [record.getMessage() for record in caplog.records] == [
        "metrics cannot be saved: ZeroDivisionError: a mistake of ours"
    ]


@pytest.mark.parametrize("text", ["", '{"distkd_steps_to', "[]", '{"distkd_steps_total": [[[], -1]]}', "\udcff"])
def test_a_torn_file_is_said_and_counting_begins_at_zero(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture):
    path = counters_file(tmp_path, 0)
    path.parent.mkdir()
    path.write_bytes(text.encode(errors="surrogateescape"))
    ledger = Ledger()
    ledger.add("distkd_steps_total", 1)
    with _keeper(path, ledger) as keeper:
        assert _seen(keeper) == {"counter distkd_steps_total": 1}
    assert [record.getMessage().partition(": ")[0] for record in caplog.records] == [
        f"{path} cannot be read, counters begin at zero"
    ]
    assert _kept(path) == {"distkd_steps_total": [[[], 1.0]]}


def test_a_ledger_that_stands_still_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written: list[Path] = []
    save = keeping.write_text

    def counted(path: Path, text: str) -> None:
        written.append(path)
        save(path, text)

    monkeypatch.setattr(keeping, "write_text", counted)
    ledger = full_ledger()
    for _ in range(2):  # the second attempt has done nothing yet
        with _keeper(counters_file(tmp_path, 0), ledger) as keeper:
            for number in range(3):
                ledger.set("distkd_lr", number)
                keeper.refresh()
        ledger = Ledger()
    assert len(written) == 2  # each attempt says once that it has begun


def test_snapshots_are_made_without_being_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(keeping, "_INTERVAL_S", 0.001)
    ledger = Ledger()
    with _keeper(counters_file(tmp_path, 0), ledger) as keeper:
        for total in (8, 16):
            ledger.add("distkd_samples_total", 8)
            while _seen(keeper).get(SAMPLES) != total:
                pass


def test_many_ranks_save_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(keeping, "_INTERVAL_S", 2.0)
    for size, interval in ((1, 2.0), (200, 2.0), (1000, 10.0)):
        keeper = Keeper(Ledger(), counters_file(tmp_path, 0), World(size=size), info={})
        assert keeper._interval_s == interval
        keeper.close()


LABELS = {"run": "study/fold 1", "stage": "kd", "node": "n1", "slurm_job": "", "__meta_distkd_attempt": "1"}


def test_a_short_job_leaves_its_last_values_in_a_file_for_node_exporter(tmp_path: Path):
    folder, run = tmp_path / "textfile", tmp_path / "run"
    folder.mkdir()
    umask = os.umask(0o077)
    try:
        for attempt in (1, 2):
            ledger = Ledger()
            ledger.set("distkd_lr", attempt)
            textfile = Textfile(folder, World(), LABELS)
            with _keeper(counters_file(run, 0), ledger, textfile=textfile):
                ledger.add("distkd_samples_total", 8)
            [file] = folder.iterdir()
            assert file.name == "distkd-study%2Ffold%201.rank-00000.prom"
            assert stat.S_IMODE(file.stat().st_mode) == 0o644
            text = file.read_text()
            about = 'node="n1",rank="0",run="study/fold 1",stage="kd"'
            assert f"distkd_samples_total{{{about}}} {8.0 * attempt}\n" in text
            assert f"distkd_lr{{{about}}} {float(attempt)}\n" in text
            assert f'distkd_rank_info{{engine="ddp",{about}}} 1.0\n' in text
            assert "process_" not in text  # node_exporter has its own
            assert "attempt" not in text
    finally:
        os.umask(umask)


def test_files_of_ranks_that_are_elsewhere_now_are_removed_and_those_of_other_runs_are_not(tmp_path: Path):
    for run, ranks in (("a", 8), ("a/b", 1), ("ab", 1)):
        for rank in range(ranks):
            Textfile(tmp_path, World(rank, 8, 1, 8), {"run": run}).write(Ledger().snapshot())
    (tmp_path / "other.prom").touch()
    Textfile(tmp_path, World(rank=4, size=8, local_rank=0, local_size=2), {"run": "a"})
    assert {path.name for path in tmp_path.iterdir()} == {
        "other.prom", "distkd-ab.rank-00000.prom", "distkd-a%2Fb.rank-00000.prom",
        "distkd-a.rank-00004.prom", "distkd-a.rank-00005.prom",
    }  # fmt: skip


def test_a_folder_that_is_not_there_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    textfile = Textfile(tmp_path / "absent", World(), {"run": "r"})
    with _keeper(counters_file(tmp_path / "run", 0), Ledger(), textfile=textfile) as keeper:
        keeper.refresh()
    path = tmp_path / "absent" / "distkd-r.rank-00000.prom"
    assert [record.getMessage() for record in caplog.records] == [
        f"metrics.textfile: {path} cannot be written: No such file or directory"
    ]
    assert not path.parent.exists()
