"""Jobs of a plan handed to sbatch: one submission at a time, and all of its training jobs or none."""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from distkd.allocation import note_job
from distkd.errors import ConfigError
from distkd.slurm.plan import Job

__all__ = ["alone", "carry_out", "words_of"]

LOCK = ".submit.lock"


@contextmanager
def alone(folder: Path) -> Generator[None]:
    """Hold the lock of the jobs' folder, which ends with this process: of two submissions at once neither would see the
    other's jobs. Where the file system has no locks nothing is held.
    """
    lock = None
    try:
        try:
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"distkd: waits for another `distkd submit`, which holds {folder / LOCK}", file=sys.stderr)
            fcntl.flock(lock or 0, fcntl.LOCK_EX)
        except OSError:
            pass
        yield
    finally:
        if lock is not None:
            os.close(lock)


def words_of(job: Job, home: Path, ids: Sequence[str]) -> list[str]:
    """The command, given the ids of the jobs before it."""
    options = [*job.options, *job.dependency(ids)]
    return ["sbatch", "--parsable", *options, str(home / "slurm" / job.script), *job.arguments]


def carry_out(jobs: Sequence[Job], environment: Mapping[str, str], home: Path, logs: Path) -> list[str]:
    """Submit the jobs in order, then note them in the folders of their runs; returns the ids.

    The report trains nothing: without it the list is shorter by one, and a warning says so.

    Raises:
        ConfigError: one of the others was not taken; those before it have been cancelled again.
    """
    ids: list[str] = []
    try:
        for job in jobs:
            try:
                ids.append(_sbatch(job, words_of(job, home, ids), {**environment, **job.variables}))
            except ConfigError as error:
                if job.runs:
                    raise
                print(
                    f"distkd: {error}\nthe jobs before it stay; without a job for the report: --no-report, and "
                    f"{shlex.join(['distkd', 'report', *job.arguments])} at the end",
                    file=sys.stderr,
                )
        for job, name in zip(jobs, ids, strict=False):
            _note(job, name, ids, logs)
    except BaseException as error:
        cancelled = _cancel(ids)
        if isinstance(error, ConfigError) and cancelled:
            raise ConfigError(f"{error}\n{cancelled}") from error
        raise
    return ids


def _note(job: Job, name: str, ids: Sequence[str], logs: Path) -> None:
    for task, folders in job.runs.items():
        shown = f"{name}_{task}" if job.is_array else name
        for folder in folders:
            note_job(
                folder, "submitted", job=shown, script=job.script, log=str(logs / f"{job.name}-{shown}.out"),
                after=job.waits_for(ids, task),
            )  # fmt: skip


def _sbatch(job: Job, words: Sequence[str], environment: Mapping[str, str]) -> str:
    try:
        done = subprocess.run(
            words, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
        )
    except OSError as error:
        raise ConfigError(f"sbatch cannot be started: {error.strerror}; see `command -v sbatch`") from error
    said = "\n".join(text.strip() for text in (done.stderr, done.stdout) if text.strip())
    if done.returncode:
        raise ConfigError(
            f"SLURM refused the job {job.name}:\n{said or f'exit {done.returncode}'}\n"
            "mend the option that it names, on the command line or in the site file (slurm/site.env, --site); "
            "--dry-run shows the commands, and `sinfo` what there is"
        )
    # some sites' sbatch says more than it is asked for
    found = re.findall(r"^(?:Submitted batch job )?(\d+)(?:;.*| on cluster .*)?$", done.stdout, re.MULTILINE)
    if not found:
        raise ConfigError(
            f"sbatch took the job {job.name} without saying its number, in:\n{said or '(nothing)'}\n"
            "it may be in the queue: look with `squeue --me`, and end it with scancel"
        )
    if done.stderr.strip():
        print(done.stderr.strip(), file=sys.stderr)
    return found[-1]


def _cancel(ids: Sequence[str]) -> str:
    """Take back what was submitted; in words what became of it."""
    if not ids:
        return ""
    command = ["scancel", *ids]
    try:
        failed = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode != 0
    except OSError:
        failed = True
    if failed:
        return f"jobs {', '.join(ids)} were submitted before and could not be cancelled:  {shlex.join(command)}"
    return f"jobs {', '.join(ids)}, submitted before, were cancelled again"
