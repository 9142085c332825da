"""What the queue says of this user's jobs. `squeue` alone: many sites keep no accounts that `sacct` could read."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["QueuedJob", "is_of_scripts", "max_task", "queued"]

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


def queued(ids: Sequence[str] | None = None) -> dict[str, QueuedJob] | None:
    """This user's jobs in the queue by id, one for each task of an array.

    Args:
        ids: only these; the id of an array means all of its tasks.

    Returns:
        None where there is no `squeue`, or the controller does not answer: then nothing is known.
    """
    # settings such as SQUEUE_STATES would hide jobs
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    command = ["squeue", "--noheader", "--me", "--array", "--format=%i|%T|%r|%L|%N"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=ANSWER_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode:
        return None
    jobs = [_read(line) for line in answer.stdout.splitlines() if line.count("|") == 4]
    return {job.job: job for job in jobs if ids is None or job.job in ids or job.job.partition("_")[0] in ids}


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
    try:
        answer = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=ANSWER_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if answer.returncode else answer.stdout


def _read(line: str) -> QueuedJob:
    job, state, reason, left, nodes = (word.strip() for word in line.split("|"))
    return QueuedJob(job, state, "" if reason == "None" else reason, _seconds(left), nodes)


def _seconds(text: str) -> int | None:
    """`1-02:03:04`, `2:03:04` or `3:04` as seconds; UNLIMITED, NOT_SET and INVALID are none."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
