"""Which run is shown, and what is known of it and of the others: everything that reads files or asks the queue."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distkd.slurm.queue import QueuedJob, ended, queued
from distkd.slurm.status import RUNNING, Row, look
from distkd.top.facts import Facts
from distkd.top.read import Reader
from distkd.top.wrong import is_silent, wrong

__all__ = ["Glance", "Looker", "for_scripts"]

_ALL_S = 10.0
_SHARE = 20.0
"""All runs are looked at, and the queue is asked, this seldom: at most a twentieth of the time goes into it."""


@dataclass(frozen=True, slots=True)
class Glance:
    """What was found at one moment."""

    facts: Facts
    others: Sequence[Row]
    is_active: bool
    """Whether any of the runs goes on or waits; otherwise nothing will change."""


class Looker:
    """Looks at the runs below some paths; the one that is shown is read each time, the others now and then.

    Raises:
        DataError: from `look`: there is no run at or below any of the paths.
    """

    def __init__(self, paths: Sequence[Path], clock: Callable[[], float] = time.time):
        self.paths, self.clock = paths, clock
        self.chosen: Path | None = None
        """Folder of the run that the user wants to see; None: the newest one that runs."""
        self._rows: list[Row] = []
        self._queue: Mapping[str, QueuedJob] | None = None
        self._due = 0.0
        self._readers: dict[Path, Reader] = {}

    def look(self) -> Glance:
        """Read the files."""
        if self.clock() >= self._due:
            self._look_at_all()
        row = self._shown()
        [again] = look([row.folder], self._queue, self.clock())
        if (again.state, again.is_active) != (row.state, row.is_active):  # the queue is to be asked before that is said
            self._look_at_all()
            row = self._shown()
        else:
            row = replace(again, name=row.name)
        others = [other for other in self._rows if other.folder != row.folder]
        is_active = row.is_active or any(other.is_active for other in others)
        return Glance(self._facts(row), others, is_active)

    def everything(self) -> list[Facts]:
        """All runs in full, as `distkd status` orders them."""
        self._look_at_all()
        return [self._facts(row) for row in self._rows]

    def choose(self, by: int) -> None:
        """Show the run that stands `by` places below the present one."""
        if self._rows:
            names = sorted(self._rows, key=lambda row: row.name)
            at = names.index(self._shown())
            self.chosen = names[(at + by) % len(names)].folder

    def _look_at_all(self) -> None:
        begun = time.monotonic()
        self._queue = queued()
        self._rows = look(self.paths, self._queue, self.clock(), ended=ended)
        self._due = self.clock() + max(_ALL_S, _SHARE * (time.monotonic() - begun))

    def _shown(self) -> Row:
        chosen = next((row for row in self._rows if row.folder == self.chosen), None)
        if chosen is not None:
            return chosen
        running = [row for row in self._rows if row.state in RUNNING]
        if not running:
            return self._rows[0]  # what waits, otherwise what ended last
        return min(running, key=lambda row: (row.news_age_s is None, row.news_age_s or 0.0))

    def _facts(self, row: Row) -> Facts:
        return self._readers.setdefault(row.folder, Reader(row.folder)).read(row, self.clock())


def for_scripts(facts: Facts) -> dict[str, Any]:
    """An object as JSON has it; names as in metrics.jsonl, units at the end of names."""
    line, at, ranks = facts.line, facts.checkpoint, facts.ranks
    return {
        **facts.row.for_scripts(),
        **(dict.fromkeys(("eta_s", "finish")) if is_silent(facts) else {}),
        "method": facts.setting("method", "name"),
        "attempt": facts.attempt,
        "world_size": facts.world_size,
        "device": facts.device,
        "nodes": facts.nodes,
        "epoch": line.get("epoch"),
        "samples_per_s_now": facts.samples_per_s,
        "samples_per_s_attempt": facts.samples_per_s_overall,
        "step_s": facts.step_s,
        "phases_s": facts.phases_s,
        **{name: line.get(name) for name in ("loss", "parts", "gauges", "lr", "grad_norm")},
        **{name: line.get(name, 0) if line else None for name in ("skipped", "replaced")},
        "val": facts.vals[-1]["val"] if facts.vals else None,
        "best": None if facts.best is None else {"step": facts.best[0], "value": facts.best[1]},
        "checkpoint": None if at is None else {"step": at.step, "age_s": facts.now - at.time, "seconds": at.seconds},
        "ranks": None if ranks is None else {
            "step": ranks.step,
            "time": ranks.time,
            "ranks": [
                {
                    "rank": rank.rank,
                    "straggler_index": rank.straggler_index,
                    "phases": rank.phases,
                    "queue": rank.queue,
                    "gpu_memory_bytes": rank.gpu_memory_bytes,
                }
                for rank in ranks.ranks
            ],
        },
        "wrong": wrong(facts),
    }  # fmt: skip
