"""Nodes lost under jobs: these come back by SLURM or go on without, and what lives on there does no harm."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distkd.allocation import read_jobs
from distkd.files import read_json
from tests.launch import folders
from tests.launch.held import Hold
from tests.launch.runs import Finish, law_run, write_config
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import held, release, start

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1800)]

ALIVE = {"PENDING", "RUNNING", "COMPLETING", "COMPLETED"}
"""States of a job that has not failed."""
EARLY = 14
"""Step at which nodes are lost: with one checkpoint on disk, if not two, and most of the run to come."""


@dataclass(frozen=True)
class Lost:
    """A job that loses a node, and its run."""

    job: str
    root: Path
    folder: Path
    hold: Hold

    @property
    def notes(self) -> list[dict[str, Any]]:
        """What the attempts wrote into `jobs.jsonl`."""
        return read_jobs(self.folder)


@dataclass(frozen=True)
class Aftermath:
    """One loss of two nodes, and what became of everybody who was there.

    n2 loses its slurmd: its ranks live on. n3 loses power. SLURM takes both for dead when they have not answered.
    """

    cluster: Cluster
    whole: dict[int, Path]
    """The uninterrupted run by number of ranks."""
    second: Lost
    """On n1 and n2; the rank that lived on woke up while it was trained again."""
    first: Lost
    """On n3, with the batch script, and n4."""
    elastic: Lost
    """On n1 and n3; one node is enough for it."""
    beside: Lost
    """On n2 alone; its rank lived on and woke up while another trained the same run."""
    late: Lost
    """On n2 alone; its rank lived on and woke up when another had ended the same run."""
    done: Path
    """A copy of what `late` had left before that rank woke up."""


@pytest.fixture(scope="module")
def aftermath(
    cluster: Cluster, shards: Path, finish: Finish, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Aftermath]:
    try:
        yield _aftermath(cluster, shards, finish, tmp_path_factory.mktemp("lost"))
    finally:
        cluster.tidy()


def _aftermath(cluster: Cluster, shards: Path, finish: Finish, base: Path) -> Aftermath:
    config = law_run("supervised", shards, Path(), engine={"precision": "fp64"}, run={"epochs": 2})

    def submit(name: str, *nodes: str, options: Sequence[str] = (), **environ: str) -> Lost:
        (base / name).mkdir()
        path, folder = write_config(config, base / name)
        words = [f"--nodelist={','.join(nodes)}", f"--output={base / name}/%x-%j.out", *options]
        hold = Hold(base / name / "held", EARLY, ranks=len(nodes))
        environ |= hold.environ | {"DISTKD_JOBS": str(base / name / "slurm")}
        job = start(cluster, path, nodes=len(nodes), options=words, environ=environ)
        return Lost(job, base / name, folder, hold)

    second, first = submit("second", "n1", "n2"), submit("first", "n3", "n4")
    elastic = submit("elastic", "n1", "n3", options=["--no-kill"], DISTKD_ELASTIC="1")
    beside, late = submit("beside", "n2"), submit("late", "n2")
    everybody = [second, first, elastic, beside, late]
    ranks = {lost.job: held(cluster, lost.job, lost.hold) for lost in everybody}
    there = {member.pid for member in cluster.members("n2")}
    orphans = {lost.job: ranks[lost.job][rank] for lost, rank in ((second, 1), (beside, 0), (late, 0))}
    assert there.issuperset(orphans.values())

    cluster.lose("n2")
    cluster.crash("n3")
    release(ranks[elastic.job].values())  # the others cost nothing while SLURM makes up its mind
    for lost in (second, first, beside, late):
        cluster.wait(lost.job, ALIVE, restart=1)
        cluster.run("scontrol", "update", f"JobId={lost.job}", "ReqNodeList=")  # other nodes will do
    for lost in (second, beside):
        cluster.until(lambda lost=lost: len(folders.starts(lost.folder)) == 2, "second attempt", lost.job)
        release([orphans[lost.job]])
    whole = {ranks: finish(config, base / f"whole-{ranks}", ranks) for ranks in (1, 2)}
    for lost in everybody:
        cluster.wait(lost.job)
    shutil.copytree(late.folder, base / "done")
    release([orphans[late.job]])
    cluster.until(lambda: not [member for member in cluster.members("n2") if not member.daemon], "end of the orphans")
    return Aftermath(cluster, whole, second, first, elastic, beside, late, base / "done")


def requeues(lost: Lost) -> int:
    """How often the job's own script asked for a requeue."""
    path = lost.root / "slurm" / lost.job / "requeues.json"
    return read_json(path)["requeues"] if path.exists() else 0


def attempts(lost: Lost) -> list[tuple[int, int]]:
    """Restarts of the job and number of the attempt, at each start of the run."""
    return [(int(line["restart"]), int(line["attempt"])) for line in lost.notes]


def resumed_from(lost: Lost) -> list[int]:
    return [event["step"] for event in folders.starts(lost.folder)]


def test_job_that_lost_its_second_node_comes_back_by_slurm_and_ends_bit_equal(aftermath: Aftermath):
    lost = aftermath.second
    record = aftermath.cluster.show(lost.job)
    assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "1")
    assert "DUE TO NODE FAILURE" in aftermath.cluster.log(lost.job)
    assert requeues(lost) == 0, "SLURM's own requeues do not count"
    assert attempts(lost) == [(0, 1), (1, 2)]
    assert "n2" not in aftermath.cluster.run("scontrol", "show", "hostnames", record["NodeList"]).split()
    first, second = resumed_from(lost)
    assert first == 0 < second
    assert folders.differences(lost.folder, aftermath.whole[2]) == []


def test_job_whose_first_node_lost_power_comes_back_by_slurm_and_ends_bit_equal(aftermath: Aftermath):
    lost = aftermath.first
    record = aftermath.cluster.show(lost.job)
    assert (record["JobState"], record["Restarts"], requeues(lost)) == ("COMPLETED", "1", 0)
    assert attempts(lost) == [(0, 1), (1, 2)]
    assert folders.differences(lost.folder, aftermath.whole[2]) == []


def test_elastic_job_goes_on_without_a_node_and_without_the_queue(aftermath: Aftermath):
    lost = aftermath.elastic
    record = aftermath.cluster.show(lost.job)
    assert (record["JobState"], record["Restarts"], requeues(lost)) == ("COMPLETED", "0", 0)
    assert [start["world_size"] for start in folders.starts(lost.folder)] == [2, 1]
    assert attempts(lost) == [(0, 1), (0, 2)]
    folders.assert_close(lost.folder, aftermath.whole[2], tolerance=1e-9)


def test_rank_that_lives_on_does_no_harm_to_who_trains_its_run_now(aftermath: Aftermath):
    lost = aftermath.beside
    assert (aftermath.cluster.show(lost.job)["Restarts"], requeues(lost)) == ("1", 0)
    assert folders.differences(lost.folder, aftermath.whole[1]) == []
    assert folders.outcome(lost.folder)["attempt"] == 2


def test_rank_that_lives_on_does_no_harm_to_a_run_that_is_done(aftermath: Aftermath):
    lost = aftermath.late
    assert folders.differences(aftermath.done, aftermath.whole[1]) == []
    assert folders.differences(lost.folder, aftermath.whole[1]) == []
    assert folders.outcome(lost.folder) == folders.outcome(aftermath.done)
