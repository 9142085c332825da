"""`distkd status`: how far each run is, what its job does, and what to do where something is wrong.

Files and the queue are read, nothing is changed. A run says itself when it ends; of one that was killed only the
queue knows, or, without a queue, the age of its last line.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from distkd.allocation import read_jobs
from distkd.errors import DataError
from distkd.metrics.targets import stale
from distkd.slurm.progress import Position, read_position
from distkd.slurm.queue import EndedJob, QueuedJob

__all__ = ["ACTIVE", "RUNNING", "Job", "Row", "duration", "find", "how_it_ended", "look", "shown"]

RUNNING = ("running", "evaluating", "starting")
ACTIVE = (*RUNNING, "queued again", "queued", "waiting")
"""States that change without anybody's help."""

_MAX_DEPTH = 4
_NO_RUNS = re.compile(r"\.|submitted-|notes\.|logs\.|(checkpoints|events|export|prometheus|__pycache__)$")
"""Folders that are not looked into: a submission's has copies of configs, which are no runs."""
_LOG = re.compile(r"-(\d+(?:_\d+)?)\.out$")
"""Name of a job's log; the job's folder lies beside it and goes by the id."""
_OF_JOB = re.compile(r"(stop|notes|logs)\.\d+$")
"""What a job's folder holds: a folder of logs for each attempt, node and rank, and no run."""
_QUIET_S = 300.0
"""No news for so long is worth a word, and for ten times as long as lines were apart before."""
_FIRST_NEWS_S = 900.0
"""The first line and the final evaluation may take longer: packages, the first compilation, every sample once."""

_PENDING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
_HELD = {
    "JobHeldUser": "the job is held: scontrol release {job}",
    "JobHeldAdmin": "SLURM holds the job (scontrol show job {job} says why): scontrol release {job}",
    "PartitionTimeLimit": "it asks for more time than the partition gives: scontrol update job {job} TimeLimit=..",
    "BadConstraints": "no node has what it asks for: scancel {job}, mend site.env, submit again",
    "DependencyNeverSatisfied": "what it waits for will not come{after}: scancel {job}, mend that, submit again",
}
"""Reasons for which a job waits for ever, and the way out."""


@dataclass(frozen=True, slots=True)
class Job:
    """A job of a run; `state` is empty where it is not in the queue, or nobody can ask."""

    job: str
    state: str = ""
    reason: str = ""
    time_left_s: int | None = None
    nodes: str = ""
    restarts: int = 0
    after: tuple[str, ...] = ()
    log: str = ""
    noted: float = 0.0
    """When the run's folder last had a word of it; seconds of the epoch."""

    @property
    def pends(self) -> bool:
        return self.state in _PENDING


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
        return (alive or self.state in ACTIVE) and not any(job.reason in _HELD for job in self.jobs[:1])

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


def find(paths: Sequence[Path], warn: Callable[[str], None] | None = None) -> dict[str, Path]:
    """The run folders among and below `paths` by name, submitted ones that have not begun included.

    Below a single path names are relative to it, otherwise to the current folder.

    Args:
        warn: told of each path without a run; None: nobody is.

    Raises:
        DataError: there is no run at or below any of the paths.
    """
    found: dict[Path, str] = {}
    wrong: list[str] = []
    for path in paths:
        below = _runs_below(path, _MAX_DEPTH)
        if not path.is_dir():
            state = "is a file, not a folder" if path.exists() else "does not exist"
            wrong.append(f"{path} {state}; name a run folder, or a folder of run folders such as runs/")
        elif not below:
            wrong.append(f"no run found at or below {path}; `distkd submit` and `distkd train CONFIG` make one")
        for folder in below:
            short = folder.name if folder == path else str(folder.relative_to(path))
            found.setdefault(folder.resolve(), short if len(paths) == 1 else _from_here(folder.resolve()))
    if not found:
        raise DataError("\n".join(wrong))
    if warn is not None:
        for line in wrong:
            warn(line)
    names = list(found.values())
    return {name if names.count(name) == 1 else str(folder): folder for folder, name in found.items()}


def shown(path: Path) -> str:
    """As it is typed in the current folder."""
    return shlex.quote(_from_here(path))


