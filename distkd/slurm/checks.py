"""What can be refused at a login node, before a job has waited for hours and fails in a second."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from distkd.allocation import read_jobs
from distkd.base import World
from distkd.data.manifest import MANIFEST
from distkd.data.manifest_file import read_manifest
from distkd.data.remote.transport import is_url
from distkd.data.splits import split_numbers
from distkd.errors import ConfigError, DistkdError
from distkd.slurm.plan import Job, Run
from distkd.slurm.queue import is_of_scripts, max_task, queued
from distkd.slurm.site import Site
from distkd.slurm.units import Options, Unit
from distkd.train.export import find_export
from distkd.train.folder import check_config, read_outcome
from distkd.train.job import shards_folder, teacher_folder
from distkd.train.settings import Settings

__all__ = [
    "check_array", "check_folds", "check_folds_to_come", "check_queue", "check_setup", "check_units", "sets_to_make",
]  # fmt: skip

SHOWN = 5
"""Runs that a message lists."""


def check_units(units: Sequence[Unit], options: Options, site: Site) -> None:
    """Refuse what would fail in the job, as far as a login node can see it.

    Raises:
        ConfigError: the first such thing.
    """
    for root in dict.fromkeys(unit.settings.run.root for unit in units):
        _check_root(root)
    folders = {unit.settings.folder.resolve() for unit in units}
    for unit in units:
        settings = unit.settings
        check_config(settings, allow_change=options.allow_change)
        if not any(folder in folders for folder in unit.teachers):
            _check_teacher(settings)
        _check_batch(settings, options, site)


def sets_to_make(units: Sequence[Unit]) -> dict[Path, str]:
    """Shard sets that are not there, with their recipes; jobs that start at once would make one into one folder.

    Raises:
        ConfigError: a config names neither shards nor a recipe.
    """
    missing: dict[Path, str | None] = {}
    for data, folder in ((unit.settings.data, shards_folder(unit.settings)) for unit in units):
        if not (data.shards is not None and is_url(data.shards)) and not (folder / MANIFEST).exists():
            missing[folder] = data.make
    for folder in (folder for folder, recipe in missing.items() if recipe is None):
        note = f"shard set {folder} is not there for this machine; its jobs fail unless their nodes have it"
        print(f"distkd: {note}", file=sys.stderr)
    return {folder: recipe for folder, recipe in missing.items() if recipe is not None}


def check_folds(units: Sequence[Unit]) -> None:
    """Refuse folds that a shard set does not have, where it can be read from here.

    Raises:
        DataError: the first such fold, or a manifest that is none.
    """
    folds: dict[Path, set[int]] = {}
    for settings in (unit.settings for unit in units):
        if not (settings.data.shards is not None and is_url(settings.data.shards)):
            folds.setdefault(shards_folder(settings), set()).add(settings.data.fold)
    for folder, some in folds.items():
        if (folder / MANIFEST).exists():
            manifest = read_manifest(folder)
            for fold in sorted(some):
                split_numbers(manifest, fold, "train")


def check_folds_to_come(units: Sequence[Unit], sets: Collection[Path]) -> None:
    """Say that the folds of sets that are not made yet cannot be looked at; the first one is always there."""
    if any(unit.settings.data.fold and not unit.streamed and shards_folder(unit.settings) in sets for unit in units):
        print("distkd: folds are not checked: there are no shards yet", file=sys.stderr)


def check_setup(site: Site) -> None:
    """Say that the file to source is not here; the nodes may have it."""
    if site.setup is not None and not Path(site.setup).is_file():
        print(
            f"distkd: DISTKD_SETUP names no file here: {site.setup}; jobs fail unless their nodes have it",
            file=sys.stderr,
        )


def _check_root(root: Path) -> None:
    there = next(place for place in (root, *root.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        state = "cannot be written" if there.is_dir() else "is a file"
        raise ConfigError(
            f"run root {root} cannot be made: {there} {state}; name a folder that all nodes share with --run.root"
        )


def _check_teacher(settings: Settings) -> None:
    """Refuse a teacher that is neither trained nor part of this submission."""
    if not settings.method.needs_teacher:
        return
    if settings.teacher.export is None:
        raise ConfigError(
            f"run {settings.run.name}: method {settings.method.name!r} needs a teacher; set teacher.export, to the run "
            "of another config of this command, for example"
        )
    folder = teacher_folder(settings)
    try:
        find_export(folder)
    except DistkdError as error:
        waiting = _job_of(folder)
        advice = f"job {waiting} trains it, submit this after that" if waiting else "or name its config here, too"
        raise ConfigError(f"run {settings.run.name}: {error}; {advice}") from error


def _check_batch(settings: Settings, options: Options, site: Site) -> None:
    """Refuse a batch or a device that the ranks cannot share, where it is known how many they will be."""
    ranks, gpus = options.ranks_per_node or site.gpus_per_node, site.gpus_per_node
    if ranks is None:
        return
    if gpus is not None and ranks > gpus and settings.engine.device != "cpu":
        raise ConfigError(
            f"--ranks-per-node {ranks} is more than the {gpus} GPUs of a node (DISTKD_GPUS_PER_NODE), and a rank needs "
            "one of its own; use as many, or --engine.device cpu"
        )
    world = World(size=ranks * (options.nodes or 1))
    try:
        settings.batch.passes(world)
    except ConfigError as error:
        raise ConfigError(f"run {settings.run.name} on {options.nodes or 1} x {ranks} ranks: {error}") from error


def check_array(jobs: Sequence[Job]) -> None:
    """Refuse an array that is larger than this cluster takes, where it says how large that is.

    Raises:
        ConfigError: it is.
    """
    last = max((task for job in jobs if job.is_array for task in job.runs), default=0)
    most = max_task() if last else None
    if most is not None and last > most:
        raise ConfigError(
            f"the tasks of an array are numbered 0 to {last} for these folds and seeds, and this cluster takes 0 to "
            f"{most} (MaxArraySize); submit fewer folds or seeds at a time"
        )


def check_queue(runs: Sequence[Run]) -> None:
    """Refuse runs that a job of the queue trains already: two would write into one folder.

    Raises:
        ConfigError: there are such runs, or SLURM does not say.
    """
    waiting = _jobs_of([run.folder for run in runs])
    if waiting is None:
        if shutil.which("sbatch") is None:
            return
        raise ConfigError(
            "SLURM does not answer (squeue), so it is not known whether jobs of earlier submissions still train these "
            "runs; nothing was submitted, try again"
        )
    if not waiting:
        return
    lines = [f"  {folder}: job {job}" for folder, job in waiting.items()]
    more = [f"  and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    listed = "\n".join([*lines[:SHOWN], *more])
    ids = shlex.join(["scancel", *dict.fromkeys(waiting.values())])
    raise ConfigError(
        f"{len(lines)} run{'' if len(lines) == 1 else 's'} already in the queue:\n{listed}\n"
        f"wait for these jobs, or end them first (each run goes on from its last checkpoint):  {ids}"
    )


def _job_of(folder: Path) -> str | None:
    return (_jobs_of([folder]) or {}).get(folder)


def _jobs_of(folders: Sequence[Path]) -> dict[Path, str] | None:
    """The folders that a job in the queue trains, with its id; None where the queue cannot be asked.

    A run that was only tried in a session (salloc, Jupyter) is not in the queue with it.
    """
    lines = {folder: [line for line in read_jobs(folder) if "job" in line] for folder in folders}
    submitted = {str(line["job"]) for some in lines.values() for line in some if line.get("event") == "submitted"}
    ids = list(dict.fromkeys(str(line["job"]) for some in lines.values() for line in some))
    there = queued(ids) if ids else {}
    if there is None:
        return None
    ours = {job for job in there if job in submitted or is_of_scripts(job)}
    found: dict[Path, str] = {}
    for folder, some in lines.items():
        jobs = [job for job in (str(line["job"]) for line in reversed(some)) if job in there]
        trains = next((job for job in jobs if job in ours), None)
        if trains is not None:
            found[folder] = trains
        elif jobs and read_outcome(folder) is None:
            note = f"run {folder} was begun in the session of job {jobs[0]} and has not said that it ended"
            print(f"distkd: {note}; if it trains there now, stop it before the new job starts", file=sys.stderr)
    return found
