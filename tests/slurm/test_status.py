"""`distkd status`: what it says of run folders in every state, with and without a queue to ask."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest

from distkd.cli import USER, main
from distkd.errors import DataError
from distkd.slurm import progress, table
from distkd.slurm.find import find
from distkd.slurm.judge import duration
from distkd.slurm.queue import EndedJob, QueuedJob, queued
from distkd.slurm.status import Row, look
from distkd.slurm.unbegun import unbegun

NOW = 1_800_000_000.0
CONFIG = "run: {name: x}\neval: {metric: auc_macro}\n"

Lines = list[dict[str, Any]]


def lines_of(path: Path, lines: Lines) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def submitted(folder: Path, job: str, **values: Any) -> Path:
    """A run that a job has been submitted for, on top of what it had."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "event": "submitted",
        "time": NOW - 9000,
        "job": job,
        "script": "folds.sbatch",
        "log": "a.out",
        "after": [],
    }
    with (folder / "jobs.jsonl").open("a") as file:
        file.write(json.dumps(about | values) + "\n")
    return folder


def begun(
    folder: Path,
    *,
    job: str | None = None,
    age_s: float = 5.0,
    step: int = 60,
    every_s: float = 20.0,
    started_s: float = 1000.0,
    restart: int = 0,
    n_steps: int | None = 100,
) -> Path:
    """A run whose newest line has an age: a line every ten steps of 32 samples, a validation with each."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG)
    about = {"n_steps": n_steps, "started": NOW - started_s, "job": job}
    (folder / "environment.json").write_text(json.dumps({k: v for k, v in about.items() if v is not None}))
    lines_of(folder / "events" / "rank-00000.jsonl", [{"event": "start", "time": NOW - started_s, "step": 0}])
    newest = NOW - age_s
    lines: Lines = []
    for at in range(10, step + 1, 10):
        time = newest - (step - at) / 10 * every_s
        lines.append({"step": at, "epoch": 0, "time": time - 1, "samples": 32 * at, "loss": 1.0})
        lines.append({"step": at, "epoch": 0, "time": time, "val": {"auc_macro": at / 100}})
    lines_of(folder / "metrics.jsonl", lines)
    if job is not None:
        with (folder / "jobs.jsonl").open("a") as file:
            file.write(json.dumps({"event": "started", "time": NOW - started_s, "job": job, "restart": restart}) + "\n")
    return folder


def ended(folder: Path, state: str, *, age_s: float = 5.0, message: str = "", **values: Any) -> Path:
    begun(folder, age_s=age_s, **values)
    outcome = {"state": state, "kind": "data", "step": 60, "attempt": 1, "message": message}
    (folder / "outcome.json").write_text(json.dumps(outcome))
    with (folder / "events" / "rank-00000.jsonl").open("a") as file:
        file.write(json.dumps({"event": state, "time": NOW - age_s, "step": 60}) + "\n")
    return folder


def queue_of(*jobs: tuple[str, str, str]) -> dict[str, QueuedJob]:
    return {job: QueuedJob(job, state, reason, 3600, "n1") for job, state, reason in jobs}


def only(root: Path, queue: dict[str, QueuedJob] | None = None, *ends: EndedJob) -> Row:
    [row] = look([root], queue, NOW, ended=lambda ids: {end.job: end for end in ends if end.job in ids})
    return row


@pytest.fixture
def fake_squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes `squeue` answer with these lines; each is `id|state|reason|time left|nodes`."""

    def answer(lines: str) -> None:
        program = tmp_path / "bin" / "squeue"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{lines}\nEND\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")

    return answer


@pytest.fixture
def no_squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


# one run's position


def test_rate_and_remaining_time_are_those_of_the_last_lines(tmp_path: Path):
    row = only(begun(tmp_path / "a", every_s=20.0, age_s=4.0))
    assert (row.name, row.state, row.step, row.total) == ("a", "running", 60, 100)
    assert row.steps_per_s == pytest.approx(50 / 101)  # from the first line to the newest validation
    assert row.samples_per_s == pytest.approx(32 * 50 / 101)
    assert row.eta_s == pytest.approx(40 * 101 / 50 - 4)
    assert row.finish == pytest.approx(NOW + 40 * 101 / 50 - 4)
    assert (row.news_age_s, row.metric, row.value, row.advice) == (4.0, "auc_macro", 0.6, "")


