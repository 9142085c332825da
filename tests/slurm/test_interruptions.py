"""Jobs on a cluster that are warned, pre-empted, out of time, or lose a rank; and what becomes of their runs."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distkd.allocation import read_jobs
from distkd.files import read_json
from tests.launch import folders
from tests.launch.held import Hold, is_pending
from tests.launch.runs import Finish, law_run, write_config
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import held, release, start, together, wait_for_words
from tests.slurm.members import send

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1800)]

LAST = 90
"""Step with which the run is done."""


@dataclass(frozen=True, slots=True)
class Story:
    """What is left of a job when it is over."""

    record: dict[str, str]
    log: str
    folder: Path
    """Of the run."""
    files: Path
    """The job's own."""

    def past(self) -> tuple[int, int]:
        """Requeues that the job asked for itself, and failures in a row, as it counts them."""
        past = read_json(self.files / "requeues.json")
        return past["requeues"], past["failures"]

    def ends(self) -> list[tuple[str, int]]:
        """How each attempt that could say so ended, and at which step."""
        events, ends = folders.events(self.folder), ("interrupted", "failed", "done")
        return [(event["event"], event["step"]) for event in events if event["event"] in ends]

    def resumed_from(self) -> list[int]:
        return [event["step"] for event in folders.starts(self.folder)]


class Stories:
    """Jobs at the same time. n4 is for the one that is pre-empted."""

    def __init__(self, cluster: Cluster, shards: Path, root: Path, finish: Finish, folder: Path):
        self.cluster, self.finish, self.folder = cluster, finish, folder
        self.config = law_run("dc_distill", shards, root, engine={"precision": "fp64"})

    def whole(self) -> Path:
        """The uninterrupted run on one machine."""
        return self.finish(self.config, self._root("whole"), 2)

    def many_troubles(self) -> Story:
        """An attempt is warned, the next one loses a rank, and of the third only the ranks are told to end."""
        path, folder = self._config("troubles")
        hold = Hold(path.parent / "held", 3, 8, 8, ranks=2)
        job = self._start(path, hold, ranks=2)
        pids = held(self.cluster, job, hold)
        self.cluster.scancel("--batch", "--signal=USR1", job)  # as --signal=B:USR1 does, at once
        wait_for_words(self.cluster, job, "asks the ranks to stop: USR1")
        release(pids.values())

        pids = held(self.cluster, job, hold, 1)
        send([pids[1]], signal.SIGKILL)
        release([pids[0]])

        pids = held(self.cluster, job, hold, 2)
        self.cluster.scancel("--signal=TERM", job)
        self.cluster.until(lambda: all(is_pending(pid, signal.SIGTERM) for pid in pids.values()), "SIGTERM", job)
        release(pids.values())
        return self._end(job, folder, "COMPLETED")

    def hopeless(self) -> Story:
        """A job whose rank is always killed before it has begun."""
        path, folder = self._config("hopeless")
        hold = Hold(path.parent / "held", "start", "start", ranks=1)
        job = self._start(path, hold, DISTKD_MAX_FAILURES="1")
        for attempt in range(2):
            send(held(self.cluster, job, hold, attempt).values(), signal.SIGKILL)
        return self._end(job, folder, "FAILED")

    def too_slow(self) -> Story:
        """A job whose rank does not come to the end of its step within the lead."""
        path, folder = self._config("slow")
        hold = Hold(path.parent / "held", 14, ranks=1)
        job = self._start(path, hold, DISTKD_LEAD="3")
        held(self.cluster, job, hold)
        self.cluster.scancel("--batch", "--signal=USR1", job)
        return self._end(job, folder, "COMPLETED")

    def warned_by_the_clock(self) -> Story:
        """The ranks are in a long step when the end of the time comes near."""
        path, folder = self._config("warned")
        hold = Hold(path.parent / "held", 3, ranks=1)
        job = self._start(path, hold, options=["--time=60", "--signal=B:USR1@80"])
        pids = held(self.cluster, job, hold)
        self._end_of_time(job, minutes=2)
        wait_for_words(self.cluster, job, "asks the ranks to stop: USR1")
        self._end_of_time(job, minutes=60)
        release(pids.values())
        return self._end(job, folder, "COMPLETED")

    def out_of_time(self) -> tuple[Story, Story]:
        """A job that is not warned of the end of its time; and the same, submitted again."""
        path, folder = self._config("late")
        hold = Hold(path.parent / "held", 3, ranks=1)
        job = self._start(path, hold, options=["--time=60", "--signal=B:URG@1"])  # which no shell takes to heart
        pids = held(self.cluster, job, hold)
        self._end_of_time(job, minutes=1)
        wait_for_words(self.cluster, job, "asks the ranks to stop: TERM")
        release(pids.values())
        over = self._end(job, folder, "TIMEOUT")
        outcome = folders.outcome(folder)
        assert (outcome["state"], outcome["step"]) == ("interrupted", folders.newest_step(folder))
        return over, self._end(self._start(path, hold), folder, "COMPLETED")

    def pre_empted(self) -> Story:
        path, folder = self._config("pre-empted")
        hold = Hold(path.parent / "held", 3, ranks=1)
        job = self._start(path, hold, options=["--nodelist=n4", "--exclusive"])
        pids = held(self.cluster, job, hold)
        urgent = self.folder / "urgent.sh"
        urgent.write_text("#!/bin/bash\nscontrol show job --oneliner $1\n")
        options = ["--partition=urgent", "--nodelist=n4", "--exclusive"]
        other = self.cluster.submit(urgent, job, options=options)
        wait_for_words(self.cluster, job, "asks the ranks to stop: USR1")
        release(pids.values())
        self.cluster.wait(other)
        assert "JobState=PENDING" in self.cluster.log(other), "the urgent job ran beside, or after, the other"
        return self._end(job, folder, "COMPLETED")

    def _config(self, name: str) -> tuple[Path, Path]:
        return write_config(self.config, self._root(name))

    def _root(self, name: str) -> Path:
        root = self.folder / name
        root.mkdir()
        return root

    def _start(self, path: Path, hold: Hold, *, ranks: int = 1, options: Sequence[str] = (), **environ: str) -> str:
        places = options if "--nodelist=n4" in options else ["--exclude=n4", *options]
        environ |= hold.environ
        return start(self.cluster, path, "--run.root", path.parent, ranks=ranks, options=places, environ=environ)

    def _end_of_time(self, job: str, *, minutes: int) -> None:
        """Let the time of a running job end in so many minutes from now, or up to one earlier."""
        days, _, clock = self.cluster.show(job)["RunTime"].rpartition("-")
        assert not days
        hours, over, _ = map(int, clock.split(":"))
        self.cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={hours * 60 + over + minutes}")

    def _end(self, job: str, folder: Path, state: str) -> Story:
        (record,) = self.cluster.wait(job, state)
        return Story(record, self.cluster.log(job), folder, folder.parent / "slurm" / job)


