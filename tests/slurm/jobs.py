"""Training jobs of tests on a cluster: submit one, wait for a step of it, hold its ranks while something happens.

A rank that is held (SIGSTOP) is to everybody else one whose step lasts long. So whatever is to happen in the middle of
a run does happen there, however fast or busy the machine is, and waiting costs no time of a core.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from distkd.allocation import Allocation
from distkd.train.signals import LOOK_S
from tests.launch import folders
from tests.launch.processes import PATIENCE_S, REPOSITORY
from tests.slurm.cluster import FINAL, Cluster
from tests.slurm.members import send

__all__ = [
    "SCRIPTS", "hold", "is_pending", "release", "running_ranks", "start", "together", "wait_for_step", "wait_for_words",
]  # fmt: skip

SCRIPTS = REPOSITORY / "slurm"
_POLL_S = 0.02


def start(
    cluster: Cluster,
    *arguments: str | Path,
    script: str = "train.sbatch",
    nodes: int = 1,
    ranks: int = 1,
    options: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """Submit a script of `slurm/` with configs and overrides, for so many nodes with so many ranks each; the id."""
    return cluster.submit(
        SCRIPTS / script,
        *arguments,
        options=[f"--nodes={nodes}", *options],
        environ={"DISTKD_RANKS_PER_NODE": str(ranks), **(environ or {})},
        cwd=cwd,
    )


def running_ranks(cluster: Cluster, job: str, node: str | None = None) -> dict[int, int]:
    """Process ids of the ranks of a job, or of those on one node, by rank. `job` is an id as people see it."""
    found: dict[int, int] = {}
    for member in cluster.members(node):
        allocation = Allocation.from_environment(member.environ)
        if not member.daemon and "RANK" in member.environ and allocation is not None and allocation.job == job:
            found.setdefault(int(member.environ["RANK"]), member.pid)  # a rank is older than what it starts
    return found


def wait_for_step(cluster: Cluster, job: str, folder: Path, step: int, attempt: int = 1) -> None:
    """Until this attempt of the run in the folder, or a later one, has taken that step.

    Raises:
        AssertionError: the job ended before, or did not get there, with its log.
    """

    def taken() -> bool:
        # lines of steps that are taken again stay until the attempt has begun
        return folders.last_line(folder)["step"] >= step and len(folders.starts(folder)) >= attempt

    _wait(cluster, job, taken, f"step {step} in attempt {attempt}")


def wait_for_words(cluster: Cluster, job: str, words: str) -> None:
    """Until they are in the job's log.

    Raises:
        AssertionError: the job ended before, or did not get there, with its log.
    """
    log = Path(cluster.show(job)["StdOut"])
    _wait(cluster, job, lambda: log.exists() and words in log.read_text(), f"'{words}'")


def _wait(cluster: Cluster, job: str, condition: Callable[[], bool], what: str) -> None:
    looked = time.monotonic()
    end = looked + PATIENCE_S
    while not condition():
        now = time.monotonic()
        if now - looked > 1:  # to ask SLURM costs more than to look at a file
            looked = now
            ended = cluster.state(job) in FINAL and not condition()
            assert not ended, f"job {job} ended before {what}\n{cluster.report(job)}"
        assert now < end, f"job {job} does not get to {what}\n{cluster.report(job)}"
        time.sleep(_POLL_S)  # polling other processes, not waiting for luck


def hold(cluster: Cluster, job: str, folder: Path, step: int, ranks: int, attempt: int = 1) -> dict[int, int]:
    """Stop all ranks, of which there are so many, from running once this step is taken; their process ids by rank."""
    wait_for_step(cluster, job, folder, step, attempt)
    pids = running_ranks(cluster, job)
    send(pids.values(), signal.SIGSTOP)
    assert sorted(pids) == list(range(ranks)), f"ranks {sorted(pids)} run, not {ranks}\n{cluster.report(job)}"
    return pids


def release(pids: Iterable[int]) -> None:
    """Held ranks go on, and look into their stop file at the next step that asks."""
    time.sleep(LOOK_S)  # they do so no more often, and are fast
    send(pids, signal.SIGCONT)


def is_pending(pid: int, number: signal.Signals) -> bool:
    """Whether this signal waits for a held process to go on; False of one that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (number - 1) & 1 for mask in masks)


def together(*parts: Callable[[], Any]) -> dict[str, Future[Any]]:
    """All of them at the same time, each in a thread, until the last is over; what each returned or raised, by name.

    Most of what a job does is waiting for SLURM.
    """
    with ThreadPoolExecutor(len(parts)) as pool:
        return {part.__name__: pool.submit(part) for part in parts}