def test_the_rate_is_of_the_present_attempt(tmp_path: Path):
    folder = begun(tmp_path / "a", step=100, every_s=20.0, started_s=30.0, n_steps=200)
    assert only(folder).steps_per_s == pytest.approx(10 / 21)  # steps 90 and 100
    lines = progress.tail(folder / "metrics.jsonl")
    lines_of(folder / "metrics.jsonl", [{**line, "time": line["time"] - 50_000} for line in lines])
    row = only(folder)
    assert (row.steps_per_s, row.eta_s) == (None, None)
    assert row.step == 0  # where the attempt resumed


def test_the_rate_forgets_what_was_long_ago(tmp_path: Path):
    folder = begun(tmp_path / "a", step=300, every_s=50.0, started_s=10_000.0, n_steps=400)
    slow = [{"step": step, "time": NOW - 9000 + step, "samples": 32 * step} for step in range(10)]
    lines_of(folder / "metrics.jsonl", slow + progress.tail(folder / "metrics.jsonl"))
    assert only(folder).steps_per_s == pytest.approx(0.2, rel=0.05)


def test_lines_without_a_time_are_helped_by_the_events(tmp_path: Path):
    folder = begun(tmp_path / "a", started_s=100.0)
    lines = progress.tail(folder / "metrics.jsonl")
    lines_of(folder / "metrics.jsonl", [{k: v for k, v in line.items() if k != "time"} for line in lines])
    os.utime(folder / "metrics.jsonl", (NOW - 7, NOW - 7))
    events = progress.tail(folder / "events" / "rank-00000.jsonl")
    saved: Lines = [{"event": "checkpoint", "time": NOW - 50, "step": 25}]
    lines_of(folder / "events" / "rank-00000.jsonl", events + saved)
    row = only(folder)
    assert (row.step, row.news_age_s, row.steps_per_s) == (60, 7.0, 0.5)


def test_what_is_not_known_is_shown_as_such(tmp_path: Path):
    folder = begun(tmp_path / "a", n_steps=None)
    (folder / "config.yaml").write_text("[no mapping")
    row = only(folder)
    assert (row.total, row.eta_s, row.metric, row.value) == (None, None, None, None)
    assert "60 of ?" in table.plain([row], NOW)[1]


def test_of_a_long_log_only_the_end_is_read(tmp_path: Path):
    folder = begun(tmp_path / "a")
    log = folder / "metrics.jsonl"
    newest = log.read_text()
    long: Lines = [{"step": 0, "time": NOW - 500, "val": {"auc_macro": 0.1}}]
    long += [{"step": 1, "time": NOW - 400, "rest": "x" * 1000} for _ in range(200)]
    lines_of(log, long)
    assert progress.read_position(folder).value == 0.1  # beyond the tail, but not far beyond
    with log.open("a") as file:
        file.write(newest + '{"step": 61, "ti')  # one that is being written
    found = progress.tail(log)
    assert len(found) < 100
    assert found[-1]["step"] == 60
    assert progress.read_position(folder).step == 60


def test_a_run_that_has_done_its_last_step_is_evaluating(tmp_path: Path):
    row = only(begun(tmp_path / "a", step=100, age_s=400.0))
    assert (row.state, row.advice, row.eta_s) == ("evaluating", "", None)


# states without a queue


@pytest.mark.parametrize("state", ["done", "interrupted", "failed"])
def test_a_run_says_itself_how_it_ended(tmp_path: Path, state: str):
    row = only(ended(tmp_path / "a", state, message="shard 3 is\n torn; take it from a copy"))
    assert (row.state, row.ended, row.steps_per_s) == (state, NOW - 5, None)
    assert (
        row.advice
        == {
            "done": "",
            "interrupted": "the same command, or `distkd submit`, goes on from its checkpoint",
            "failed": "shard 3 is torn; take it from a copy",
        }[state]
    )
    assert not row.is_active


