"""Every few seconds: what a rank's ledger says, saved, and only then served.

A server takes a counter that falls for one that began at zero again, and shows a burst that never was. So a restart may
never begin below what anybody has seen: counters are served as they lie on disk. Where the disk takes nothing, gauges
go on and counters stand still, which shows as a rate of zero, and catch up later.

An attempt that was overtaken may live on for a while. The file says when its attempt began, and no attempt replaces
the file of a later one.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from distkd.files import read_json, write_text
from distkd.metrics.exposition import Page, Renderer, process_registry
from distkd.metrics.ledger import Ledger, Series, Snapshot
from distkd.metrics.table import Metric
from distkd.world import World

__all__ = ["Keeper", "Textfile", "counters_file"]

log = logging.getLogger(__name__)

_INTERVAL_S = 2.0
"""Between two snapshots; scrapes see nothing newer, and cost a step nothing more."""
_SAVES_PER_S = 100
"""Of all ranks together: a shared file system makes a file for each."""
_PATIENCE_S = 1.0
"""How long a snapshot waits for the disk before its gauges are served without its counters."""
_LAST_PATIENCE_S = 2.0
"""How long the end waits for the disk, a snapshot that is under way included."""
_BEGUN = "begun"
"""Key of the file beside its counters: nanoseconds since 1970, and above those of all attempts before."""


def counters_file(run: Path, rank: int) -> Path:
    """Where a rank's counters outlive it. Not `*.json`, the glob by which Prometheus may look into the folder."""
    return run / "prometheus" / f"rank-{rank:05d}.counters"


class Keeper:
    """Restores a rank's counters, and from then on saves and publishes snapshots on a thread of its own.

    Args:
        ledger: written by another thread, with which this one shares no lock.
        path: file of the counters.
        world: with many ranks each saves less often.
        info: label values of `distkd_rank_info`.
        textfile: also gets each snapshot.
    """

    def __init__(
        self,
        ledger: Ledger,
        path: Path,
        world: World,
        *,
        info: Mapping[str, str],
        textfile: Textfile | None = None,
    ):
        self._ledger, self._path, self._textfile = ledger, path, textfile
        about = Metric("distkd_rank_info", "gauge", "rank", "What this rank runs on.", tuple(info))
        self._about: tuple[Metric, Series] = about, {tuple(info.values()): 1.0}
        self._renderer, self._process = Renderer(), process_registry()
        self._disk = _Disk()
        self._turn = threading.Lock()
        self._warned = False
        self._begun, self._overtaken = time.time_ns(), False
        self._on_disk: dict[str, Any] | None = None  # by this attempt: its first file says that it has begun
        self._saved = Snapshot()
        self._stop = threading.Event()
        self._interval_s = max(_INTERVAL_S, world.size / _SAVES_PER_S)
        self.page: Page
        """What scrapes are answered with."""
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        try:
            self._restore()
            self.refresh()
            self._thread.start()
        except BaseException:
            self._stop.set()
            self._disk.close()
            raise

    def refresh(self, patience_s: float = _PATIENCE_S) -> None:
        """Make a snapshot now; it is served when this returns, without its counters where the disk is slow."""
        end = time.monotonic() + patience_s
        with self._turn:
            snapshot = self._ledger.snapshot()
            self._disk.do(lambda: self._save(snapshot), end)
            saved = self._saved  # perhaps an earlier one
            served = snapshot if saved is snapshot else snapshot.with_counters_of(saved)
            served = Snapshot((*served.series, self._about))
            self.page = Page(served, self._renderer, self._process)
            if (textfile := self._textfile) is not None and not self._overtaken:
                self._disk.do(lambda: textfile.write(served), end)

    def close(self) -> None:
        """One last snapshot; a disk that hangs is left to itself. A second time does nothing."""
        if self._stop.is_set():
            return
        self._stop.set()
        end = time.monotonic() + _LAST_PATIENCE_S
        try:
            self._thread.join()
            self.refresh(end - time.monotonic())
        finally:
            self._disk.close()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.refresh()

    def _restore(self) -> None:
        """Counters of earlier attempts go into the ledger."""
        before = Ledger()
        try:
            kept: dict[str, Any] = read_json(self._path)
            before.restore(kept)
            begun = int(kept.get(_BEGUN, 0))
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            # a server takes that for what it is, counters that begin again
            log.warning("%s cannot be read, counters begin at zero: %s", self._path, error)
            return
        self._ledger.restore(kept)
        self._begun = max(self._begun, begun + 1)  # whatever another machine's clock said
        self._saved = before.snapshot()

    def _save(self, snapshot: Snapshot) -> None:
        if self._overtaken:
            return
        counters = snapshot.counters()
        try:
            if counters != self._on_disk:
                if self._begun_on_disk() > self._begun:
                    self._overtaken = True
                    log.warning("%s belongs to a later attempt of the run; this one's counters stand still", self._path)
                    return
                # without indent, which would take the slow encoder and with it time from the trainer
                write_text(self._path, json.dumps({_BEGUN: self._begun, **counters}, allow_nan=False) + "\n")
        except (OSError, ValueError, TypeError) as error:  # the last two: a value that is no number
            if not self._warned:
                self._warned = True
                reason = getattr(error, "strerror", None) or error
                log.warning("%s cannot be written, counters stand still until it can: %s", self._path, reason)
            return
        self._on_disk, self._saved = counters, snapshot

    def _begun_on_disk(self) -> int:
        """When the attempt began that has written the file; 0 where nobody has."""
        try:
            return int(read_json(self._path)[_BEGUN])
        except (FileNotFoundError, ValueError, TypeError, LookupError, OverflowError):  # the others: it is torn
            return 0


