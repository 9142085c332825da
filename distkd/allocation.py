"""What SLURM says of this process, and the jobs that a run has had: `jobs.jsonl` in its folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distkd.files import add_event

__all__ = ["Allocation", "note_job", "read_jobs"]


@dataclass(frozen=True, slots=True)
class Allocation:
    """The job that this process belongs to."""

    job: str
    """Its id as people see it: `17`, or `17_3` for task 3 of an array."""
    restart: int
    """How often it has been requeued."""
    nodes: str
    """Its nodes as SLURM writes them, for example `n[1-2]`."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Allocation | None:
        """None outside of a job."""
        job = environ.get("SLURM_JOB_ID")
        if job is None:
            return None
        array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
        return cls(
            job=f"{array}_{task}" if array and task else job,
            restart=int(environ.get("SLURM_RESTART_COUNT", "0")),  # unset in the first run
            nodes=environ.get("SLURM_JOB_NODELIST", ""),
        )


def note_job(folder: Path, event: str, **values: Any) -> None:
    """One line more in `jobs.jsonl` of a run folder; a disk that does not take it is no reason to stop."""
    add_event(folder / "jobs.jsonl", event, **values)


def read_jobs(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of `jobs.jsonl`, oldest first; none where there is no such file."""
    try:
        lines = (folder / "jobs.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    found: list[dict[str, Any]] = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:  # a line that is being written, or was torn by a kill
            continue
    return found