def test_a_silent_run_outside_of_slurm_is_given_up_by_the_age_of_its_news(tmp_path: Path):
    assert only(begun(tmp_path / "a", age_s=290.0)).state == "running"
    row = only(begun(tmp_path / "a", age_s=720.0))
    assert (row.state, row.is_active) == ("lost", False)
    assert (
        row.advice
        == "no news for 12 min, lines came every 19 s or sooner before; if it no longer runs, start it again to resume"
    )
    # whose lines are far apart is given longer
    assert only(begun(tmp_path / "a", age_s=720.0, every_s=200.0, started_s=5000.0)).state == "running"


def test_before_its_first_line_a_run_is_given_longer(tmp_path: Path):
    assert only(begun(tmp_path / "a", step=0, started_s=800.0)).state == "running"
    row = only(begun(tmp_path / "a", step=0, started_s=1200.0))
    assert (row.state, row.advice) == ("lost", "no news for 20 min; if it no longer runs, start it again to resume")


# states with a queue


@pytest.mark.parametrize(
    "job_state, reason, state, active",
    [
        ("PENDING", "Priority", "queued", True),
        ("PENDING", "Dependency", "waiting", True),
        ("PENDING", "DependencyNeverSatisfied", "waiting", False),
        ("PENDING", "JobHeldUser", "queued", False),
        ("RUNNING", "", "starting", True),
    ],
)
def test_a_run_that_has_not_begun_is_what_its_job_is(
    tmp_path: Path, job_state: str, reason: str, state: str, active: bool
):
    row = only(submitted(tmp_path / "a", "17_3", after=["16_3"]), queue_of(("17_3", job_state, reason)))
    assert (row.state, row.is_active, row.step) == (state, active, None)
    assert [(job.job, job.state, job.reason) for job in row.jobs] == [("17_3", job_state, reason)]
    assert bool(row.advice) == (not active)
    if reason == "DependencyNeverSatisfied":
        assert row.advice == "what it waits for will not come (job 16_3): scancel 17_3, mend that, submit again"


def test_a_run_in_a_running_job_runs_and_is_never_called_lost(tmp_path: Path):
    log = tmp_path / "a.out"
    log.touch()
    folder = begun(submitted(tmp_path / "a", "17", log=str(log)), job="17", restart=2)
    row = only(folder, queue_of(("17", "RUNNING", "")))
    assert (row.state, row.advice, row.jobs[0].restarts, row.jobs[0].time_left_s) == ("running", "", 2, 3600)
    assert "17 RUNNING, 60 min left, restarted 2x" in table.plain([row], NOW)[1]
    begun(folder, job="17", age_s=720.0)
    row = only(folder, queue_of(("17", "RUNNING", "")))
    assert row.state == "running"
    assert row.advice == f"no news for 12 min, lines came every 19 s or sooner before, see {log}"
    assert row.eta_s is None


@pytest.mark.parametrize("outcome", ["interrupted", "failed", None])
def test_a_requeued_run_is_queued_again_and_then_starts(tmp_path: Path, outcome: str | None):
    folder = submitted(tmp_path / "a", "17")
    if outcome is None:
        begun(folder, job="17")
    else:
        ended(folder, outcome, job="17")
    row = only(folder, queue_of(("17", "PENDING", "BeginTime")))
    assert (row.state, row.advice) == ("queued again", "")
    assert (
        only(folder, queue_of(("17", "RUNNING", ""))).state
        == {
            "interrupted": "starting",
            "failed": "failed",
            None: "running",
        }[outcome]
    )


