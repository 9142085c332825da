"""Training jobs of tests on a cluster: submit one, wait until its ranks are held, let them go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from distkd.train.signals import LOOK_S
from tests.launch.held import Hold, go_on
from tests.launch.processes import REPOSITORY
from tests.slurm.cluster import FINAL, PATIENCE_S, Cluster

__all__ = [
    "SCRIPTS", "held", "release", "start", "together", "wait_for_words",
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


def held(cluster: Cluster, job: str, hold: Hold, number: int = 0) -> dict[int, int]:
    """Wait until all ranks are held at the moment of this number; their process ids by rank.

    Raises:
        AssertionError: the job ended before, or did not get there, with its log.
    """
    _wait(cluster, job, lambda: bool(hold.pids(number)), f"moment {number} at which {hold.ranks} ranks are held")
    return hold.pids(number)


def release(pids: Iterable[int]) -> None:
    """Held ranks go on, and look into their stop file at the next step that asks."""
    time.sleep(LOOK_S)  # they do so no more often, and are fast
    go_on(pids)


def together(*parts: Callable[[], Any]) -> dict[str, Future[Any]]:
    """All of them at the same time, each in a thread, until the last is over; what each returned or raised, by name.

    Most of what a job does is waiting for SLURM.
    """
    with ThreadPoolExecutor(len(parts)) as pool:
        return {part.__name__: pool.submit(part) for part in parts}