@pytest.fixture(scope="module")
def story(
    cluster: Cluster, shards: Path, root: Path, finish: Finish, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Any]:
    """A story by name; all of them are over."""
    told = Stories(cluster, shards, root, finish, tmp_path_factory.mktemp("stories"))
    futures: dict[str, Future[Any]] = together(
        told.pre_empted,
        told.out_of_time,
        told.warned_by_the_clock,
        told.many_troubles,
        told.too_slow,
        told.hopeless,
        told.whole,
    )
    return lambda name: futures[name].result()


def test_warned_killed_and_stopped_job_ends_bit_equal_to_an_uninterrupted_run(story: Callable[[str], Any]):
    told = story("many_troubles")
    assert (told.record["Restarts"], told.record["ExitCode"], told.past()[0]) == ("3", "0:0", 3)
    assert folders.differences(told.folder, story("whole")) == []
    attempts = [(line["restart"], line["attempt"]) for line in read_jobs(told.folder)]
    assert attempts == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_every_attempt_goes_on_from_the_checkpoint_of_the_one_before(story: Callable[[str], Any]):
    told = story("many_troubles")
    stopped = [step for end, step in told.ends() if end == "interrupted"]
    resumed = told.resumed_from()
    assert len(stopped) == 2
    assert (resumed[0], resumed[1], resumed[3]) == (0, *stopped)
    assert resumed[1] <= resumed[2] < resumed[3]


def test_reason_of_every_requeue_is_in_the_log(story: Callable[[str], Any]):
    lines = story("many_troubles").log.splitlines()
    verdicts = [line.partition("] ")[2] for line in lines if "requeue: " in line]
    warned = "requeue: SLURM has announced the end of this attempt, the run is not done"
    assert verdicts == [warned, "requeue: failure 1 since the newest checkpoint", warned, "no requeue: done"]


def test_job_that_always_fails_is_given_up(story: Callable[[str], Any]):
    told = story("hopeless")
    assert (told.record["ExitCode"], told.record["Restarts"], told.past()) == ("1:0", "1", (1, 1))
    assert "was killed by SIGKILL" in told.log
    assert "no requeue: failed 2 times in a row without a newer checkpoint (DISTKD_MAX_FAILURES=1)" in told.log
    assert not told.folder.exists()


def test_job_whose_ranks_do_not_stop_in_time_goes_back_without_them(story: Callable[[str], Any]):
    told = story("too_slow")
    assert (told.record["Restarts"], told.past()) == ("1", (1, 0))
    assert "the ranks did not stop in time" in told.log
    assert told.ends()[-1] == ("done", LAST)
    first, second = told.resumed_from()
    assert first == 0 < second


def test_end_of_the_time_is_announced_and_the_job_goes_on_later(story: Callable[[str], Any]):
    told = story("warned_by_the_clock")
    assert (told.record["Restarts"], told.past()) == ("1", (1, 0))
    first, last = told.ends()
    assert last == ("done", LAST)
    assert first == ("interrupted", told.resumed_from()[1])


def test_job_that_is_not_warned_runs_out_of_time_and_goes_on_when_submitted_again(
    cluster: Cluster, story: Callable[[str], Any]
):
    over, again = story("out_of_time")
    now = cluster.show(over.record["JobId"])
    assert (now["JobState"], now["Restarts"]) == ("TIMEOUT", "0")
    assert again.record["Restarts"] == "0"
    first, last = again.ends()
    assert last == ("done", LAST)
    assert first == ("interrupted", again.resumed_from()[1])
    jobs = [(line["job"], line["restart"], line["attempt"]) for line in read_jobs(again.folder)]
    assert jobs == [(over.record["JobId"], 0, 1), (again.record["JobId"], 0, 2)]


def test_pre_empted_job_makes_room_and_ends_later(story: Callable[[str], Any]):
    told = story("pre_empted")
    assert told.record["Restarts"] == "1"
    first, last = told.ends()
    assert last == ("done", LAST)
    assert first == ("interrupted", told.resumed_from()[1])