@pytest.mark.parametrize("outcome", ["failed", None])
def test_a_requeued_job_that_runs_again_is_starting_until_the_run_says_something(tmp_path: Path, outcome: str | None):
    jobs, queue = tmp_path / "jobs", queue_of(("17_3", "RUNNING", ""))
    folder = submitted(tmp_path / "a", "17_3", log=str(jobs / "folds-17_3.out"))
    begin = {"job": "17_3", "restart": 1, "age_s": 720.0}
    begun(folder, **begin) if outcome is None else ended(folder, outcome, **begin)
    (jobs / "17_3").mkdir(parents=True)
    for attempt in range(2):
        (jobs / "17_3" / f"stop.{attempt}").touch()
    assert only(folder, queue).state == (outcome or "running")
    (jobs / "17_3" / "stop.2").touch()  # its third attempt
    row = only(folder, queue)
    assert (row.state, row.advice) == ("starting", "")
    (folder / "outcome.json").unlink(missing_ok=True)
    begun(folder, job="17_3", restart=2)
    assert only(folder, queue).state == "running"


def test_a_failed_run_that_was_submitted_again_is_starting(tmp_path: Path):
    folder = submitted(ended(tmp_path / "a", "failed", job="17"), "18")
    row = only(folder, queue_of(("18", "RUNNING", "")))
    assert (row.state, row.jobs[0].job) == ("starting", "18")


def test_a_run_whose_job_is_gone_is_lost_at_once(tmp_path: Path):
    folder = begun(submitted(tmp_path / "a", "17"), job="17", age_s=3.0)
    row = only(folder, queue_of(("18", "RUNNING", "")))
    assert row.state == "lost"
    assert row.advice == "job 17 is gone and the run has not said how it ended; submit again to resume"  # no such log
    never = only(submitted(tmp_path / "b", "17"), {})
    assert (never.state, never.advice) == (
        "lost",
        "job 17 left the queue before the run began; submit again",
    )


@pytest.mark.parametrize(
    "end, state, words",
    [
        (
            EndedJob("17", "FAILED", "NonZeroExitCode", 2),
            "failed",
            "ended with exit code 2{when}, see {log}; mend it and",
        ),
        (EndedJob("17", "OUT_OF_MEMORY", "", 0), "failed", "ended: out of memory{when}, see {log}; mend it and"),
        (EndedJob("17", "CANCELLED", "", 0), "cancelled", "was cancelled{when}, see {log};"),
    ],
)
def test_a_run_whose_job_ended_is_what_slurm_says_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: EndedJob, state: str, words: str
):
    monkeypatch.chdir(tmp_path)
    log = tmp_path / "my logs" / "a-17.out"
    log.parent.mkdir()
    log.touch()
    folder = submitted(tmp_path / "a", "17", log=str(log))
    row = only(folder, {}, end)
    assert (row.state, row.is_active) == (state, False)
    quoted = "'my logs/a-17.out'"
    assert row.advice == f"job 17 {words.format(when=' before the run began', log=quoted)} submit again"
    row = only(begun(folder, job="17"), {}, end)  # the same in the middle of the run
    assert row.state == state
    assert row.advice == f"job 17 {words.format(when='', log=quoted)} submit again to resume"


def test_where_there_is_no_log_slurm_is_to_be_asked(tmp_path: Path):
    row = only(submitted(tmp_path / "a", "17", log=str(tmp_path / "none")), {}, EndedJob("17", "FAILED", "", 1))
    assert row.advice == (
        "job 17 ended with exit code 1 before the run began, see scontrol show job 17; mend it and submit again"
    )


def test_a_job_that_slurm_took_out_of_the_queue_names_the_one_it_waited_for(tmp_path: Path):
    end = EndedJob("17_3", "CANCELLED", "DependencyNeverSatisfied", 0)
    row = only(submitted(tmp_path / "a", "17_3", after=["16_3"]), {}, end)
    assert (row.state, row.advice) == (
        "cancelled",
        "what job 17_3 waited for did not come (job 16_3): mend that, submit again",
    )


@pytest.mark.parametrize("outcome", ["failed", "interrupted"])
def test_a_second_job_that_came_to_nothing_is_spoken_of_not_the_first(tmp_path: Path, outcome: str):
    end = EndedJob("18", "FAILED", "", 2)
    folder = submitted(ended(tmp_path / "a", outcome, job="17"), "18", time=NOW - 2)
    row = only(folder, {}, end)
    assert (row.state, row.jobs[0].job) == ("failed", "18")
    assert row.advice.startswith("job 18 ended with exit code 2 before the run began")
    assert only(folder, {}).state == outcome  # forgotten by SLURM
    ended(folder, outcome, started_s=1.0)  # since then by hand, outside of SLURM
    assert only(folder, {}, end).state == outcome


