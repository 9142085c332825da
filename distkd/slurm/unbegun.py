"""Jobs by hand that ended before there was a run: only a job's own folder knows of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from distkd.allocation import read_jobs
from distkd.slurm.find import shown
from distkd.slurm.judge import how_it_ended
from distkd.slurm.queue import QueuedJob, ended
from distkd.slurm.requeue import read_past

__all__ = ["unbegun"]

_MOST = 5
_RECENT_S = 2 * 86400.0
"""Nobody wants to be told for ever."""


def unbegun(
    paths: Sequence[Path], runs: Sequence[Path], queue: Mapping[str, QueuedJob] | None, now: float
) -> list[str]:
    """A line for each of the newest jobs below `paths` that is over and has begun no run.

    Args:
        runs: folders of runs, whose own rows tell of their jobs.
        queue: the user's jobs by id; None where it cannot be asked: then nothing is known.
        now: seconds of the epoch.
    """
    if queue is None:
        return []
    changed = {folder: when for path in paths for folder, when in _jobs_of(path).items()}
    recent = [folder for folder, when in changed.items() if now - when < _RECENT_S]
    if not recent:
        return []
    known = {str(line.get("job")) for run in runs for line in read_jobs(run)}
    silent = [folder for folder in recent if folder.name not in known | queue.keys() and not _has_run(folder)]
    newest = sorted(silent, key=lambda folder: changed[folder], reverse=True)[:_MOST]
    ends = ended({folder.name for folder in newest}) if newest else {}
    how = {job: how_it_ended(end) for job, end in ends.items()}
    return [
        f"job {folder.name} {how.get(folder.name, 'ended')} before its run began, see {shown(_log(folder))}"
        for folder in newest
    ]


def _jobs_of(root: Path) -> dict[Path, float]:
    """Folders of jobs, and the times of their last change."""
    found: dict[Path, float] = {}
    for stop in root.glob("slurm/*/stop.*"):
        if re.fullmatch(r"\d+(_\d+)?", stop.parent.name):
            with suppress(FileNotFoundError):  # it has just been removed
                found[stop.parent] = stop.parent.stat().st_mtime
    return found


def _has_run(folder: Path) -> bool:
    """Whether its ranks have noted a run, in the last attempt or in one before, or found it done."""
    if read_past(folder / "requeues.json").position or any(folder.glob("notes.*/**/run-*")):
        return True
    return any(code.read_text().strip() == "0" for code in folder.glob("notes.*/code-*"))


def _log(folder: Path) -> Path:
    """The job's log where it is in one of the usual places, otherwise its folder."""
    logs = [log for place in (folder.parent, Path.cwd()) for log in place.glob(f"*-{folder.name}.out")]
    return logs[0] if logs else folder
