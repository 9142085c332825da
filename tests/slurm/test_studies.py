"""Studies on a real cluster as users start and watch them: `distkd submit`, `distkd status`, and what lies between."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml

from distkd.allocation import read_jobs
from distkd.cli import DONE, USER, main
from distkd.files import read_json
from tests.launch import folders
from tests.launch.held import Hold
from tests.launch.runs import Finish
from tests.slurm.cluster import FINAL, Cluster
from tests.slurm.jobs import held, release
from tests.small import Small

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1800)]

EPOCHS = 10
"""Of some steps each: enough to be met in the middle."""


class Login:
    """A user on the login node of a cluster, in a folder with a teacher's and a student's config."""

    def __init__(self, cluster: Cluster, here: Path, small: Small, patch: pytest.MonkeyPatch):
        self.cluster, self.here, self.small = cluster, here, small
        for name in os.environ.keys() - cluster.environ.keys():
            patch.delenv(name)
        for name, value in cluster.environ.items():
            patch.setenv(name, value)
        here.mkdir(exist_ok=True)
        (here / "study").mkdir()
        patch.chdir(here)
        patch.setenv("DISTKD_SITE", str(here / "site.env"))  # not the one of who runs the tests
        self.site()
        self.configs = [self.write("teacher"), self.write("student")]

    @contextmanager
    def holding(self, *moments: int, ranks: int = 1) -> Generator[Hold, None, None]:
        """What is submitted in the block is held, and nothing else: the first run that comes to each moment."""
        hold = Hold(self.here / "held", *moments, ranks=ranks)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in hold.environ.items():
                patch.setenv(name, value)
            yield hold

    def site(self, *lines: str) -> None:
        (self.here / "site.env").write_text("".join(f"{line}\n" for line in lines))

    def config(self, kind: str) -> dict[str, Any]:
        config = self.small.config(kind, run={"root": "runs", "epochs": EPOCHS, "checkpoint_every": 6})
        config["run"]["name"] = f"study-{kind}"
        config["teacher"] = {"export": "study-teacher" if kind == "student" else None}
        return config

    def write(self, kind: str) -> str:
        config = self.config(kind)
        del config["run"]["name"]  # it is that of its file, as most have it
        path = self.here / "study" / f"{kind}.yaml"
        path.write_text(yaml.safe_dump(config))
        return f"study/{kind}.yaml"

    def distkd(self, *words: str, code: int = DONE) -> str:
        """What the command prints, which ends with this code."""
        out, err = StringIO(), StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            assert main(list(words)) == code, err.getvalue()
        return out.getvalue() if code == DONE else err.getvalue()

    def submit(self, *words: str, code: int = DONE) -> str:
        return self.distkd("submit", *self.configs, *words, code=code)

    def status(self) -> dict[str, dict[str, Any]]:
        """What `distkd status --json` says of each run, by name."""
        return {row["name"]: row for row in json.loads(self.distkd("status", "--json"))}

    def run(self, name: str) -> Path:
        return self.here / "runs" / name

    def noted(self, event: str) -> dict[str, list[str]]:
        """Jobs of each run that `jobs.jsonl` has, by the run's name."""
        lines = {path.parent.name: read_jobs(path.parent) for path in sorted((self.here / "runs").glob("*/jobs.jsonl"))}
        return {name: [line["job"] for line in of_run if line["event"] == event] for name, of_run in lines.items()}


@pytest.fixture
def login(cluster: Cluster, tmp_path: Path, small: Small, monkeypatch: pytest.MonkeyPatch) -> Login:
    return Login(cluster, tmp_path, small, monkeypatch)


def ids_in(said: str) -> list[str]:
    """Ids of the jobs of a submission, in order."""
    found = re.search(r"^cancel: +scancel (.*)$", said, re.MULTILINE)
    assert found, said
    return found[1].split()


def done(folder: Path) -> bool:
    return folders.outcome(folder).get("state") == "done"


# a study of three folds, of which one cannot be trained at first


@dataclass
class Study:
    """What was seen of it, in the order in which it was."""

    login: Login
    submitted: list[str]
    """Jobs of the first submission: teachers, students, report."""
    queue: dict[str, str]
    """What SLURM said of the jobs while the first teacher was held."""
    rows: dict[str, dict[str, Any]]
    """And `distkd status`."""
    table: str
    refused: str
    """What the second submission was told meanwhile."""
    states: dict[str, str]
    """Of all jobs of the first submission at its end."""
    report: str
    end: dict[str, dict[str, Any]]
    """What `distkd status` said then."""
    resubmitted: list[str] = field(default_factory=list)
    """Jobs of the last submission."""
    restates: dict[str, str] = field(default_factory=dict)
    nothing: str = ""
    """What a submission was told when all was done."""


TEACHERS = [f"study-teacher-fold{fold}" for fold in range(3)]
STUDENTS = [f"study-student-fold{fold}" for fold in range(3)]