def test_slurm_is_asked_once_and_only_for_jobs_whose_end_is_not_known(tmp_path: Path):
    ended(tmp_path / "done", "done", job="1")
    ended(tmp_path / "failed", "failed", job="2")
    begun(tmp_path / "lost", job="3")
    begun(tmp_path / "running", job="4")
    submitted(tmp_path / "never", "5")
    asked: list[Collection[str]] = []

    def ends(ids: Collection[str]) -> dict[str, EndedJob]:
        asked.append(ids)
        return {}

    look([tmp_path], queue_of(("4", "RUNNING", "")), NOW, ended=ends)
    assert asked == [{"3", "5"}]
    look([tmp_path], None, NOW, ended=ends)
    look([tmp_path / "done"], {}, NOW, ended=ends)
    assert len(asked) == 1


@pytest.mark.parametrize("outcome", ["done", "failed", "interrupted"])
@pytest.mark.parametrize("state, words", [("RUNNING", "17 RUNNING, 60 min left"), ("PENDING", "17 PENDING")])
def test_a_job_that_lives_is_shown_whatever_the_state_of_the_run(tmp_path: Path, outcome: str, state: str, words: str):
    row = only(ended(tmp_path / "a", outcome, job="17"), queue_of(("17", state, "")))
    assert words in table.plain([row], NOW)[1]
    assert row.is_active  # its next attempt, or its end
    over = only(tmp_path / "a", {})
    assert not over.is_active
    if outcome == "done":
        assert over.jobs == ()


def test_without_a_queue_to_ask_nobody_is_called_lost_for_a_missing_job(tmp_path: Path):
    assert only(begun(tmp_path / "a", job="17", age_s=3.0)).state == "running"
    assert only(submitted(tmp_path / "b", "17")).state == "queued"


def test_a_later_stage_of_a_job_waits_for_the_stage_that_runs(tmp_path: Path):
    begun(submitted(tmp_path / "teacher", "17"), job="17")
    submitted(tmp_path / "student", "17")
    rows = look([tmp_path], queue_of(("17", "RUNNING", "")), NOW)
    assert [(row.name, row.state) for row in rows] == [("teacher", "running"), ("student", "waiting")]


# several runs


def test_running_comes_first_then_what_waits_then_the_newest_ending(tmp_path: Path):
    ended(tmp_path / "old", "failed", age_s=500.0)
    ended(tmp_path / "new", "done", age_s=5.0)
    submitted(tmp_path / "fold10", "10")
    submitted(tmp_path / "fold9", "9")
    begun(tmp_path / "z")
    rows = look([tmp_path], queue_of(("9", "PENDING", "Priority"), ("10", "PENDING", "Priority")), NOW)
    assert [row.name for row in rows] == ["z", "fold9", "fold10", "new", "old"]


def test_a_study_is_a_line_for_each_state_unless_all_are_asked_for(tmp_path: Path):
    for fold in range(15):
        for seed in range(5):
            ended(tmp_path / f"kd-fold{fold}-seed{seed}", "done", age_s=100 + fold)
    ended(tmp_path / "kd-fold15-seed0", "failed", message="torn")
    begun(tmp_path / "kd-fold15-seed1")
    queue = queue_of(*((f"7_{fold}", "PENDING", "DependencyNeverSatisfied") for fold in range(4)))
    for fold in range(4):
        submitted(tmp_path / f"late-fold{fold}", f"7_{fold}", after=[f"6_{fold}"])
    rows = look([tmp_path], queue, NOW)
    lines = table.plain(rows, NOW)
    assert [line.split()[:2] for line in lines[1:-1]] == [
        ["kd-fold15-seed1", "running"],
        ["late-fold*", "waiting"],
        ["->", "what"],
        ["kd-fold15-seed0", "failed"],
        ["->", "torn"],
        ["kd-fold*-seed*", "done"],
    ]
    assert "4 runs" in lines[2]
    assert "7_0 .. 7_3" in lines[2]
    assert "auc_macro 0.6000" in lines[6]
    assert lines[-1] == "1 running, 4 waiting, 1 failed, 75 done"
    assert len(table.plain(rows, NOW, everything=True)) == 1 + 81 + 5 + 1  # five with advice


