"""Where Prometheus finds the ranks of a run: `<run>/prometheus/rank-00000.json`, one file a rank in file_sd format.

A copy lies beside the run folders, `<root>/prometheus/<run>.rank-00000.json`: file_sd takes a `*` in file names only,
and so finds all runs of a root. Files come and go in pairs.

Nothing here imports torch: a batch script clears the files of its job with
`python -m distkd.metrics.targets --remove RUN... --job JOB`, and `distkd status` asks which are stale.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from distkd.files import write_json

__all__ = ["JOB", "identity", "is_gone", "remove", "remove_own", "stale", "write"]

JOB = "slurm_job"
"""Label with the job's id. Not `job`: Prometheus has that label for the name of its scrape config."""
_ATTEMPT = "__meta_distkd_attempt"
"""Label with the attempt of the run. Prometheus shows labels of this prefix to relabelling rules and then drops them: a
series goes on over restarts."""
_PROCESS = "__meta_distkd_process"
"""Label with the process behind a target, of the same kind."""
_THREADS = 8
"""Files at a time; a shared file system answers slowly, and there is one for each rank."""


def write(run: Path, rank: int, address: str, labels: Mapping[str, str], *, attempt: int | None = None) -> Path:
    """Announce this process as a rank of a run, in place of what an earlier one has left.

    Args:
        run: its folder.
        rank: also a label of the target.
        address: `host:port` as Prometheus has to call it.
        labels: of all series of this target; few values each, nothing secret.
        attempt: of the run, for `remove`.
    """
    about = {**labels, "rank": str(rank), _PROCESS: identity()}
    if attempt is not None:
        about[_ATTEMPT] = str(attempt)
    own, shared = _places(run, f"rank-{rank:05d}.json")
    for path in (own, shared):
        write_json(path, [{"targets": [address], "labels": about}])
    return own


def remove_own(run: Path, rank: int) -> None:
    """Withdraw what this process has announced; the files of a process that came later stay."""
    for path in _places(run, f"rank-{rank:05d}.json"):
        if (_labels(path) or {}).get(_PROCESS) == identity():
            path.unlink(missing_ok=True)


def remove(run: Path, *, job: str | None = None, attempt: int | None = None) -> list[Path]:
    """Remove the target files of a run, those of one job or one attempt only where these are given; returns them.

    Files are read only where that decides: other ranks wait for the one that clears up after an earlier attempt.
    """
    _, shared = _places(run, "rank-*.json")
    copies = sorted(shared.parent.glob(f"{glob.escape(run.absolute().name)}.rank-*.json"))
    if job is None and attempt is None:
        for torn in run.glob("prometheus/.rank-*"):  # it was killed in the middle of writing
            torn.unlink(missing_ok=True)
    return _remove([*_files(run), *copies], job, attempt)


def _remove(paths: Sequence[Path], job: str | None, attempt: int | None) -> list[Path]:
    def one(path: Path) -> bool:
        if job is not None or attempt is not None:
            labels = _labels(path) or {}
            if job not in (None, labels.get(JOB)) or str(attempt) not in ("None", labels.get(_ATTEMPT)):
                return False
        path.unlink(missing_ok=True)
        return True

    if not paths:
        return []
    with ThreadPoolExecutor(_THREADS) as pool:
        return [path for path, gone in zip(paths, pool.map(one, paths), strict=True) if gone]


def stale(run: Path, *, ended: bool, running_jobs: Collection[str] | None) -> list[Path]:
    """Target files in a run folder that nobody stands behind any more, as SIGKILL leaves them.

    Args:
        run: its folder.
        ended: whether its last attempt has ended, so long ago that no rank waits for a last scrape any more.
        running_jobs: ids of the jobs that run, as people see them; None where nobody knows.

    The target of a process that lives on this machine is never one of them, whatever is said of its run.
    """
    found: list[Path] = []
    for path in _files(run):
        labels = _labels(path)
        if labels is None:
            continue
        job = labels.get(JOB, "")
        job_is_gone = running_jobs is not None and job != "" and job not in running_jobs
        lives = _lives(labels.get(_PROCESS, ""))
        nobody = ended or job_is_gone if lives is None else not lives
        if nobody and path.exists():  # it may have withdrawn it meanwhile, and ended
            found.append(path)
    return found


