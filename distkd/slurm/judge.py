"""What a run does, and what its user should do, from what its files and SLURM say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distkd.slurm.find import shown
from distkd.slurm.progress import Position
from distkd.slurm.queue import EndedJob

__all__ = ["HELD", "PENDING", "Job", "duration", "how_it_ended", "judge"]

_QUIET_S = 300.0
"""No news for so long is worth a word, and for ten times as long as lines were apart before."""
_FIRST_NEWS_S = 900.0
"""The first line and the final evaluation may take longer: packages, the first compilation, every sample once."""

PENDING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
HELD = {
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
        return self.state in PENDING


def judge(at: Position, job: Job | None, end: EndedJob | None, *, asked: bool, now: float) -> tuple[str, str]:
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
    # of a job that nobody can ask about SLURM may have started the next attempt, or be about to
    if at.is_gone and (asked or (job is None and at.job is None)):
        return "lost", "its processes on this machine ended without a word; start it again to resume"
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
    advice = HELD[job.reason].format(job=job.job, after=after) if job.reason in HELD else ""
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
