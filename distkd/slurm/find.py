"""Where the runs are: folders below others, without walking through what jobs leave beside them."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from distkd.errors import DataError

__all__ = ["find", "shown"]

_MAX_DEPTH = 4
_NO_RUNS = re.compile(r"\.|submitted-|notes\.|logs\.|(checkpoints|events|export|prometheus|__pycache__)$")
"""Folders that are not looked into: a submission's has copies of configs, which are no runs."""
_LOG = re.compile(r"-(\d+(?:_\d+)?)\.out$")
"""Name of a job's log; the job's folder lies beside it and goes by the id."""
_OF_JOB = re.compile(r"(stop|notes|logs)\.\d+$")
"""What a job's folder holds: a folder of logs for each attempt, node and rank, and no run."""


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
