"""`distkd status`: how far each run is, what its job does, and what to do where something is wrong.

Files and the queue are read, nothing is changed. A run says itself when it ends; of one that was killed only the
queue knows, or the machine that it ran on, or, without either, the age of its last line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from distkd.allocation import read_jobs
from distkd.metrics.targets import stale
from distkd.slurm.find import find
from distkd.slurm.judge import HELD, PENDING, Job, judge
from distkd.slurm.progress import Position, read_position
from distkd.slurm.queue import EndedJob, QueuedJob

__all__ = ["ACTIVE", "RUNNING", "Row", "look"]

RUNNING = ("running", "evaluating", "starting")
ACTIVE = (*RUNNING, "queued again", "queued", "waiting")
"""States that change without anybody's help."""
_LINGER_S = 120.0
"""Ranks of a run that has ended may wait for a last scrape, `metrics.linger_s`: 30 s where nobody asks for more."""


@dataclass(frozen=True, slots=True)
class Row:
    """What is shown of a run. Times are seconds of the epoch, ages and durations seconds; None: not known."""

    name: str
    folder: Path
    state: str
    """starting, running, evaluating (all steps are done), queued, queued again, waiting (for another run), done,
    interrupted, failed, cancelled, or lost: it has not said how it ended, and nothing goes on."""
    step: int | None = None
    total: int | None = None
    steps_per_s: float | None = None
    samples_per_s: float | None = None
    eta_s: float | None = None
    finish: float | None = None
    news_age_s: float | None = None
    ended: float | None = None
    metric: str | None = None
    value: float | None = None
    jobs: tuple[Job, ...] = ()
    """The one that the run is in or waits for first, then others that are in the queue."""
    advice: str = ""
    """What is wrong and what to do; empty where all is well."""
    stale_targets: int = 0
    """Files that tell Prometheus to ask ranks that are gone."""

    @property
    def is_active(self) -> bool:
        """Whether waiting for it makes sense."""
        alive = any(job.state for job in self.jobs[:1])
        return (alive or self.state in ACTIVE) and not any(job.reason in HELD for job in self.jobs[:1])

    def for_scripts(self) -> dict[str, Any]:
        return asdict(self) | {"folder": str(self.folder)}


