"""What the queue says of this user's jobs. `squeue` alone: many sites keep no accounts that `sacct` could read."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass

__all__ = ["EndedJob", "QueuedJob", "ended", "is_of_scripts", "max_task", "queued"]

_UNLIMITED_S = 180 * 86400
"""Where a partition has no limit, SLURM gives a job a year."""

_WENT_WRONG = {"BOOT_FAIL", "CANCELLED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"}

ANSWER_S = 30.0
"""How long the controller may take; SLURM's own time-out of a message is 10 s, and squeue tries again."""


@dataclass(frozen=True, slots=True)
class QueuedJob:
    """A job that waits, runs or ends just now."""

    job: str
    """Its id as people see it: `17`, or `17_3` for task 3 of an array."""
    state: str
    """SLURM's word: PENDING, RUNNING, COMPLETING, SUSPENDED, ..."""
    reason: str
    """Why it waits, for example Priority or Dependency; empty where SLURM has none to say."""
    time_left_s: int | None
    """Seconds until the time limit; None where there is no limit."""
    nodes: str
    """As SLURM writes them, for example `n[1-2]`; empty while it waits."""


@dataclass(frozen=True, slots=True)
class EndedJob:
    """A job that ended without being through."""

    job: str
    """Its id as people see it."""
    state: str
    """SLURM's word: FAILED, CANCELLED, TIMEOUT, OUT_OF_MEMORY, ..."""
    reason: str
    """For example NonZeroExitCode or DependencyNeverSatisfied; empty where SLURM has none to say."""
    code: int
    """Exit code of its script; 0 where a signal ended it, or it has not run."""


def queued(ids: Sequence[str] | None = None) -> dict[str, QueuedJob] | None:
    """This user's jobs in the queue by id, one for each task of an array.

    Args:
        ids: only these; the id of an array means all of its tasks.

    Returns:
        None where there is no `squeue`, or the controller does not answer: then nothing is known.
    """
    answer = _asked("squeue", "--noheader", "--me", "--array", "--format=%i|%T|%r|%L|%N")
    if answer is None:
        return None
    jobs = [_read(line) for line in answer.splitlines() if line.count("|") == 4]
    return {job.job: job for job in jobs if ids is None or job.job in ids or job.job.partition("_")[0] in ids}


def ended(ids: Collection[str]) -> dict[str, EndedJob]:
    """Those of these jobs, by id, that ended without being through and that the controller still remembers.

    It does so without accounts, for the `MinJobAge` of the cluster: five minutes unless the site says otherwise.
    """
    fields = "JobArrayID:64,State:32,exit_code:16,Reason:64"
    answer = _asked("squeue", "--noheader", "--me", "--array", "--states=all", f"--Format={fields}") or ""
    lines = [line.split() for line in answer.splitlines()]
    found = [
        EndedJob(words[0], words[1], "" if words[3] == "None" else words[3], _exit_code(words[2]))
        for words in lines
        if len(words) >= 4 and words[0] in ids and words[1] in _WENT_WRONG
    ]
    return {job.job: job for job in found}


def is_of_scripts(job: str) -> bool:
    """Whether a job of the queue runs a script of `slurm/`, and is no session in which people try things."""
    answer = _asked("scontrol", "show", "job", job)
    found = re.search(r"^\s*Command=.*/slurm/\w+\.sbatch(\s|$)", answer or "", re.MULTILINE)
    return found is not None


def max_task() -> int | None:
    """The largest id that a task of an array may have here; None where it is not known."""
    answer = _asked("scontrol", "show", "config")
    found = None if answer is None else re.search(r"^MaxArraySize\s*=\s*(\d+)", answer, re.MULTILINE)
    return None if found is None else int(found[1]) - 1


def _asked(*command: str) -> str | None:
    """What a command of SLURM's says; None where there is no such command or no answer."""
    # settings such as SQUEUE_STATES would hide jobs
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    try:
        answer = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", env=environment,
            timeout=ANSWER_S,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if answer.returncode else answer.stdout


def _read(line: str) -> QueuedJob:
    job, state, reason, left, nodes = (word.strip() for word in line.split("|"))
    seconds = _seconds(left)
    if seconds is not None and seconds > _UNLIMITED_S:
        seconds = None
    return QueuedJob(job, state, "" if reason == "None" else reason, seconds, nodes)


def _exit_code(text: str) -> int:
    """`512`, as of wait(2), and `2:0` are both code 2."""
    code, colon, _ = text.partition(":")
    if not code.isdigit():
        return 0
    return int(code) if colon else int(code) >> 8 & 255


def _seconds(text: str) -> int | None:
    """`1-02:03:04`, `2:03:04` or `3:04` as seconds; UNLIMITED, NOT_SET and INVALID are none."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