class Textfile:
    """A rank's values in a folder that node_exporter reads; kept when the run ends, replaced by its next attempt.

    Args:
        folder: of this machine; it exists.
        world: this rank.
        labels: of all series, since no target adds them.
    """

    def __init__(self, folder: Path, world: World, labels: Mapping[str, str]):
        shown = {name: value for name, value in labels.items() if value and not name.startswith("__")}
        self._renderer = Renderer({**shown, "rank": str(world.rank)})
        self._start = f"distkd-{quote(labels.get('run', ''), safe='')}.rank-"
        self._path = folder / f"{self._start}{world.rank:05d}.prom"
        self._warned = False
        if world.local_rank == 0:
            self._clear(world)

    def write(self, snapshot: Snapshot) -> None:
        """Replace the file; a folder that does not take it is said once."""
        # none of the library's process_*: node_exporter has these of its own
        content = Page(snapshot, self._renderer).body()
        aside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            with aside.open("wb") as file:
                os.fchmod(file.fileno(), 0o644)  # whatever the umask: node_exporter is another user
                file.write(content)
            aside.replace(self._path)
        except OSError as error:
            with suppress(OSError):
                aside.unlink()
            if not self._warned:
                self._warned = True
                log.error("metrics.textfile: %s cannot be written: %s", self._path, error.strerror)

    def _clear(self, world: World) -> None:
        """Remove what an earlier attempt has left of ranks that are elsewhere now, or no more."""
        first = world.rank - world.local_rank
        here = {f"{self._start}{rank:05d}.prom" for rank in range(first, first + world.local_size)}
        try:
            for path in sorted(self._path.parent.iterdir()):
                if path.name.startswith(self._start) and path.suffix == ".prom" and path.name not in here:
                    path.unlink(missing_ok=True)
        except OSError as error:
            log.debug("metrics.textfile: cannot clear %s: %s", self._path.parent, error)


class _Disk:
    """Does one thing at a time on a thread of its own, so that a disk that hangs holds up nobody else."""

    def __init__(self) -> None:
        self._news = threading.Condition()
        self._work: Callable[[], None] | None = None
        self._closed = self._failed = False
        self._thread = threading.Thread(target=self._run, name="metrics-disk", daemon=True)
        self._thread.start()

    def do(self, work: Callable[[], None], end: float) -> None:
        """Do it, and wait for that until `end` of the monotonic clock; left out where earlier work hangs till then."""
        with self._news:
            if self._news.wait_for(lambda: self._work is None, end - time.monotonic()):
                self._work = work
                self._news.notify_all()
                self._news.wait_for(lambda: self._work is None, end - time.monotonic())

    def close(self) -> None:
        with self._news:
            self._closed = True
            self._news.notify_all()
            idle = self._work is None
        if idle:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._work is not None or self._closed)
                work = self._work
            if work is None:
                return
            try:
                work()
            except Exception as error:  # without this thread counters would stand still for good
                if not self._failed:
                    self._failed = True
                    log.error("metrics cannot be saved: %s: %s", type(error).__name__, error, exc_info=True)
            finally:
                with self._news:
                    self._work = None
                    self._news.notify_all()