def look(
    paths: Sequence[Path],
    queue: Mapping[str, QueuedJob] | None,
    now: float,
    *,
    ended: Callable[[Collection[str]], Mapping[str, EndedJob]] | None = None,
    warn: Callable[[str], None] | None = None,
) -> list[Row]:
    """A row for each run among and below `paths`: running ones first, then those that wait, then the newest ending.

    Args:
        queue: the user's jobs by id, asked before this call so that a run that ends meanwhile is not taken for lost;
            None where it cannot be asked.
        now: seconds of the epoch.
        ended: asked, once and only where it matters, how jobs ended that are no longer in the queue.
        warn: told of each path without a run; None: nobody is.

    Raises:
        DataError: there is no run at or below any of the paths.
    """
    seen = [
        _Seen(name, folder, _jobs(folder, queue), read_position(folder), _is_asked(folder, queue))
        for name, folder in find(paths, warn).items()
    ]
    gone = {job.job for run in seen if (job := run.gone) is not None}
    ends = ended(gone) if ended is not None and gone else {}
    rows = [_row(run, None if run.gone is None else ends.get(run.gone.job), queue, now) for run in seen]
    return sorted((_in_turn(row, rows) for row in rows), key=_order)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the files and the queue say of a run."""

    name: str
    folder: Path
    jobs: tuple[Job, ...]
    at: Position
    asked: bool
    """Whether a job that is not in the queue is known to be gone."""

    @property
    def gone(self) -> Job | None:
        """The newest job, where it is gone and the run does not say why."""
        job = self.jobs[0] if self.jobs else None
        if not self.asked or job is None or job.state or self.at.ending == "done":
            return None
        if self.at.job == job.job:
            return job if self.at.ending is None else None
        # since then the run may have been started outside of SLURM
        return job if self.at.started is None or job.noted > self.at.started else None


def _is_asked(folder: Path, queue: Mapping[str, QueuedJob] | None) -> bool:
    try:
        return queue is not None and folder.stat().st_uid == os.getuid()  # it was asked for this user's jobs only
    except FileNotFoundError:  # it has just been removed
        return False


def _row(run: _Seen, end: EndedJob | None, queue: Mapping[str, QueuedJob] | None, now: float) -> Row:
    name, folder, jobs, at, asked = run.name, run.folder, run.jobs, run.at, run.asked
    state, advice = judge(at, jobs[0] if jobs else None, end, asked=asked, now=now)
    running = [job.job for job in queue.values() if job.state not in PENDING] if queue is not None and asked else None
    rate = at.rate if state == "running" else None
    age_s = None if at.news is None else max(0.0, now - at.news)
    eta_s = None
    if rate is not None and at.step is not None and at.total is not None and age_s is not None and not advice:
        eta_s = max(0.0, (at.total - at.step) / rate.steps_per_s - age_s)
    return Row(
        name=name,
        folder=folder,
        state=state,
        step=at.step,
        total=at.step if state == "done" and at.total is None else at.total,
        steps_per_s=None if rate is None else rate.steps_per_s,
        samples_per_s=None if rate is None else rate.samples_per_s,
        eta_s=eta_s,
        finish=None if eta_s is None else now + eta_s,
        news_age_s=age_s,
        ended=at.ended,
        metric=at.metric,
        value=at.value,
        jobs=tuple(job for job in jobs if job.state) if state == "done" else jobs,
        advice=advice,
        stale_targets=_stale_targets(run, state, running, now),
    )


def _jobs(folder: Path, queue: Mapping[str, QueuedJob] | None) -> tuple[Job, ...]:
    """The newest job that is in the queue, otherwise the newest; then the others of the queue."""
    known: dict[str, Job] = {}
    for line in read_jobs(folder):
        name = str(line.get("job", ""))
        job = known.pop(name, Job(name))
        if line.get("event") == "started":
            job = replace(job, restarts=int(line.get("restart") or 0))
        else:
            job = replace(job, after=tuple(map(str, line.get("after") or ())), log=str(line.get("log") or ""))
        time = line.get("time")
        known[name] = replace(job, noted=time) if isinstance(time, (int, float)) else job
    newest_first = list(reversed(known.values()))
    waiting = [_asked(job, queue[job.job]) for job in newest_first if queue is not None and job.job in queue]
    return tuple(waiting or newest_first[:1])


def _asked(job: Job, found: QueuedJob) -> Job:
    return replace(job, state=found.state, reason=found.reason, time_left_s=found.time_left_s, nodes=found.nodes)


def _in_turn(row: Row, rows: Sequence[Row]) -> Row:
    """A stage that has not begun although its job runs: it waits for the one that is on its way there."""
    if row.state != "starting" or row.step is not None:
        return row
    busy = any(
        other is not row and other.state in ("running", "evaluating") and _same_job(row, other) for other in rows
    )
    return replace(row, state="waiting") if busy else row


def _same_job(one: Row, other: Row) -> bool:
    return bool(one.jobs and other.jobs) and one.jobs[0].job == other.jobs[0].job


def _stale_targets(run: _Seen, state: str, running: Collection[str] | None, now: float) -> int:
    """How many ranks Prometheus still asks although nobody answers; a start of the run clears them, too."""
    if state in RUNNING:
        return 0
    lingers = run.at.ended is not None and now - run.at.ended <= _LINGER_S
    return len(stale(run.folder, ended=state not in ACTIVE and not lingers, running_jobs=running))


def _order(row: Row) -> tuple[Any, ...]:
    if row.state in ACTIVE:
        numbers = [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", row.name)]
        return (int(row.state not in RUNNING), 0.0, numbers)
    return (2, -(row.ended or 0.0), [])