def _from_here(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path != here and path.is_relative_to(here) else str(path)


def _runs_below(folder: Path, depth: int) -> list[Path]:
    try:
        with os.scandir(folder) as found:
            entries = {entry.name: entry for entry in found}
    except (PermissionError, FileNotFoundError, NotADirectoryError):  # somebody else's, or it has just been removed
        return []
    if "config.yaml" in entries or "jobs.jsonl" in entries:
        return [folder]
    if depth == 0 or any(map(_OF_JOB.match, entries)):
        return []
    jobs = {log[1] for log in map(_LOG.search, entries) if log is not None}
    inside = [name for name in sorted(entries.keys() - jobs) if not _NO_RUNS.match(name) and entries[name].is_dir()]
    return [run for name in inside for run in _runs_below(folder / name, depth - 1)]


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
    state, advice = _judge(at, jobs[0] if jobs else None, end, asked=asked, now=now)
    running = [job.job for job in queue.values() if job.state not in _PENDING] if queue is not None and asked else None
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
        stale_targets=_stale_targets(folder, state, running),
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


def _judge(at: Position, job: Job | None, end: EndedJob | None, *, asked: bool, now: float) -> tuple[str, str]:
    """State and advice.

    Args:
        end: how the job ended, where the run does not say it and SLURM does.
        asked: whether a job that is not in the queue is known to be gone.
    """
    if at.ending == "done":
        return "done", ""
    if job is not None and job.pends:
        return _pending(at, job)
    if job is not None and job.state:
        if at.job != job.job or at.ending == "interrupted" or _starts_again(job):
            return "starting", ""
        if at.ending == "failed":
            return "failed", _failure(at)
        return _going(at, job, now)
    if job is not None and end is not None:
        return _as_ended(at, job, end)
    if at.ending == "failed":
        return "failed", _failure(at)
    if at.ending == "interrupted":
        return "interrupted", "the same command, or `distkd submit`, goes on from its checkpoint"
    if at.started is None and job is not None:
        if not asked:
            return "queued", ""
        return "lost", f"job {job.job} left the queue before the run began{_see(job)}; submit again"
    if asked and at.job is not None:
        see = _see(job) if job is not None else ""
        return "lost", f"job {at.job} is gone and the run has not said how it ended{see}; submit again to resume"
    state, advice = _going(at, None, now)
    return ("lost", f"{advice}; if it no longer runs, start it again to resume") if advice else (state, "")


def _as_ended(at: Position, job: Job, end: EndedJob) -> tuple[str, str]:
    """Of a run whose job ended before it began, or without a word of the run's."""
    begun = at.job == job.job
    when = "" if begun else " before the run began"
    again = "submit again to resume" if begun or at.started is not None else "submit again"
    if end.state == "CANCELLED" and end.reason == "DependencyNeverSatisfied":
        after = f" (job {', '.join(job.after)})" if job.after else ""
        return "cancelled", f"what job {job.job} waited for did not come{after}: mend that, {again}"
    see = _see(job)
    if end.state == "CANCELLED":
        return "cancelled", f"job {job.job} was cancelled{when}{see}; {again}"
    see = see or f", see scontrol show job {job.job}"
    return "failed", f"job {job.job} {how_it_ended(end)}{when}{see}; mend it and {again}"


def how_it_ended(end: EndedJob) -> str:
    """`ended with exit code 2`, `was cancelled`, `ended: out of memory`."""
    if end.state == "CANCELLED":
        return "was cancelled"
    if end.state == "FAILED" and end.code:
        return f"ended with exit code {end.code}"
    return f"ended: {end.state.lower().replace('_', ' ')}"


def _starts_again(job: Job) -> bool:
    """Whether the job has begun a later attempt than the one that the run speaks of."""
    return bool(job.log) and (Path(job.log).parent / job.job / f"stop.{job.restarts + 1}").exists()


def _pending(at: Position, job: Job) -> tuple[str, str]:
    after = f" (job {', '.join(job.after)})" if job.after else ""
    advice = _HELD[job.reason].format(job=job.job, after=after) if job.reason in _HELD else ""
    if at.started is not None:
        return "queued again", advice
    return "waiting" if job.reason.startswith("Dependency") else "queued", advice


def _going(at: Position, job: Job | None, now: float) -> tuple[str, str]:
    """Of a run that has begun and not said that it ended: what it does, and a word when it has been silent for long."""
    is_last = at.step is not None and at.total is not None and at.step >= at.total
    age_s = 0.0 if at.news is None else now - at.news
    patience_s = _FIRST_NEWS_S if is_last or at.rate is None else _QUIET_S
    if at.rate is not None:
        patience_s = max(patience_s, 10 * at.rate.gap_s)
    state = "evaluating" if is_last else "running"
    if age_s <= patience_s:
        return state, ""
    before = f", lines came every {duration(at.rate.gap_s)} or sooner before" if at.rate is not None else ""
    return state, f"no news for {duration(age_s)}{before}{_see(job) if job is not None else ''}"


def _failure(at: Position) -> str:
    message = " ".join(str(at.outcome.get("message") or "").split())
    kind = at.outcome.get("kind")
    return message or f"it ended with an error of kind {kind}; see its log"


def _see(job: Job) -> str:
    return f", see {shown(Path(job.log))}" if job.log and Path(job.log).is_file() else ""


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


def _stale_targets(folder: Path, state: str, running: Collection[str] | None) -> int:
    """How many ranks Prometheus still asks although nobody answers; a start of the run clears them, too."""
    if state in RUNNING:
        return 0
    return len(stale(folder, ended=state not in ACTIVE, running_jobs=running))


def _order(row: Row) -> tuple[Any, ...]:
    if row.state in ACTIVE:
        numbers = [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", row.name)]
        return (int(row.state not in RUNNING), 0.0, numbers)
    return (2, -(row.ended or 0.0), [])


def duration(seconds: float) -> str:
    """`12 s`, `12 min`, `3 h 20 min`, `2 d 4 h`."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"