@pytest.fixture(scope="module")
def study(cluster: Cluster, small: Small, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    with pytest.MonkeyPatch.context() as patch:
        try:
            yield _study(Login(cluster, tmp_path_factory.mktemp("study"), small, patch))
        finally:
            cluster.tidy()


def _study(login: Login) -> Study:
    cluster = login.cluster
    in_the_way = login.run(TEACHERS[1]) / "checkpoints"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.touch()  # a user's error of this fold alone

    words = ("--folds", "0-2", "--throttle", "1")
    with login.holding(6) as hold:
        jobs = ids_in(login.submit(*words))
    teachers = jobs[0]
    ranks = held(cluster, f"{teachers}_0", hold)
    found = Study(
        login,
        jobs,
        queue=cluster.jobs(),
        rows=login.status(),
        table=login.distkd("status"),
        refused=login.submit(*words, code=USER),
        states={},
        report="",
        end={},
    )
    written = {name: (login.here / name).read_text() for name in login.configs}
    for name, text in written.items():
        (login.here / name).write_text(text.replace(f"epochs: {EPOCHS}", "epochs: 1"))  # is for the next submission
    release(ranks.values())
    found.states = _states_at_the_end(cluster, jobs)
    found.report, found.end = (login.run("report") / "index.html").read_text(), login.status()

    in_the_way.unlink()
    for name, text in written.items():
        (login.here / name).write_text(text)
    found.resubmitted = ids_in(login.submit(*words))
    found.restates = _states_at_the_end(cluster, found.resubmitted)
    found.nothing = login.submit(*words)
    return found


def _states_at_the_end(cluster: Cluster, jobs: list[str]) -> dict[str, str]:
    """How each job and task ended, by id."""
    records = [record for job in jobs for record in cluster.wait(job, FINAL)]
    ids = ["_".join(record[key] for key in ("ArrayJobId", "ArrayTaskId") if key in record) for record in records]
    return {job or record["JobId"]: record["JobState"] for job, record in zip(ids, records, strict=True)}


def test_jobs_in_the_queue_are_those_in_the_run_folders(study: Study):
    teachers, students, report = study.submitted
    tasks = [f"{array}_{fold}" for array in (teachers, students) for fold in range(3)]
    assert study.queue == {f"{teachers}_0": "RUNNING", **dict.fromkeys([*tasks[1:], report], "PENDING")}
    noted = study.login.noted("submitted")
    assert [noted[name][0] for name in (*TEACHERS, *STUDENTS)] == tasks
    assert [read_jobs(study.login.run(name))[0]["after"] for name in STUDENTS] == [[task] for task in tasks[:3]]
    assert study.login.noted("started")[STUDENTS[2]] == [tasks[5]]


def test_status_says_what_runs_what_waits_and_what_is_done(study: Study):
    teachers, students, _ = study.submitted
    rows, end = study.rows, study.end
    assert {name: row["state"] for name, row in rows.items()} == {
        TEACHERS[0]: "running",
        **dict.fromkeys(TEACHERS[1:], "queued"),
        **dict.fromkeys(STUDENTS, "waiting"),
    }
    assert [(job["job"], job["state"]) for job in rows[TEACHERS[0]]["jobs"]] == [(f"{teachers}_0", "RUNNING")]
    assert rows[TEACHERS[0]]["step"] >= 6
    assert [rows[name]["jobs"][0]["job"] for name in STUDENTS] == [f"{students}_{fold}" for fold in range(3)]
    assert all(row["advice"] == "" for row in rows.values())
    lines = {line.split()[0]: line for line in study.table.splitlines() if line.startswith("study-")}
    assert f"{teachers}_0 RUNNING" in lines[TEACHERS[0]]
    assert f"{students}_0 .. {students}_2" in lines["study-student-fold*"]
    assert {name: row["state"] for name, row in end.items() if row["state"] != "done"} == {
        TEACHERS[1]: "failed",
        STUDENTS[1]: "cancelled",
    }
    waited = f"what job {students}_1 waited for did not come (job {teachers}_1)"
    assert waited in end[STUDENTS[1]]["advice"]


def test_fold_that_cannot_be_trained_ends_its_own_student_and_no_other(study: Study):
    cluster, (teachers, students, report) = study.login.cluster, study.submitted
    assert study.states == {
        f"{teachers}_0": "COMPLETED", f"{teachers}_1": "FAILED", f"{teachers}_2": "COMPLETED",
        f"{students}_0": "COMPLETED", f"{students}_1": "CANCELLED", f"{students}_2": "COMPLETED",
        report: "COMPLETED",
    }  # fmt: skip
    record = cluster.show(f"{teachers}_1")
    assert (record["ExitCode"], record["Restarts"]) == ("2:0", "0")
    assert "cannot write run folder runs/study-teacher-fold1" in Path(record["StdOut"]).read_text()
    assert all(name in study.report for name in (TEACHERS[0], TEACHERS[2], STUDENTS[0], STUDENTS[2]))


def test_same_command_again_trains_what_is_missing(study: Study):
    teacher, student, report = study.resubmitted
    assert study.restates == {f"{teacher}_1": "COMPLETED", f"{student}_1": "COMPLETED", report: "COMPLETED"}
    assert study.nothing.startswith("nothing to submit: 6 runs of 6 done")
    for name in (*TEACHERS, *STUDENTS):
        folder = study.login.run(name)
        assert done(folder)
        assert read_json(folder / "eval" / "test.json")["fold"] == int(name[-1])
    assert len(study.login.noted("started")[TEACHERS[0]]) == 1
    assert all(name in (study.login.run("report") / "index.html").read_text() for name in (*TEACHERS, *STUDENTS))


def test_runs_that_are_in_the_queue_are_not_submitted_again(study: Study):
    assert "6 runs already in the queue" in study.refused
    assert f"scancel {study.submitted[0]}_0" in study.refused


def test_configs_edited_after_the_submission_are_for_the_next_one(study: Study):
    epochs = {yaml.safe_load((study.login.run(name) / "config.yaml").read_text())["run"]["epochs"] for name in STUDENTS}
    assert epochs == {EPOCHS}
    assert folders.last_line(study.login.run(TEACHERS[2]))["epoch"] == EPOCHS - 1


# the rest by themselves


def test_printed_commands_submit_the_same_jobs(login: Login):
    login.site("DISTKD_SBATCH_OPTIONS='--hold'", "DISTKD_CPUS_PER_TASK=2", "DISTKD_TIME=1:00:00")
    words = ("--folds", "0,2", "--seeds", "1-2", "--nodes", "2", "--optim.lr", "2e-3")
    script = login.submit(*words, "--dry-run")
    assert not login.cluster.jobs()
    assert not (login.here / "runs").exists()
    (login.here / "commands.sh").write_text(script)
    said = login.cluster.run("bash", "commands.sh", cwd=login.here)
    by_hand = _chain(login.cluster, said.removeprefix("submitted:").split())
    by_itself = _chain(login.cluster, ids_in(login.submit(*words)))
    assert by_hand == by_itself
    waits = [" ".join(line.split()[:3]) for line in by_itself]
    assert waits == [
        "report job3 afterany:job1_*(unfulfilled),afterany:job2_*(unfulfilled)",
        *(f"study-student job2_{task} aftercorr:job1_*(unfulfilled)" for task in range(4)),
        *(f"study-teacher job1_{task} (null)" for task in range(4)),
    ]
    [kept] = (login.here / "runs" / "slurm").glob("submitted-*")
    assert "sbatch" in (kept / "commands.txt").read_text()


def _chain(cluster: Cluster, ids: list[str]) -> list[str]:
    """A line for each waiting job or task: name, task, what it waits for, nodes, cores, time, folder and script."""
    words = ["--noheader", "--array", f"--jobs={','.join(ids)}", "--format=%j %i %E %D %C %l %Z %o"]
    lines = cluster.run("squeue", *words).splitlines()
    for number, job in enumerate(ids, start=1):
        lines = [re.sub(rf"\b{job}(?=\D)", f"job{number}", line) for line in lines]
    return sorted(re.sub(r"(\S+/\w+\.sbatch).*", r"\1", line) for line in lines)


def test_teacher_and_student_in_one_job_that_is_requeued_in_between(login: Login, finish: Finish):
    cluster = login.cluster
    with login.holding(6) as hold:
        [job] = ids_in(login.submit("--together", "--no-report"))
    ranks = held(cluster, job, hold)
    cluster.scancel("--batch", "--signal=USR1", job)
    cluster.until(lambda: "asks the ranks to stop: USR1" in cluster.log(job), "answer to the signal", job)
    release(ranks.values())
    (record,) = cluster.wait(job, restart=1)
    assert record["Restarts"] == "1"
    assert login.noted("started") == {"study-teacher": [job, job], "study-student": [job]}
    for kind in ("teacher", "student"):
        whole = finish(login.config(kind), login.here / "whole", 1)
        assert folders.differences(login.run(f"study-{kind}"), whole) == []


def test_shards_are_read_from_the_disk_of_each_node_and_nothing_else_changes(login: Login, finish: Finish):
    cluster, disks, shards = login.cluster, login.here / "disks", login.here / "shards"
    shutil.copytree(login.small.shards, shards)
    login.site(f"DISTKD_SCRATCH='{disks}/$SLURMD_NODENAME'")
    words = (str(login.here / "study/teacher.yaml"), "--data.shards", str(shards))
    with login.holding(3, ranks=2) as hold:
        said = login.distkd("submit", *words, "--nodes", "2", "--ranks-per-node", "1", "--no-report")
    [job] = ids_in(said)
    whole = finish(login.config("teacher") | {"data": {"shards": str(shards), "threads": 0}}, login.here / "whole", 2)
    ranks = held(cluster, job, hold)
    nodes = cluster.run("scontrol", "show", "hostnames", cluster.show(job)["NodeList"]).split()
    assert sorted(path.name for path in disks.iterdir()) == nodes
    assert all(len(list((disks / node).glob("shards-*/*.tar"))) == len(list(shards.glob("*.tar"))) for node in nodes)
    for path in shards.glob("*.tar"):
        path.unlink()
    release(ranks.values())
    cluster.wait(job)
    assert f"copies shards to {disks}/$SLURMD_NODENAME of each node" in cluster.log(job)
    assert folders.differences(login.run("study-teacher"), whole) == []