def _places(run: Path, name: str) -> tuple[Path, Path]:
    """A target file of a run, and its copy beside the run folders."""
    return run / "prometheus" / name, run.absolute().parent / "prometheus" / f"{run.absolute().name}.{name}"


def _files(run: Path) -> list[Path]:
    return sorted(run.glob("prometheus/rank-*.json"))


def _labels(path: Path) -> dict[str, str] | None:
    """Of a target file; empty where it is not one of ours, None where it has just been removed."""
    try:
        groups: Any = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): str(value) for name, value in groups[0]["labels"].items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def identity(pid: int | None = None) -> str:
    """`machine pid start`, the same for no other process; `machine pid` for one that has ended, empty without /proc.

    The machine is known by its boot and by the namespace of its process ids, which a container may have of its own.

    Args:
        pid: of the process; None: this one.
    """
    pid = os.getpid() if pid is None else pid
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
    try:
        # the name in brackets may hold anything; behind it state is the first field and start time the 20th
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return f"{machine} {pid}"
    return f"{machine} {pid}" if fields[0] in "ZX" else f"{machine} {pid} {fields[19]}"


def is_gone(process: str) -> bool:
    """Whether the process of this identity was one of this machine, and has ended."""
    return _lives(process) is False


def _lives(process: str) -> bool | None:
    """Whether it lives; None where that is not known, as of a process of another machine."""
    machine, _, rest = process.partition(" ")
    pid = rest.split(" ")[0]
    if not pid.isdigit():
        return None
    now = identity(int(pid))
    if now.partition(" ")[0] != machine:
        return None
    return now == process or _is_hidden(int(pid))


def _is_hidden(pid: int) -> bool:
    """Whether it lives although /proc does not show it, as with `hidepid` the processes of other users."""
    if Path(f"/proc/{pid}").exists():
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except ProcessLookupError:
        pass
    return False


def _n_targets(paths: Sequence[Path]) -> int:
    """Targets behind files, which come in pairs; where one of a pair was missing, the other stands for it."""
    whole = [path.absolute() for path in paths]
    own = re.compile(r"rank-\d+\.json").fullmatch
    return len({_places(path.parent.parent, path.name)[1] if own(path.name) else path for path in whole})


def _main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m distkd.metrics.targets", description="Clear scrape targets.")
    parser.add_argument("--remove", nargs="+", type=Path, required=True, metavar="RUN", help="run folders")
    parser.add_argument("--job", help="only targets of this job; RUN may then be a folder of runs, too")
    parser.add_argument("--attempt", type=int, help="only targets of this attempt of the run")
    arguments = parser.parse_args(argv)
    code = 0
    for folder in cast(list[Path], arguments.remove):
        try:
            removed = remove(folder, job=arguments.job, attempt=arguments.attempt)
            # without a job, a folder of runs would lose the targets of whatever else runs in it
            if arguments.job and not removed and not (folder / "config.yaml").exists():
                below = [path for level in ("", "*/", "*/*/") for path in folder.glob(f"{level}prometheus/*.json")]
                removed = _remove(sorted(below), arguments.job, arguments.attempt)
        except OSError as error:
            print(f"cannot remove scrape targets of {folder}: {error}", file=sys.stderr)
            code = 1
            continue
        if removed:
            n = _n_targets(removed)
            print(f"removed {n} scrape target{'s' * (n != 1)} of {folder}")
        elif not folder.is_dir():
            print(f"no folder {folder}", file=sys.stderr)
            # a batch script clears up after its job also where no run has begun, and then ends with a code of its own
            code = code if arguments.job else code or 2
        elif not arguments.job:
            print(f"no scrape targets of {folder}")
    return code


if __name__ == "__main__":
    sys.exit(_main())