def test_names_are_told_apart_where_two_roots_have_the_same(tmp_path: Path):
    for root in ("one", "two"):
        ended(tmp_path / root / "a", "done")
    names = [row.name for row in look([tmp_path / "one", tmp_path / "two"], None, NOW)]
    assert sorted(names) == [str(tmp_path / "one" / "a"), str(tmp_path / "two" / "a")]
    assert len(look([tmp_path, tmp_path / "one"], None, NOW)) == 2  # each once


def test_of_several_folders_names_are_relative_to_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    here = tmp_path / "here"
    for folder in (here / "runs" / "a", here / "more" / "b", tmp_path / "c"):
        ended(folder, "done")
    monkeypatch.chdir(here)
    several = [Path("runs"), here / "more", Path("../c")]
    assert {*find(several)} == {"runs/a", "more/b", str(tmp_path / "c")}
    assert [*find([here / "more"])] == ["b"]


@pytest.mark.usefixtures("no_squeue")
def test_a_folder_without_runs_is_left_out_with_a_word_while_others_have_some(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    ended(tmp_path / "a", "done")
    (tmp_path / "empty").mkdir()
    paths = [str(tmp_path / name) for name in ("absent", "a", "empty")]
    for words in (["status", *paths], ["status", *paths, "--watch", "1"]):
        assert main(words) == 0
        *_, counts, absent, empty = capsys.readouterr().out.splitlines()
        assert counts == "1 done"
        assert absent.startswith(f"{paths[0]} does not exist")
        assert empty.startswith(f"no run found at or below {paths[2]}")
    assert main(["status", "--json", *paths]) == 0
    said = capsys.readouterr()
    assert len(json.loads(said.out)) == 1
    assert f"{paths[0]} does not exist" in said.err
    assert main(["status", paths[0], paths[2], "--watch", "1"]) == USER
    said = capsys.readouterr().err
    assert f"{paths[0]} does not exist" in said
    assert f"no run found at or below {paths[2]}" in said


def test_the_copies_of_a_submission_are_no_runs(tmp_path: Path):
    ended(tmp_path / "a", "done")
    copies = tmp_path / "slurm" / "submitted-20260101-000000"
    copies.mkdir(parents=True)
    (copies / "config.yaml").write_text(CONFIG)
    assert only(tmp_path).name == "a"


def test_of_the_folders_of_jobs_and_of_runs_nothing_is_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs = tmp_path / "runs"
    for fold in range(3):
        folder = ended(runs / "study" / f"fold-{fold}", "done")
        (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
        job = f"17_{fold}"
        for attempt in range(4):
            for node in range(16):
                (runs / "slurm" / job / f"logs.{attempt}" / f"node-{node}").mkdir(parents=True)
            (runs / "slurm" / job / f"notes.{attempt}").mkdir()
            (runs / "slurm" / job / f"stop.{attempt}").touch()
        if fold:
            (runs / "slurm" / f"folds-{job}.out").touch()
    (runs / "slurm" / "submitted-20260101-000000").mkdir()
    (runs / "prometheus").mkdir()
    ended(runs / "2026" / "7", "done")  # numbers are good names, too
    visited: list[str] = []
    scandir = os.scandir

    def noted(folder: Any) -> Any:
        visited.append(Path(folder).relative_to(runs).as_posix())
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", noted)
    assert [*find([runs])] == ["2026/7", "study/fold-0", "study/fold-1", "study/fold-2"]
    # of the jobs only the one without a log beside it, and of that no folder inside
    studies = ["study", "study/fold-0", "study/fold-1", "study/fold-2"]
    assert visited == [".", "2026", "2026/7", "slurm", "slurm/17_0", *studies]


# jobs by hand


def by_hand(root: Path, job: str, age_s: float = 60.0, run: str | None = None) -> Path:
    """The folder of a job that has begun, and perhaps a run of its own."""
    folder = root / "slurm" / job
    (folder / "notes.0" / "node-0").mkdir(parents=True)
    (folder / "stop.0").touch()
    if run is not None:
        (folder / "notes.0" / "node-0" / "run-0").write_text(run)
    os.utime(folder, (NOW - age_s, NOW - age_s))
    return folder


def test_jobs_by_hand_that_ended_before_a_run_began_are_named(
    tmp_path: Path, fake_squeue: Callable[[str], None], capsys: pytest.CaptureFixture[str], monkeypatch: Any
):
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    by_hand(runs, "12")
    by_hand(runs, "13", run="a run that is somewhere else")
    by_hand(runs, "14_2", age_s=30.0)
    (by_hand(runs, "18") / "notes.0" / "code-0").write_text("0\n")  # its run was done already
    (by_hand(runs, "19", age_s=90.0) / "notes.0" / "code-0").write_text("2\n")
    by_hand(runs, "15", age_s=5 * 86400)
    by_hand(runs, "16")
    begun(runs / "a", job="17")
    by_hand(runs, "17")
    (tmp_path / "distkd-14_2.out").touch()  # of sbatch, in the current folder
    fake_squeue("16|RUNNING|None|1:00|n1\n17|RUNNING|None|1:00|n1\n12 FAILED 512 NonZeroExitCode")
    said = unbegun([Path("runs")], [runs / "a"], queued(), NOW)
    assert said == [
        "job 14_2 ended before its run began, see distkd-14_2.out",
        "job 12 ended with exit code 2 before its run began, see runs/slurm/12",
        "job 19 ended before its run began, see runs/slurm/19",
    ]
    assert unbegun([Path("runs")], [runs / "a"], None, NOW) == []
    assert table.run([Path("runs")], clock=lambda: NOW) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == said
    for job in range(20, 30):
        by_hand(runs, str(job), age_s=50 - job)
    assert [line.split()[1] for line in unbegun([runs], [], {}, NOW)] == ["29", "28", "27", "26", "25"]
    (runs / "a").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"(?s)no run found at or below.*job 29 ended before its run began"):
        table.run([runs], clock=lambda: NOW)


# targets of Prometheus


def test_targets_of_runs_that_do_not_run_are_named_with_the_command_that_removes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    over, alive = ended(tmp_path / "over", "failed"), begun(submitted(tmp_path / "alive", "17"), job="17")
    for folder in (over, alive):
        lines_of(folder / "prometheus" / "rank-00000.json", [])
        content = [{"targets": ["n1:9000"], "labels": {"run": folder.name, "slurm_job": "17"}}]
        (folder / "prometheus" / "rank-00000.json").write_text(json.dumps(content))
    rows = look([tmp_path], queue_of(("17", "RUNNING", "")), NOW)
    assert {row.name: row.stale_targets for row in rows} == {"over": 1, "alive": 0}
    command = f"python -m distkd.metrics.targets --remove {over}"
    assert table.plain(rows, NOW)[-1] == f"Prometheus still asks ranks of 1 runs that do not run: {command}"
    monkeypatch.chdir(tmp_path)
    assert table.plain(rows, NOW)[-1].endswith(" --remove over")
    monkeypatch.undo()
    subprocess.run([sys.executable, *command.split()[1:]], check=True, capture_output=True)
    assert [row.stale_targets for row in look([tmp_path], queue_of(("17", "RUNNING", "")), NOW)] == [0, 0]


# the command


def test_the_command_prints_aligned_lines_with_what_the_queue_says(
    tmp_path: Path, fake_squeue: Callable[[str], None], capsys: pytest.CaptureFixture[str]
):
    begun(submitted(tmp_path / "runs" / "a", "17_3"), job="17_3", age_s=0.0)
    submitted(tmp_path / "runs" / "b", "18_3")
    fake_squeue("17_3|RUNNING|None|1-00:00:00|n[1-2]\n18_3|PENDING|Dependency|4:00:00|")
    assert set(queued() or {}) == {"17_3", "18_3"}
    assert table.run([tmp_path / "runs"], clock=lambda: NOW) == 0
    heading, a, b, counts = capsys.readouterr().out.splitlines()
    column = heading.index("job")
    assert a[column:] == "17_3 RUNNING, 24 h 0 min left"
    assert b[column:] == "18_3 PENDING (Dependency)"
    assert a[heading.index("step") :].startswith("60/100 (60 %)")
    assert a[heading.index("rate") :].startswith("0.5 steps/s, 16 samples/s")
    assert counts == "1 running, 1 waiting"


@pytest.mark.usefixtures("no_squeue")
def test_without_squeue_it_says_that_it_could_not_ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    submitted(tmp_path / "a", "17")
    assert main(["status", str(tmp_path)]) == 0
    *_, counts, note = capsys.readouterr().out.splitlines()
    assert counts == "1 queued"
    assert note == "the queue cannot be asked (no squeue, or no answer): all of this is from files alone"


@pytest.mark.usefixtures("no_squeue")
def test_scripts_get_every_run_with_the_same_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for seed in range(3):
        ended(tmp_path / f"a-seed{seed}", "done")
    submitted(tmp_path / "b", "17")
    assert main(["status", "--json", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["state"] for row in found] == ["queued", "done", "done", "done"]
    assert {tuple(row) for row in found} == {tuple(Row.__dataclass_fields__)}
    assert found[0]["jobs"][0]["job"] == "17"


@pytest.mark.usefixtures("no_squeue")
def test_a_terminal_gets_a_table_with_the_advice_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    begun(tmp_path / "kd[1]", age_s=0.0)
    ended(tmp_path / "b", "failed", message="shard [3] is torn")
    assert table.run([tmp_path], clock=lambda: NOW) == 0
    out = capsys.readouterr().out
    assert "kd[1]" in out
    assert "shard [3] is torn" in out
    assert "job" not in out  # no column without content


@pytest.mark.usefixtures("no_squeue")
def test_watching_ends_by_itself_when_nothing_runs_or_waits(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = begun(tmp_path / "a", age_s=0.0)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            ended(folder, "done")

    assert table.run([tmp_path], every_s=7, clock=lambda: NOW, sleep=sleep) == 0
    assert slept == [7, 7]
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("1 ")] == [
        "1 running", "1 running", "1 done",
    ]  # fmt: skip


@pytest.mark.usefixtures("no_squeue")
def test_watching_ends_with_ctrl_c(tmp_path: Path):
    begun(tmp_path / "a", age_s=0.0)

    def sleep(seconds: float) -> None:
        raise KeyboardInterrupt

    assert table.run([tmp_path], every_s=7, clock=lambda: NOW, sleep=sleep) == 0


@pytest.mark.usefixtures("no_squeue")
@pytest.mark.parametrize(
    "name, words",
    [
        ("absent", "absent does not exist; name a run folder, or a folder of run folders such as runs/"),
        ("file", "file is a file, not a folder; name a run folder"),
        ("empty", "empty; `distkd submit` and `distkd train CONFIG` make one"),
    ],
)
def test_a_path_without_runs_is_refused_with_what_to_do(
    tmp_path: Path, name: str, words: str, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(DataError):
        look([tmp_path / name], None, NOW)
    assert main(["status", str(tmp_path / name)]) == USER
    assert words in capsys.readouterr().err


def test_looking_at_runs_needs_no_torch():
    code = "import sys, distkd.slurm.table; print({'torch', 'numpy', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    "seconds, words",
    [(0.2, "0 s"), (99, "99 s"), (720, "12 min"), (12_000, "3 h 20 min"), (187_200, "2 d 4 h")],
)
def test_durations_are_rounded_to_what_matters(seconds: float, words: str):
    assert duration(seconds) == words
